"""The paper's training recipe (Table 6 of its supplement) for every data set, network and loss, by name.

``load_config("wf42m_vit_b_irpe_cosface")`` needs no file: the name consists of the data set, the network, and the loss
if it is not AdaFace. Files of such names in ``recognition_configs/`` are rows of the paper's tables.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from easydict import EasyDict as edict


class DataSet(NamedTuple):
    """A public training set.

    Attributes:
        rec: the usual name of its folder.
        num_classes: people.
        num_image: images.
    """

    rec: str
    num_classes: int
    num_image: int


DATASETS = {
    "wf4m": DataSet("WebFace4M", 205990, 4235242),
    "wf12m": DataSet("WebFace12M", 617970, 12720066),
    "wf42m": DataSet("WebFace42M", 2059906, 42474557),
    "ms1mv2": DataSet("faces_emore", 85742, 5822653),
    "ms1mv3": DataSet("ms1m-retinaface-t1", 93431, 5179510),
}
POSITIONS = ("", "_irpe", "_kprpe")
LOSSES = {
    "adaface": {"loss": "adaface", "adaface_m": 0.4, "adaface_h": 0.333},
    "arcface": {"loss": "margin", "margin_list": (1.0, 0.5, 0.0)},
    "cosface": {"loss": "margin", "margin_list": (1.0, 0.0, 0.4)},
}

_REGULAR = {"drop_path_rate": 0.1, "mask_ratio": 0.1}
# The ablation column is for ViT-S (batch 512: 4 GPUs), the large-scale column for ViT-B and ViT-L (1024: 8 GPUs).
_ABLATION = {"lr": 0.001, "num_epoch": 34, "sample_rate": 1.0, "repeated_augmentation": 0.5}
_LARGE_SCALE = {"lr": 0.0001, "num_epoch": 36, "sample_rate": 0.6, "repeated_augmentation": 0.1}
_NETWORKS = {
    "vit_s": {"network": "vit_s", "network_kwargs": _REGULAR, **_ABLATION},
    # the size of the published KPRPE weights; arcface_torch's vit_b differs in its patches and heads
    "vit_b": {"network": "cvlface_vit_b", "network_kwargs": _REGULAR, **_LARGE_SCALE},
    "vit_l": {
        "network": "vit_l",
        "network_kwargs": {"drop_path_rate": 0.05, "mask_ratio": 0.05},
        "gradient_checkpointing": True,
        **_LARGE_SCALE,
    },
}
_COMMON = {
    "val_targets": ("lfw", "cfp_fp", "agedb_30"),
    "augment": "paper",
    "batch_size": 128,
    "optimizer": "adamw",
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "scheduler": "cosine",
    "warmup_epoch": 3.0,
    "precision": "bf16",
    "num_workers": 8,
}


def paper(dataset: str, network: str, loss: str = "adaface", **changes: Any) -> edict:
    """The config of one run.

    Args:
        dataset: a key of ``DATASETS``.
        network: "vit_s", "vit_b" or "vit_l", with "_irpe", "_kprpe" or no suffix.
        loss: a key of ``LOSSES``.
        changes: keys that differ.

    Returns:
        Keys that differ from ``base.py``.

    Raises:
        ValueError: an unknown name.
    """
    size, position = network[:5], network[5:]
    known = (dataset, DATASETS), (size, _NETWORKS), (position, POSITIONS), (loss, LOSSES)
    for name, names in known:
        if name not in names:
            raise ValueError(f"a recipe name must be composed of {', '.join(filter(None, names))}; got {name!r}")
    values = {**_COMMON, **DATASETS[dataset]._asdict(), **_NETWORKS[size], **LOSSES[loss]}
    values["network"] += position
    return edict({**values, **changes})


def names() -> list[str]:
    """All names of :func:`by_name`."""
    networks = [size + position for size in _NETWORKS for position in POSITIONS]
    ends = ["" if loss == "adaface" else f"_{loss}" for loss in LOSSES]
    return [f"{dataset}_{network}{end}" for dataset in DATASETS for network in networks for end in ends]


def by_name(name: str) -> edict | None:
    """The recipe of a name such as "wf4m_vit_l_kprpe" or "ms1mv2_vit_s_arcface"; None if it is not one."""
    if name not in names():
        return None
    dataset, _, network = name.partition("_")
    stem, _, last = network.rpartition("_")
    return paper(dataset, stem, last) if last in LOSSES else paper(dataset, network)
