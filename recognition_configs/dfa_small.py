"""DFA on about two thousand labeled faces, from RetinaFace's public weights, on a CPU.

Command: insightface-kprpe train-dfa dfa_small data=faces/landmarks/train val=faces/landmarks/val
         init_from=retinaface_mobilenet0.25.pth
Needs:   2 CPU cores.
Result:  see docs/landmarks.md; aggregator=False trains the same network without the Mixer.
"""

from easydict import EasyDict as edict

config = edict()
config.data = "faces/landmarks/train"
config.batch_size = 32
config.num_epoch = 10
config.warmup_epoch = 1.0
config.lr = 0.001
config.verbose = 142
config.num_workers = 1
