"""Numbers of a run: the file of metrics, TensorBoard and Weights & Biases, and the progress line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from easydict import EasyDict as edict

from ..distributed import rank_and_world_size
from ..documents import json_lines
from ..files import write_atomically
from .checkpoint_files import put_aside
from .config import dump_config
from .run_folder import METRICS, writing
from .wandb_run import WandbRun

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Receives numbers besides the metrics file: TensorBoard, Weights & Biases."""

    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at an optimizer step."""

    def close(self, finished: bool) -> None:
        """Flush; ``finished``: the run is complete."""


class Metrics:
    """Numbers of the run: one JSON object per line in ``metrics.jsonl``, and in all other sinks.

    Used as a ``with`` block. A write error is logged once and does not end the run.

    Args:
        output: the run's folder.
        from_step: steps after this one are dropped from an older file, because the run repeats them.
        sinks: write them too; one that fails is disabled.
    """

    def __init__(self, output: Path, from_step: int = 0, sinks: Sequence[Sink] = ()) -> None:
        self.path, self.sinks, self.unwritten = output / METRICS, list(sinks), 0
        rows = json_lines(self.path) if from_step and self.path.is_file() else ()
        kept = [line.rstrip("\n") + "\n" for line, row in rows if _is_up_to(row.get("step"), from_step)]
        with writing(METRICS, output):
            write_atomically(self.path, "".join(kept).encode())

    def write(self, step: int, **values: float) -> None:
        """Record values at an optimizer step."""
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            self.unwritten += 1
            if self.unwritten == 1:
                logger.error("%s cannot be written, training continues: %s", self.path, error.strerror or error)
        for sink in list(self.sinks):
            self._guarded(sink, lambda sink=sink: sink.write(step, values))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for sink in list(self.sinks):
            self._guarded(sink, lambda sink=sink: sink.close(finished=kind is None))

    def _guarded(self, sink: Sink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever the error, training is more important
            self.sinks.remove(sink)
            logger.error(
                "%s failed and is disabled; training and %s continue: %s: %s",
                sink.name, METRICS, type(error).__name__, error,
            )  # fmt: skip


class TensorBoard:
    """Metrics as TensorBoard's events, in the folder ``tensorboard`` of the run.

    Raises:
        ImportError: tensorboard is not installed.
    """

    name = "TensorBoard"

    def __init__(self, output: Path) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError("tensorboard=True needs: pip install 'insightface-kprpe[tensorboard]'")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output / "tensorboard"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at an optimizer step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        """Flush and close the file of events."""
        self.writer.close()


def _is_up_to(step: object, last: int) -> bool:
    return isinstance(step, int | float) and step <= last


class SpeedLog:
    """Logs a progress line every ``frequent`` optimizer steps.

    Args:
        metrics: also receives the numbers.
        total_steps: optimizer steps of the whole run.
        step_size: images per optimizer step, over all ranks.
        frequent: steps between lines.
        step: steps done before.
    """

    def __init__(self, metrics: Metrics, total_steps: int, step_size: int, frequent: int, step: int) -> None:
        self.metrics, self.total_steps, self.step_size, self.frequent = metrics, total_steps, step_size, frequent
        self.started, self.started_at = time.perf_counter(), step
        self.last, self.last_at = self.started, step
        self.losses: list[float] = []

    def __call__(self, step: int, epoch: int, loss: float, lr: float, loss_scale: float | None) -> None:
        """Take note of one step; ``loss_scale`` is that of fp16 training, else None."""
        self.losses.append(loss)
        if step % self.frequent and step != self.total_steps:
            return
        now = time.perf_counter()
        speed = (step - self.last_at) * self.step_size / (now - self.last)
        hours = (now - self.started) / (step - self.started_at) * (self.total_steps - step) / 3600
        mean = sum(self.losses) / len(self.losses)
        logger.info(
            "step %d/%d  epoch %d  loss %.4f  lr %.6f  %s%.0f images/s  %s left",
            step, self.total_steps, epoch, mean, lr,
            "" if loss_scale is None else f"loss scale {loss_scale:.0f}  ", speed, _span(hours),
        )  # fmt: skip
        self.metrics.write(step, epoch=epoch, loss=mean, lr=lr, images_per_second=round(speed, 1))
        self.last, self.last_at, self.losses = time.perf_counter(), step, []


def _span(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def open_metrics(
    config: edict, output: Path, step: int, resume: bool
) -> contextlib.AbstractContextManager[Metrics | None]:
    """On rank 0, move an older run aside, write ``config.json`` and open the metrics; on other ranks, yield None.

    Call once all settings are known to be valid.

    Args:
        config: of the run.
        output: its folder.
        step: steps done before.
        resume: continue the existing run.

    Raises:
        ImportError: an extra that the config needs is not installed.
        ValueError: Weights & Biases could not be reached.
        TrainingError: the folder could not be written to.
    """
    if rank_and_world_size()[0] != 0:
        return contextlib.nullcontext()
    sinks: list[Sink] = [TensorBoard(output)] if config.tensorboard else []
    if config.get("using_wandb"):
        sinks.append(WandbRun(config, output, resumed=step > 0))
    with writing("the folder of the run", output):
        if not resume:
            put_aside(output)
        dump_config(config, output / "config.json")
    return Metrics(output, step, sinks)
