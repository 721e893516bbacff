from easydict import EasyDict as edict

config = edict()
config.margin_list = (1.0, 0.5, 0.0)
config.interclass_filtering_threshold = 0
config.network = "tiny"
config.resume = False
config.output = "base_output"
config.embedding_size = 16
config.sample_rate = 1
config.fp16 = False
config.batch_size = 4
config.lr = 0.01
config.weight_decay = 5e-4
config.num_epoch = 1
config.seed = 1
config.val_targets = []
