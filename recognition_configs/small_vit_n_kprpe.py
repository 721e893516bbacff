"""A small KPRPE ViT for some thousand people on a CPU: the one of `make small-pack`, see docs/small_pack.md.

Command: python train_v2.py recognition_configs/small_vit_n_kprpe.py rec=study_data/fiw_both
Needs:   a CPU core for an hour or two; benchmarks/study_data.py makes the data from two public sets.
Result:  see docs/small_pack.md.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "study_data/fiw_both"
config.val_targets = ()
config.augment = {"rotation": 15.0, "scale": 0.15, "translation": 0.06, "probability": 0.8}
config.network = "vit_n_kprpe"
config.network_kwargs = {"drop_path_rate": 0.1}
config.embedding_size = 256
config.loss = "margin"
config.margin_list = (1.0, 0.0, 0.1)
config.logit_scale = 16.0
config.batch_size = 64
config.lr = 0.001
config.position_lr_scale = 10.0
config.weight_decay = 0.05
config.scheduler = "cosine"
config.warmup_epoch = 0.5
config.num_epoch = 11
config.verbose = 1109
config.frequent = 50
config.num_workers = 1
