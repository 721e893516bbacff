"""Every key that a config may set, its default, meaning and unit. A config file states only what differs.

A config is a Python file with ``config = edict()``, as in arcface_torch, whose files work here unchanged. It is code
that runs: read someone else's before you use it. Values on the command line win: ``train_v2.py CONFIG lr=0.0005
val_targets="('lfw',)"``.
"""

from easydict import EasyDict as edict

config = edict()

# --- data -----------------------------------------------------------------------------------------------------------
config.rec = "synthetic"  # folder with train.rec and train.idx | folder of people's folders of images | "synthetic"
config.num_classes = 0  # number of people; 0: count them in the data
config.num_image = 0  # images; synthetic data draws this many, other data is counted
config.num_workers = 2  # reader processes per rank
config.max_bad_images = 0.001  # unreadable images are skipped; above this fraction of them the run stops
config.val_targets = ()  # names of .bin sets in the folder of `rec`, paths of .bin files, or "synthetic"
config.verify_at_start = False  # also verify before the first step

# --- augmentation (mirroring is always on) ---------------------------------------------------------------------------
config.augment = {}  # "paper": the paper's recipe | {}: only mirroring | arguments of data.augmentation.Augmentation,
# e.g. {"rotation": 20.0 (degrees), "scale": 0.2, "translation": 0.1 (of the side), "probability": 0.2}
config.repeated_augmentation = (
    0.0  # probability that an image is replaced by another one of the previous image's person
)

# --- network --------------------------------------------------------------------------------------------------------
config.network = "vit_b_kprpe"  # a name of insightface_kprpe.list_models()
config.network_kwargs = {}  # passed to it, e.g. {"drop_path_rate": 0.1, "mask_ratio": 0.1, "num_keypoints": 3}
config.embedding_size = 512
config.init_from = None  # weights to start from (fine-tuning): a .pt or .safetensors file, a run's folder, or one with
# arcface_torch's checkpoint_gpu_*.pt; None: random. `resume` continues a run instead, and takes precedence if it finds
# one
config.init_min_match = 0.9  # minimum fraction of the network's tensors that init_from must match, in [0, 1]
config.gradient_checkpointing = False  # less memory, about a third more time

# --- loss -----------------------------------------------------------------------------------------------------------
config.loss = "margin"  # "margin": ArcFace or CosFace, by margin_list | "adaface"
config.margin_list = (1.0, 0.5, 0.0)  # (1, m2, 0): ArcFace with angle m2 in radians | (1, 0, m3): CosFace
config.logit_scale = (
    64.0  # s of every margin; a few thousand people need less (24): with 64 they teach nothing at first
)
config.interclass_filtering_threshold = 0.0  # cosine above which another class is taken for label noise; 0: off
config.adaface_m = 0.4  # margin
config.adaface_h = 0.333  # how strongly the margin follows quality
config.adaface_t_alpha = 0.01  # weight of the newest batch in the norm statistics
config.sample_rate = 1.0  # PartialFC: fraction of the class centers used in a step, in (0, 1]

# --- optimization ---------------------------------------------------------------------------------------------------
config.batch_size = 128  # images per rank and forward pass; at least 2, as the head normalizes over them
config.gradient_acc = 1  # batches per optimizer step, which takes batch_size * ranks * gradient_acc images as one batch
config.optimizer = "adamw"  # "adamw" | "sgd"
config.lr = 0.001  # peak learning rate
# KPRPE's and iRPE's tables learn this many times as fast; 1: as published. They start at zero and AdamW moves a weight
# by about lr per step, so short runs need more: see docs/does_kprpe_help.md
config.position_lr_scale = 1.0
config.momentum = 0.9  # SGD only
config.weight_decay = 0.05
config.scheduler = "polynomial"  # after warm-up: "polynomial" (linear to 0) | "cosine" | "step"
config.decay_epochs = ()  # scheduler "step": the rate is divided by 10 at each, e.g. (10, 16, 22)
config.num_epoch = 20
config.warmup_epoch = 0.0  # epochs of linear warm-up
config.clip_grad = 5.0  # largest gradient norm of the backbone
config.fp16 = False  # arcface_torch's way to ask for precision = "fp16"
config.precision = None  # "fp32" | "fp16" (with loss scaling) | "bf16"; None: by fp16
config.compile = False  # torch.compile the network: minutes at the start, faster steps
config.gradient_compression = None  # "bf16": ranks exchange gradients in half precision | None: in float32
config.seed = 2048

# --- run ------------------------------------------------------------------------------------------------------------
config.output = None  # folder for logs, checkpoints and model.pt; None: work_dirs/<name of the config file>
config.resume = False  # continue from the latest checkpoint in output, if there is one, on any number of ranks
config.save_every = 0  # steps between checkpoints; 0: only at the end of epochs and before validations, as always
config.keep_checkpoints = 2  # number of newest checkpoints to keep, besides the best
config.async_save = False  # write checkpoints in the background, from a copy of all states in main memory
config.frequent = 10  # optimizer steps between log lines
config.verbose = 2000  # optimizer steps between verifications (there is always one at the end)
config.tensorboard = False  # also write TensorBoard events (extra "tensorboard")
config.using_wandb = False  # also log to Weights & Biases (extra "wandb"), as rank 0
config.wandb_key = None  # API key; better in the environment, as WANDB_API_KEY. Never written to output
config.wandb_entity = None  # team or user
config.wandb_project = None
config.wandb_resume = False  # continue the wandb run of output; resume = True does so too
config.suffix_run_name = None  # the wandb run is named after the folder output, and this
config.notes = None  # about the run, for wandb
config.save_artifacts = False  # upload model.pt to wandb at the end

# --- keys of arcface_torch's configs that are accepted and have no effect here ---------------------------------------
config.save_all_states = True  # every checkpoint holds all states
config.dali = False
config.dali_aug = False
config.wandb_log_all = True  # rank 0 logs the numbers of all ranks
