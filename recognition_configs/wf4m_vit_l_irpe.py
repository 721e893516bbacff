"""iRPE ViT-L on WebFace4M, AdaFace: the paper's supplement, Table 8.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/wf4m_vit_l_irpe.py rec=/data/WebFace4M
GPUs:    8 x 80 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run; the paper's: TinyFace rank-1 74.92, IJB-S rank-1 71.93 with landmark fusion.
"""

from insightface_kprpe.training.recipes import paper

config = paper("wf4m", "vit_l_irpe")
