"""A small KPRPE ViT for some thousand people on a CPU: the one of `make small-pack`, see docs/small_pack.md.

Command: python train_v2.py recognition_configs/small_vit_n_kprpe.py rec=study_data/fiw_both
Needs:   2 CPU cores and an hour or two; benchmarks/study_data.py makes the data from two public sets.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "study_data/fiw_both"
config.val_targets = ()
config.augment = {
    "rotation": 20.0, "scale": 0.2, "translation": 0.08, "probability": 0.9,
    "color_operations": 1, "color_magnitude": (0, 15), "degrade_probability": 0.15, "erase_probability": 0.15,
}  # fmt: skip
config.network = "vit_n_kprpe"
config.network_kwargs = {"drop_path_rate": 0.1}
config.embedding_size = 256
config.loss = "margin"
config.margin_list = (1.0, 0.0, 0.15)
config.logit_scale = 20.0
config.batch_size = 64
config.lr = 0.001
config.position_lr_scale = 10.0
config.weight_decay = 0.05
config.scheduler = "cosine"
config.warmup_epoch = 1.0
config.num_epoch = 12
config.verbose = 1109
config.frequent = 50
config.num_workers = 1
