"""KPRPE ViT-B (CVLface size) on MS1MV3, AdaFace: Table 6 of the paper's supplement, large-scale column.

Of the augmentations: mirroring, rotation, scale and translation; the photometric ones are not applied yet.

Command: torchrun --nproc_per_node=8 train_v2.py recognition_configs/ms1mv3_vit_b_kprpe.py rec=/data/ms1m-retinaface-t1
GPUs:    8 x 40 GB (batch 1024 in all); fewer: raise gradient_acc.
Result:  not yet run.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "ms1m-retinaface-t1"
config.num_classes = 93431
config.num_image = 5179510
config.val_targets = ("lfw", "cfp_fp", "agedb_30")
config.network = "cvlface_vit_b_kprpe"
config.network_kwargs = {"drop_path_rate": 0.1, "mask_ratio": 0.1}
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
