"""Training checkpoints that are whole or absent, and an exact way back to the step they were taken at.

``checkpoints/step_00001234/`` holds one ``rank_R.pt`` a rank. It is written under another name and renamed when every
rank has finished, so a folder of that name is always complete.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..files import atomic_path, sync_folder
from ..partial_fc import rank_and_world_size

logger = logging.getLogger(__name__)

_FOLDER = re.compile(r"step_(\d{8,})")


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def save_checkpoint(output: str | Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write this rank's state; publish the checkpoint when all ranks have written theirs.

    Args:
        output: the run's folder.
        step: optimizer steps done.
        state: tensors and plain python values only (it is read back with ``weights_only=True``).
        keep: how many newest checkpoints to leave.

    Returns:
        The checkpoint's folder.
    """
    rank, world_size = rank_and_world_size()
    root = Path(output) / "checkpoints"
    folder, pending = root / f"step_{step:08d}", root / f"pending_{step:08d}"
    if rank == 0:
        for leftover in root.glob("pending_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        pending.mkdir(parents=True)
    barrier()
    with open(pending / f"rank_{rank}.pt", "wb") as file:
        torch.save({**state, "world_size": world_size, "random": _random_state()}, file)
        file.flush()
        os.fsync(file.fileno())
    barrier()
    if rank == 0:
        if folder.exists():  # saved at this very step before: the new one is the same
            shutil.rmtree(folder)
        os.replace(pending, folder)
        sync_folder(root)
        for old in list_checkpoints(output)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return folder


def list_checkpoints(output: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in (Path(output) / "checkpoints").glob("step_*") if _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name[len("step_") :]))


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Read this rank's state and set the random number generators to what they were.

    Raises:
        ValueError: the checkpoint was written by another number of ranks, or is damaged.
    """
    rank, world_size = rank_and_world_size()
    folder = Path(folder)
    written = len(list(folder.glob("rank_*.pt")))
    if written != world_size:
        raise ValueError(f"{folder} was written by {written} ranks, this run has {world_size}; start as many")
    try:
        state = torch.load(folder / f"rank_{rank}.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{folder}/rank_{rank}.pt is damaged; remove {folder} to resume from an older one") from error
    _set_random_state(state.pop("random"))
    return state


def save_model(path: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Write a backbone's weights as arcface_torch's ``model.pt``: a plain state dict, on CPU."""
    with atomic_path(path) as temporary:
        torch.save({key: value.detach().cpu() for key, value in state_dict.items()}, temporary)


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the one that data sets may use
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
