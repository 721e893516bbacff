"""KPRPE ViT-L on WebFace4M, AdaFace: the paper's supplement, Tables 7 and 8.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/wf4m_vit_l_kprpe.py rec=/data/WebFace4M
GPUs:    8 x 80 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run; the paper's: TinyFace rank-1 75.80, AgeDB 97.67, CFP-FP 99.01, IJB-C 97.13 at FAR 0.01 %.
"""

from insightface_kprpe.training.recipes import paper

config = paper("wf4m", "vit_l_kprpe")
