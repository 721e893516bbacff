"""The start of fine-tuning: weights of another network, as far as they fit, and a report on what did not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from ..hub import local_source
from ..partial_fc import PartialFC
from ..state_dict import ALIGNER_PREFIX, check_finite, read_state_dict, strip_prefixes
from ..weights.sources import locate_weights
from . import arcface_torch_checkpoint
from .checkpoint_files import latest_checkpoint
from .sharded_tensors import read_fitting_tensors

logger = logging.getLogger(__name__)


class Match(NamedTuple):
    """How a network and a file compare, by the names of their tensors.

    Attributes:
        matched: in both, and loaded.
        missing: of the network, not in the file.
        mismatched: in both, of other shapes.
        unused: of the file, not in the network.
    """

    matched: list[str]
    missing: list[str]
    mismatched: list[str]
    unused: list[str]

    @property
    def fraction(self) -> float:
        """Fraction of the network's tensors that were loaded, in [0, 1]."""
        return len(self.matched) / max(1, len(self.matched) + len(self.missing) + len(self.mismatched))

    def __str__(self) -> str:
        total = len(self.matched) + len(self.missing) + len(self.mismatched)
        parts = [f"{len(self.matched)} of {total} tensors match"]
        for kind in ("missing", "mismatched", "unused"):
            names = getattr(self, kind)
            if names:
                parts.append(f"{len(names)} {kind}: {_shown(names)}")
        return "; ".join(parts)


def initialize(
    backbone: nn.Module,
    partial_fc: PartialFC,
    source: str | Path,
    min_match: float = 0.9,
    group: dist.ProcessGroup | None = None,
) -> Match:
    """Start a run from other weights.

    Args:
        backbone: loads every tensor of the file that has its name and shape.
        partial_fc: loads the class centers of a run or of arcface_torch's checkpoints, if the number of people and the
            embedding size agree.
        source: a weights file, the output folder of a run or another folder with weights, also on the Hub
            ("hf:owner/name[/path][@revision]"); or a folder of arcface_torch's ``checkpoint_gpu_*.pt``.
        min_match: least fraction of the backbone's tensors that must match, in [0, 1].
        group: of all ranks, on CPU, each of which calls this; None: this process is the only one.

    Returns:
        What matched.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError, RuntimeError: it is on the Hub, and huggingface_hub is not installed, or the download failed.
        ValueError: the file cannot be read, holds NaN, or too little of it fits; the backbone is then unchanged.
    """
    path = local_source(source)
    checkpoint = arcface_torch_checkpoint.find(path)
    if checkpoint:
        state = arcface_torch_checkpoint.backbone_weights(checkpoint)
    else:
        state = strip_prefixes(read_state_dict(locate_weights(path)[1]))
    check_finite(state, f"init_from {source}")
    match = compare(backbone, state)
    logger.info("init_from %s: %s", source, match)
    if match.fraction < min_match:
        raise ValueError(
            f"init_from must fit at least {min_match:.0%} of the network, {source} fits {match.fraction:.0%} "
            f"({match}); choose the network of that file, or lower init_min_match"
        )
    backbone.load_state_dict({key: state[key] for key in match.matched}, strict=False)
    run = latest_checkpoint(path) if path.is_dir() and not checkpoint else None
    if checkpoint:
        same_people = arcface_torch_checkpoint.load_centers(checkpoint, partial_fc)
    elif run is not None:
        same_people = _load_centers(run, partial_fc, group)
    else:
        return match
    if same_people:
        logger.info("init_from %s: its %d class centers are used too", source, partial_fc.num_classes)
    else:
        logger.info("init_from %s: its class centers are of other people; these start from scratch", source)
    return match


def _load_centers(checkpoint: Path, partial_fc: PartialFC, group: dist.ProcessGroup | None) -> bool:
    """Copy this rank's class centers, and AdaFace's statistics; False if people or embedding size differ."""
    wanted = {f"loss.{key}": value for key, value in partial_fc.state_dict().items()}
    rows = {f"loss.{key}": value for key, value in partial_fc.sharded().items()}
    found = read_fitting_tensors(checkpoint, wanted, rows, group)
    if not set(rows) <= set(found):
        return False
    with torch.no_grad():
        for key, tensor in found.items():
            wanted[key].copy_(tensor)
    return True


def compare(net: nn.Module, state: Mapping[str, torch.Tensor]) -> Match:
    """How weights fit a network. An aligner that they lack completely is not counted as missing."""
    wanted = net.state_dict()
    if not any(key.startswith(ALIGNER_PREFIX) for key in state):
        wanted = {key: value for key, value in wanted.items() if not key.startswith(ALIGNER_PREFIX)}
    common = [key for key in wanted if key in state]
    return Match(
        [key for key in common if state[key].shape == wanted[key].shape],
        [key for key in wanted if key not in state],
        [
            f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
            for key in common
            if state[key].shape != wanted[key].shape
        ],
        [key for key in state if key not in wanted],
    )


def _shown(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
