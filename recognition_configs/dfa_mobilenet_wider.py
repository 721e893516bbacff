"""DFA with the MobileNet0.25 body on WIDER FACE: the paper's supplement, section 3.

The crops (box padded by 0.1, 160 x 160), the batch of 320 and the 750 epochs are the paper's; it does not state
optimizer, learning rate or augmentation, and those here are ours.

Command: insightface-kprpe train-dfa dfa_mobilenet_wider data=/path/to/widerface/train
         torchrun --nproc_per_node=4 -m insightface_kprpe.training.landmark_trainer dfa_mobilenet_wider data=... \\
             batch_size=80
GPUs:    1 (the network has 0.5M parameters; decoding WIDER FACE's images takes the time, so raise num_workers).
Result:  not yet run.
"""

from easydict import EasyDict as edict

config = edict()
config.data = "widerface/train"
config.batch_size = 320
config.num_epoch = 750
config.warmup_epoch = 5.0
config.lr = 0.001
config.precision = "bf16"
config.num_workers = 16
