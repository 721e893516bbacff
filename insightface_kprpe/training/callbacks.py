"""What happens beside the training steps: log lines, metrics, verification, and signals."""

from __future__ import annotations

import importlib.util
import json
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from ..data.verification_pairs import VerificationPairs
from ..distributed import rank_and_world_size
from ..evaluation.verification import verify
from ..files import write_atomically
from ..inference.models import TorchEmbedder

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"  # in a run's folder


def start_logging(output: Path, rank: int) -> None:
    """Send the package's log to the console and to ``training.log``; ranks other than 0 keep to warnings."""
    root = logging.getLogger("insightface_kprpe")
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if rank == 0:
        handlers.append(logging.FileHandler(output / "training.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    root.propagate = False


class Metrics:
    """Numbers of the run: one JSON object a line in ``metrics.jsonl``, and TensorBoard and wandb if asked for.

    Args:
        output: the run's folder.
        tensorboard: also write events; needs the extra "tensorboard".
        from_step: steps after this one are dropped from an older file, because the run repeats them.
        wandb: an open run of Weights & Biases, see :mod:`.wandb_run`; closed together with this.

    Raises:
        ImportError: tensorboard is asked for and not installed.
    """

    def __init__(self, output: Path, tensorboard: bool, from_step: int = 0, wandb: Any = None) -> None:
        self.wandb = wandb
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ImportError("tensorboard=True needs: pip install 'insightface-kprpe[tensorboard]'")
        self.path = output / METRICS
        lines = self.path.read_text().splitlines() if from_step and self.path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= from_step]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(output / "tensorboard"))

    def write(self, step: int, **values: float) -> None:
        """Record values at an optimizer step."""
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close TensorBoard's events and the run of wandb."""
        if self.writer is not None:
            self.writer.close()
        if self.wandb is not None:
            self.wandb.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the line that a kill cut short
        return float("inf")


class SpeedLog:
    """The line that tells how training goes, every ``frequent`` optimizer steps.

    Args:
        metrics: where the numbers go too.
        total_steps: optimizer steps of the whole run.
        step_size: images an optimizer step, over all ranks.
        frequent: steps between lines.
        step: steps done before.
    """

    def __init__(self, metrics: Metrics, total_steps: int, step_size: int, frequent: int, step: int) -> None:
        self.metrics, self.total_steps, self.step_size, self.frequent = metrics, total_steps, step_size, frequent
        self.started, self.started_at = time.perf_counter(), step
        self.last, self.last_at = self.started, step
        self.losses: list[float] = []

    def __call__(self, step: int, epoch: int, loss: float, lr: float, scale: float | None) -> None:
        """Take note of one step; ``scale`` is that of fp16 training, else None."""
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
            "" if scale is None else f"scale {scale:.0f}  ", speed, _span(hours),
        )  # fmt: skip
        self.metrics.write(step, epoch=epoch, loss=mean, lr=lr, images_per_second=round(speed, 1))
        self.last, self.last_at, self.losses = time.perf_counter(), step, []


def _span(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


class Verification:
    """Verifies the backbone on all sets and keeps the best accuracy of each.

    Args:
        sets: what to verify.
        metrics: where accuracies go.
    """

    def __init__(self, sets: Sequence[VerificationPairs], metrics: Metrics) -> None:
        self.sets, self.metrics = sets, metrics
        self.best: dict[str, float] = {}

    def __call__(self, step: int, backbone: nn.Module) -> dict[str, float]:
        """Accuracy in percent of every set."""
        embed = TorchEmbedder(backbone)
        accuracies = {}
        for pairs in self.sets:
            result = verify(embed, pairs)
            accuracies[pairs.name] = result.accuracy
            self.best[pairs.name] = max(result.accuracy, self.best.get(pairs.name, 0.0))
            logger.info(
                "step %d  %s: accuracy %.2f +- %.2f %%  (best %.2f)  threshold %.3f (cosine)",
                step, pairs.name, result.accuracy, result.std, self.best[pairs.name], result.cosine_threshold,
            )  # fmt: skip
        if accuracies:
            self.metrics.write(step, **{f"accuracy/{name}": value for name, value in accuracies.items()})
        return accuracies


class StopSignal:
    """Remembers SIGTERM (and SIGUSR1, SLURM's early warning) in a ``with`` block: the run can save before it goes.

    All ranks learn of it at the same step, whichever of them was told.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __enter__(self) -> StopSignal:
        self.received = False
        self.previous = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.received = True

    def agreed(self) -> bool:
        """True on every rank once any rank has been told."""
        if rank_and_world_size()[1] == 1:
            return self.received
        flag = torch.tensor([int(self.received)])  # on the CPU: goes over gloo and does not wait for the GPU
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())
