"""KPRPE ViT-L on WebFace4M, AdaFace: Table 6 of the paper's supplement, large-scale column.

Of the augmentations: mirroring, rotation, scale and translation; the photometric ones are not applied yet.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/wf4m_vit_l_kprpe.py rec=/data/WebFace4M
GPUs:    8 x 80 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "WebFace4M"
config.num_classes = 205990
config.num_image = 4235242
config.val_targets = ("lfw", "cfp_fp", "agedb_30")
config.network = "vit_l_kprpe"
config.gradient_checkpointing = True
config.augment = {"rotation": 20.0, "scale": 0.2, "translation": 0.1, "probability": 0.2}
config.loss = "adaface"
config.sample_rate = 0.6
config.batch_size = 128
config.optimizer = "adamw"
config.lr = 0.0001
config.weight_decay = 0.05
config.scheduler = "cosine"
config.num_epoch = 36
config.warmup_epoch = 3.0
config.precision = "bf16"
config.num_workers = 8
