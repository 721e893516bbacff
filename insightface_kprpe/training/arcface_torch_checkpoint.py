"""arcface_torch's own checkpoints, ``checkpoint_gpu_R.pt`` of every rank R, read on any number of ranks.

Each holds the whole backbone, the class centers of its rank, and the optimizer's moments of both, by number:
the backbone's parameters in the order of its state dict, then the centers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..partial_fc import PartialFC
from ..state_dict import check_plain, load_torch_file, load_weights, strip_prefixes
from .state import Schedule, TrainingState

logger = logging.getLogger(__name__)

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_STATES = ("state_dict_softmax_fc", "state_optimizer")
_MOMENTS = {"AdamW": {"exp_avg", "exp_avg_sq", "step"}, "SGD": {"momentum_buffer"}}


def find(folder: str | Path) -> list[Path]:
    """The checkpoint files in a folder, one per rank; an empty list if there are none.

    Raises:
        ValueError: one is missing.
    """
    found = {path.name for path in Path(folder).glob("checkpoint_gpu_*.pt")}
    names = [f"checkpoint_gpu_{rank}.pt" for rank in range(len(found))]
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{folder} has {len(found)} checkpoint_gpu_*.pt but no {missing[0]}; copy those of all ranks")
    return [Path(folder) / name for name in names]


def backbone_weights(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The backbone's state dict."""
    return strip_prefixes(_read(files[0])["state_dict_backbone"])


def load_centers(files: Sequence[Path], partial_fc: PartialFC) -> bool:
    """Copy this rank's class centers, and AdaFace's statistics; False if people or embedding size differ."""
    states = [_read(file)["state_dict_softmax_fc"] for file in files]
    parts = [_centers_of(state) for state in states]
    size = (sum(len(part) for part in parts), parts[0].shape[1])
    if size != (partial_fc.num_classes, partial_fc.class_centers.shape[1]):
        return False
    with torch.no_grad():
        partial_fc.class_centers.copy_(_rows(parts, partial_fc.first_class, partial_fc.num_local))
        for name, buffer in partial_fc.named_buffers():
            if name in states[0]:
                buffer.copy_(states[0][name])
    return True


def resume(files: Sequence[Path], state: TrainingState, schedule: Schedule) -> int:
    """Continue a run of arcface_torch after its last complete epoch; returns the optimizer steps done.

    Args:
        files: what :func:`find` returned.
        state: of a backbone that both support, PartialFC and an optimizer of the same kind.
        schedule: how long the run is.

    Raises:
        ValueError: a file is damaged or of another network, number of people or optimizer.
    """
    shards = [_read(file) for file in files]
    weights = strip_prefixes(shards[0]["state_dict_backbone"])
    load_weights(state.model, weights)
    if not load_centers(files, state.loss):
        raise ValueError(
            f"{files[0].parent} does not have {state.loss.num_classes} class centers of size "
            f"{state.loss.class_centers.shape[1]}; set num_classes and embedding_size to match it, or use init_from"
        )
    names = [f"model.{name}" for name in weights if name.rpartition(".")[2] not in _BUFFERS]
    state.restore_moments(_moments(shards, names, state))
    step = shards[0]["epoch"] * schedule.steps_per_epoch
    state.go_to(step)
    logger.info("resumed from arcface_torch's checkpoint of %d ranks in %s", len(files), files[0].parent)
    return step


def _moments(shards: Sequence[dict[str, Any]], names: Sequence[str], state: TrainingState) -> dict[str, torch.Tensor]:
    """Moments by the names that :meth:`TrainingState.tensors` gives them; the centers' are this rank's rows."""
    kind = type(state.optimizer).__name__
    moments = [shard["state_optimizer"].get("state", {}) for shard in shards]
    if any(not _MOMENTS[kind] >= set(values) for values in moments[0].values()):
        raise ValueError(f'the checkpoint was not written with optimizer {kind}; set optimizer to "sgd" or "adamw"')
    tensors = {}
    for index, name in enumerate([*names, "loss.class_centers"]):
        for moment, value in moments[0].get(index, {}).items():
            if value is None or name not in state.optimized():
                continue
            if name == "loss.class_centers" and moment != "step":
                value = _rows([part[index][moment] for part in moments], state.loss.first_class, state.loss.num_local)
            tensors[f"optimizer.{name}.{moment}"] = torch.as_tensor(value, dtype=torch.float32)
    return tensors


def _rows(parts: Sequence[torch.Tensor], first: int, count: int) -> torch.Tensor:
    """Rows of the concatenation of tensors, of which only the needed ones are read."""
    pieces, start = [], 0
    for part in parts:
        pieces.append(part[max(0, first - start) : max(0, first + count - start)])
        start += len(part)
    return torch.cat(pieces)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = load_torch_file(file, mmap=True)
    except Exception as error:
        raise ValueError(f"{file} could not be read as a checkpoint of arcface_torch; is it damaged?") from error
    if not isinstance(content, dict) or not {"state_dict_backbone", *_STATES, "epoch"} <= set(content):
        raise ValueError(
            f"{file} is no checkpoint of arcface_torch: it must hold state_dict_backbone and the other states"
        )
    backbone, centers, optimizer = (content[key] for key in ("state_dict_backbone", *_STATES))
    if not _holds_tensors(backbone) or not _holds_tensors(centers) or _centers_of(centers) is None:
        raise ValueError(f"{file}: state_dict_backbone and state_dict_softmax_fc must hold tensors, with class centers")
    moments = optimizer.get("state", {}) if isinstance(optimizer, dict) else None
    if not isinstance(moments, dict) or not all(isinstance(values, dict) for values in moments.values()):
        raise ValueError(f"{file}: state_optimizer must hold the moments of each parameter")
    if not isinstance(content["epoch"], int) or content["epoch"] < 0:
        raise ValueError(f"{file}: epoch must be a whole number from 0, got {content['epoch']!r:.40}")
    check_plain(backbone, file)
    check_plain(centers, file)
    return content


def _holds_tensors(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())


def _centers_of(state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Written by arcface_torch's own PartialFC, or by this package's, which its scripts use for AdaFace."""
    centers = state.get("weight", state.get("class_centers"))
    return centers if centers is not None and centers.ndim == 2 else None
