"""A small KPRPE ViT for a few thousand face crops on a CPU: to see the whole path work on real faces.

Command: torchrun --nproc_per_node=2 train_v2.py recognition_configs/small_vit_n_kprpe.py rec=/path/to/faces
Needs:   2 CPU cores.
Result:  not measured with these settings; network=vit_n trains the same network without keypoints. A study of smaller
         networks is in docs/does_kprpe_help.md.
"""

from easydict import EasyDict as edict

config = edict()
config.rec = "faces"
config.val_targets = ()
config.augment = {"rotation": 10.0, "scale": 0.1, "translation": 0.05, "probability": 0.5}
config.network = "vit_n_kprpe"
config.network_kwargs = {"drop_path_rate": 0.1, "mask_ratio": 0.1}
config.embedding_size = 256
config.loss = "adaface"
config.batch_size = 32
config.lr = 0.001
config.position_lr_scale = 30.0
config.weight_decay = 0.1
config.scheduler = "cosine"
config.warmup_epoch = 2.0
config.num_epoch = 15
config.verbose = 177
config.num_workers = 1
