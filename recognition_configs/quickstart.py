"""A small KPRPE ViT on drawn faces: the whole path in minutes, on a laptop.

Command: python train_v2.py recognition_configs/quickstart.py
Needs:   2 CPU cores; no data (faces are drawn), no GPU.
Result:  see the README; the faces are synthetic, the accuracy says nothing about real ones.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "synthetic"
config.num_classes = 100
config.num_image = 3000
config.val_targets = ("synthetic",)
config.augment = {"rotation": 10.0, "scale": 0.1, "translation": 0.04, "probability": 0.5}
config.network = "vit_n_kprpe"
config.network_kwargs = {"depth": 4}
config.embedding_size = 128
config.loss = "margin"
config.margin_list = (1.0, 0.0, 0.4)
config.logit_scale = 24.0  # few people and short training: logits that stay small
config.batch_size = 64
config.lr = 0.002
config.position_lr_scale = 30.0
config.scheduler = "cosine"
config.warmup_epoch = 1.0
config.num_epoch = 8
config.num_workers = 1
