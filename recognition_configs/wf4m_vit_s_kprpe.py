"""KPRPE ViT-S on WebFace4M, AdaFace: Table 6 of the paper's supplement, ablation column.

Of the augmentations: mirroring, rotation, scale and translation; the photometric ones are not applied yet.

Command: torchrun --nproc_per_node=4 train_v2.py recognition_configs/wf4m_vit_s_kprpe.py rec=/data/WebFace4M
GPUs:    4 x 24 GB (batch 512 in all); fewer: raise gradient_acc.
Result:  not yet run.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "WebFace4M"
config.num_classes = 205990
config.num_image = 4235242
config.val_targets = ("lfw", "cfp_fp", "agedb_30")
config.network = "vit_s_kprpe"
config.augment = {"rotation": 20.0, "scale": 0.2, "translation": 0.1, "probability": 0.2}
config.loss = "adaface"
config.sample_rate = 1.0
config.batch_size = 128
config.optimizer = "adamw"
config.lr = 0.001
config.weight_decay = 0.05
config.scheduler = "cosine"
config.num_epoch = 34
config.warmup_epoch = 3.0
config.precision = "bf16"
config.num_workers = 8
