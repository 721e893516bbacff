"""The files of a run's checkpoints: their names, the small ones that point to them, and room for a new run."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch

from ..documents import read_json_object
from ..files import atomic_path
from ..state_dict import load_torch_file
from .run_folder import METRICS, NEW_RUN
from .state import Schedule

logger = logging.getLogger(__name__)

SCORES = "scores.json"
_FOLDER = re.compile(r"step_(\d{8,})(?:\.(\d+))?")


def list_checkpoints(output: str | Path) -> list[Path]:
    """Complete checkpoints of a run, by their step."""
    folders = [path for path in (Path(output) / "checkpoints").glob("step_*") if _FOLDER.fullmatch(path.name)]
    return sorted(folders, key=checkpoint_number)


def latest_checkpoint(output: str | Path) -> Path | None:
    """The checkpoint to resume from, or None if there is none yet."""
    named = pointed_checkpoint(Path(output) / "checkpoints", "latest")
    if named is not None:
        return named
    folders = list_checkpoints(output)
    return folders[-1] if folders else None


def put_aside(output: str | Path) -> None:
    """Make room for a new run: those of an older run become ``checkpoints.old`` (``.old.1``, ...)."""
    output = Path(output)
    if list_checkpoints(output):
        root = output / "checkpoints"
        aside, number = root.with_suffix(".old"), 0
        while aside.exists():
            number += 1
            aside = root.with_suffix(f".old.{number}")
        if (output / METRICS).is_file():
            os.replace(output / METRICS, root / METRICS)
        os.replace(root, aside)
        logger.warning(
            "moved the checkpoints and metrics of an earlier run to %s; use resume=True to continue a run; they may be "
            "removed",
            aside,
        )
    (output / NEW_RUN).unlink(missing_ok=True)


def save_model(path: str | Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Write a backbone's weights as arcface_torch's ``model.pt``: a plain state dict, on CPU."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:  # torch would name its content by its file name
        torch.save({key: value.detach().cpu().contiguous() for key, value in state_dict.items()}, file)


def checkpoint_number(folder: Path) -> tuple[int, int]:
    """Step of a checkpoint, and how many times the step was done before."""
    step, attempt = _FOLDER.fullmatch(folder.name).groups()
    return int(step), int(attempt or 0)


def pointed_checkpoint(root: Path, pointer: str) -> Path | None:
    """The checkpoint that a pointer file names, if both exist."""
    path = root / pointer
    name = path.read_text(errors="replace").strip() if path.is_file() else ""
    return root / name if _FOLDER.fullmatch(name) and (root / name).is_dir() else None


def read_scores(path: Path, schedule: Schedule, last: int) -> dict[int, float | None]:
    """Validation scores up to a step, by the steps of this schedule."""
    if not path.is_file():
        return {}
    try:
        content = read_json_object(path)
        steps_per_epoch, scores = int(content["steps_per_epoch"]), {}
        for key, score in content["scores"].items():
            step = schedule.step_after(int(key), steps_per_epoch)
            if step <= last:
                scores[step] = None if score is None else float(score)
        return scores
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        logger.warning("%s cannot be read (%s); looking for the best checkpoint again", path, error)
        return {}


def read_values(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint besides tensors.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        values = load_torch_file(folder / "run.pt")
        steps = [values[key] for key in ("step", "steps_per_epoch")]
        sound = all(isinstance(step, int) and step > 0 for step in steps) and isinstance(values["random"], list)
        if sound and isinstance(values["optimizer"], str) and isinstance(values["scaler"], dict):
            return values
        raise ValueError("entries are missing or of another kind")
    except Exception as error:
        raise ValueError(f"{folder}/run.pt is damaged; remove {folder} to resume from an older one") from error
