"""KPRPE ViT-B (CVLface's size) on WebFace4M, AdaFace: Table 6 of the paper's supplement, large-scale column.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/wf4m_vit_b_kprpe.py rec=/data/WebFace4M
GPUs:    8 x 40 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run.
"""

from insightface_kprpe.training.recipes import paper

config = paper("wf4m", "vit_b_kprpe")
