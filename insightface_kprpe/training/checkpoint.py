"""Training checkpoints that are complete or absent, from which any number of ranks can resume.

``checkpoints/`` in the run's folder holds

- ``step_00001234/``: one checkpoint. Its tensors are written through ``torch.distributed.checkpoint``: what all ranks
  have in common once, class centers and their moments as shards of one tensor; ``run.pt`` holds the rest. It is written
  under another name and renamed when every rank has finished, so a folder of that name is always complete;
- ``latest``: the name of the checkpoint to resume from;
- ``best``: the name of the one that scored best when it was validated;
- ``scores.json``: validation scores by step.

All ranks must see the same folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..distributed import rank_and_world_size
from ..files import sync_folder, write_atomically
from . import arcface_torch_checkpoint
from .checkpoint_files import (
    SCORES,
    checkpoint_number,
    latest_checkpoint,
    list_checkpoints,
    pointed_checkpoint,
    read_scores,
    read_values,
    save_model,
)
from .random_state import random_state, seed_everything, seed_from, set_random_state
from .run_folder import writing
from .sharded_tensors import read_tensors, stage, stored_bytes, write_tensors
from .state import Schedule, TrainingState

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves the checkpoints of a run, removes old ones, and restores the latest.

    Args:
        output: the run's folder.
        keep: number of newest checkpoints to keep, besides the best one.
        every: optimizer steps between checkpoints, besides one at the end of every epoch; 0: no others.
        asynchronous: write in the background while training continues, from a copy in main memory; one at a time.

    Attributes:
        scores: validation scores by step; None if there was no number. Only on rank 0.
    """

    def __init__(self, output: str | Path, keep: int = 2, every: int = 0, asynchronous: bool = False) -> None:
        self.output, self.root = Path(output), Path(output) / "checkpoints"
        self.keep, self.every, self.asynchronous = keep, every, asynchronous
        self.scores: dict[int, float | None] = {}
        self.rank, self.world_size = rank_and_world_size()
        # The background's messages must not mix with those of training.
        self.group = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self._writing: _Background | None = None

    def due(self, step: int, schedule: Schedule) -> bool:
        """Whether to save after this step, whatever else asks for it."""
        often = self.every > 0 and step % self.every == 0
        return often or step % schedule.steps_per_epoch == 0 or step == schedule.total_steps

    def save(self, step: int, state: TrainingState, schedule: Schedule) -> None:
        """Save after ``step`` optimizer steps; call it on every rank.

        Args:
            step: optimizer steps done.
            state: what to save; may change as soon as the call returns.
            schedule: how long the run is.

        Raises:
            TrainingError: it could not be written, or the previous one, in the background.
        """
        self.wait()
        if self.rank == 0:
            self._clear()
        tensors = stage(state.tensors(), state.sharded(), self.group)
        values = {
            "step": step,
            "steps_per_epoch": schedule.steps_per_epoch,
            "random": self._of_all_ranks(random_state()),  # no rank gets past this before rank 0 has cleaned up
            **state.values(),
        }
        size = stored_bytes(state.tensors(), state.sharded())

        def write() -> None:
            last = latest_checkpoint(self.output)
            whole = f"{last} is complete: free some space and continue with resume=True"
            hint = whole if last else "there is no earlier one; free some space, or choose another output"
            with writing(f"the checkpoint of step {step}", self.root, size, hint):
                self._write(step, tensors, values)

        if self.asynchronous:
            self._writing = _Background(write)
        else:
            write()

    def add_score(self, step: int, state: TrainingState, schedule: Schedule, score: float | None) -> None:
        """Record the validation score of the checkpoint of this step, and keep it if it is the best; on rank 0.

        Call after :meth:`wait`.

        Args:
            step: optimizer steps done. Scores of what was not saved, such as a network before its first step, are not
                recorded.
            state: as it was saved.
            schedule: how long the run is.
            score: higher is better; None: no number.

        Raises:
            TrainingError: the files could not be written.
        """
        folder = latest_checkpoint(self.output)
        if folder is None or checkpoint_number(folder)[0] != step:
            return
        others = [other for at, other in self.scores.items() if other is not None and at != step]
        score = score if score is not None and math.isfinite(score) else None
        best = score is not None and all(score > other for other in others)
        scores = {**self.scores, step: score}
        with writing("the best checkpoint", self.output):
            if best:
                save_model(self.output / "best_model.pt", state.model.state_dict())
                write_atomically(self.root / "best", f"{folder.name}\n".encode())
                self._remove_old(folder)  # the best so far no longer is
            # Last: a run that is killed before it validates again, to the same end.
            content = {"steps_per_epoch": schedule.steps_per_epoch, "scores": scores}
            write_atomically(self.root / SCORES, (json.dumps(content) + "\n").encode())
        self.scores = scores

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        if self._writing is not None and self._writing.error is not None:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written; raises what went wrong in the background."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def start(self, state: TrainingState, schedule: Schedule, resume: bool) -> int:
        """Restore the latest checkpoint, or start over; returns the optimizer steps done."""
        if self.rank == 0:
            self._clear()
        return self.resume(state, schedule) if resume else 0

    def resume(self, state: TrainingState, schedule: Schedule) -> int:
        """Restore the latest checkpoint, or else that of arcface_torch; returns the optimizer steps done.

        With as many ranks as wrote it, the run continues bit for bit; otherwise with the same weights, moments and
        images, but other random numbers. If a step takes more or fewer images than before, the run continues at the
        step that has seen as many.

        Raises:
            ValueError: the checkpoint is damaged, or of another network or optimizer.
        """
        folder = latest_checkpoint(self.output)
        if folder is None and (files := arcface_torch_checkpoint.find(self.output)):
            return arcface_torch_checkpoint.resume(files, state, schedule)
        if folder is None:
            aside = sorted(path.name for path in self.output.glob("checkpoints.old*"))
            hint = f"; those of earlier runs are in its {', '.join(aside)}" if aside else ""
            logger.info("no checkpoint in %s yet, starting from scratch%s", self.output, hint)
            return 0
        values = read_values(folder)
        if values["optimizer"] != type(state.optimizer).__name__:
            raise ValueError(
                f"{folder} was written with optimizer {values['optimizer']}, this run has "
                f"{type(state.optimizer).__name__}; use the same one, or start a new run with init_from"
            )
        tensors = read_tensors(folder, state.tensors(), state.sharded(), state.optimized(), self.group)
        try:
            state.restore(tensors, values)
            if len(values["random"]) == self.world_size:
                set_random_state(values["random"][self.rank])
        except Exception as error:
            raise ValueError(f"{folder} is damaged ({error}); remove it to resume from an older one") from error
        step = values["step"]
        logger.info("resumed from %s", folder)
        if values["steps_per_epoch"] != schedule.steps_per_epoch:
            step = schedule.step_after(step, values["steps_per_epoch"])
            logger.warning(
                "an epoch had %d steps and now has %d: step %d continues as step %d",
                values["steps_per_epoch"], schedule.steps_per_epoch, values["step"], step,
            )  # fmt: skip
        state.go_to(step)
        self.scores = read_scores(self.root / SCORES, schedule, step)
        if len(values["random"]) != self.world_size:
            logger.info("saved by %d ranks, resumed on %d", len(values["random"]), self.world_size)
            seed_everything(seed_from(torch.initial_seed(), step, self.rank))
        return step

    def _clear(self) -> None:
        """Remove what a kill left incomplete."""
        for leftover in self.root.glob("pending_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in [*self.root.glob(".*.tmp"), *self.output.glob(".*.tmp")]:
            leftover.unlink(missing_ok=True)

    def _of_all_ranks(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, self.group)
        return values

    def _write(self, step: int, tensors: dict[str, Any], values: dict[str, Any]) -> None:
        pending = self.root / f"pending_{step:08d}"
        try:
            write_tensors(pending, tensors, self.group)
            if self.rank == 0:
                with open(pending / "run.pt", "wb") as file:
                    torch.save(values, file)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(pending)
                # Before the checkpoint: a run that is killed here writes it again, but not one that is at its end.
                model = {key[len("model.") :]: value for key, value in tensors.items() if key.startswith("model.")}
                save_model(self.output / "model.pt", model)
                self._publish(pending, step)
        except BaseException:
            shutil.rmtree(pending, ignore_errors=True)
            raise
        if self.group is not None:
            dist.barrier(self.group)

    def _publish(self, pending: Path, step: int) -> None:
        folder, attempt = self.root / f"step_{step:08d}", 0
        while folder.exists():  # of an earlier attempt, and perhaps what `latest` names: leave it until later
            attempt += 1
            folder = self.root / f"step_{step:08d}.{attempt}"
        os.replace(pending, folder)
        sync_folder(self.root)
        write_atomically(self.root / "latest", f"{folder.name}\n".encode())
        self._remove_old(folder)

    def _remove_old(self, latest: Path) -> None:
        """Remove what is too old, and left-overs of this and later steps from an earlier attempt."""
        folders = list_checkpoints(self.output)
        done = [folder for folder in folders if checkpoint_number(folder)[0] < checkpoint_number(latest)[0]]
        kept = {latest, pointed_checkpoint(self.root, "best"), *(done[1 - self.keep :] if self.keep > 1 else [])}
        for folder in folders:
            if folder not in kept:
                trash = self.root / f"pending_removal_of_{folder.name}"
                os.replace(folder, trash)  # a kill must not leave a partial folder under its name
                shutil.rmtree(trash, ignore_errors=True)


class _Background:
    """Runs a function in a thread that does not keep the process alive."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(function,), name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self, function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            self.error = error

    def result(self) -> None:
        self.thread.join()
        if self.error is not None:
            raise self.error
