from easydict import EasyDict as edict

config = edict()
config.output = None
config.num_classes = 3
