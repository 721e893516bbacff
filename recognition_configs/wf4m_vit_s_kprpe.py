"""KPRPE ViT-S on WebFace4M, AdaFace: Table 6 of the paper's supplement, ablation column.

Command: torchrun --nproc_per_node=4 train_v2.py recognition_configs/wf4m_vit_s_kprpe.py rec=/data/WebFace4M
GPUs:    4 x 24 GB (batch 512 in all); fewer: raise gradient_acc.
Result:  not yet run.
"""

from insightface_kprpe.training.recipes import paper

config = paper("wf4m", "vit_s_kprpe")
