"""ViT-L on WebFace4M, AdaFace: the paper's supplement, Table 7, first row.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/wf4m_vit_l.py rec=/data/WebFace4M
GPUs:    8 x 80 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run; the paper's: TinyFace rank-1 74.81, AgeDB 97.48, CFP-FP 98.94, IJB-C 97.14 at FAR 0.01 %.
"""

from insightface_kprpe.training.recipes import paper

config = paper("wf4m", "vit_l")
