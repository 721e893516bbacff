"""KPRPE ViT-B (CVLface's size) on MS1MV3, AdaFace: the paper's supplement, Table 8.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/ms1mv3_vit_b_kprpe.py rec=/data/ms1m-retinaface-t1
GPUs:    8 x 40 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run; the paper's: TinyFace rank-1 69.88, IJB-S rank-1 64.68 with landmark fusion.
"""

from insightface_kprpe.training.recipes import paper

config = paper("ms1mv3", "vit_b_kprpe")
