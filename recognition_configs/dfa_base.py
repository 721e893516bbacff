"""Every key of a config that trains the Differentiable Face Aligner (DFA), its default, meaning and unit.

A config file states only what differs. Values on the command line win:
``insightface-kprpe train-dfa CONFIG data=/data/widerface/train batch_size=64``.
"""

from easydict import EasyDict as edict

config = edict()

# --- data -----------------------------------------------------------------------------------------------------------
config.data = "widerface/train"  # folder with label.txt in RetinaFace's format and its images, or that file
config.val = None  # the same, to measure the landmark error on while training; None: not measured
config.padding = 0.1  # added around a face's box on every side, as a fraction of its longer side
config.num_workers = 2  # reader processes per rank

# --- network --------------------------------------------------------------------------------------------------------
config.body = "mobilenet0.25"  # "mobilenet0.25" | "resnet50"
config.aggregator = True  # weight the anchors with the Mixer (DFA); False: use the best-scoring anchor (RetinaFace)
config.image_size = 160  # side of the face crops, pixels
config.init_from = None  # weights to start from: RetinaFace's public ones, or a DFA (file or run folder); None: random

# --- loss and augmentation ------------------------------------------------------------------------------------------
config.loss_kwargs = {}  # arguments of insightface_kprpe.dfa.DFALoss that differ from its defaults
config.augmentation_kwargs = {}  # the same of insightface_kprpe.data.landmark_augmentation.LandmarkAugmentation

# --- optimization ---------------------------------------------------------------------------------------------------
config.batch_size = 32  # faces per rank and step; the step's batch is batch_size * ranks
config.optimizer = "adamw"  # "adamw" | "sgd"
config.lr = 0.001  # peak learning rate
config.momentum = 0.9  # SGD only
config.weight_decay = 0.01
config.scheduler = "cosine"  # after warm-up: "polynomial" (linear to 0) | "cosine" | "step"
config.decay_epochs = ()  # scheduler "step": the rate is divided by 10 at each, e.g. (500, 650)
config.num_epoch = 20
config.warmup_epoch = 0.0  # epochs of linear warm-up
config.clip_grad = 5.0  # largest gradient norm
config.precision = "fp32"  # "fp32" | "fp16" (with loss scaling) | "bf16"
config.seed = 2048

# --- run ------------------------------------------------------------------------------------------------------------
config.output = None  # folder for logs, checkpoints and model.pt; None: work_dirs/<name of the config file>
config.resume = False  # continue from the latest checkpoint in output, if there is one, on any number of ranks
config.save_every = 0  # steps between checkpoints; 0: only at the end of epochs and before validations, as always
config.keep_checkpoints = 2  # number of newest checkpoints to keep, besides the best
config.async_save = False  # write checkpoints in the background, from a copy of all states in main memory
config.frequent = 10  # steps between log lines
config.verbose = 1000  # steps between validations (there is always one at the end)
config.tensorboard = False  # also write TensorBoard events (extra "tensorboard")
