"""What happens besides the training steps: verification, and signals."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..backbones import Backbone
from ..data.verification_pairs import VerificationPairs
from ..distributed import rank_and_world_size
from ..evaluation.verification import verify
from ..inference.models import TorchEmbedder
from .metrics import Metrics

logger = logging.getLogger(__name__)


class Verification:
    """Verifies a backbone on all sets and keeps the best accuracy of each.

    Args:
        sets: what to verify.
        backbone: of the run, not wrapped.
        metrics: receives the accuracies.

    Attributes:
        latest: accuracy in [0, 1] of every set, of the last verification; empty before the first.
    """

    def __init__(self, sets: Sequence[VerificationPairs], backbone: Backbone, metrics: Metrics) -> None:
        self.sets, self.backbone, self.metrics = sets, backbone, metrics
        self.latest: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def __call__(self, step: int) -> float:
        """Verify; returns the mean accuracy in [0, 1] over the sets. The log and the metrics use percent."""
        embed = TorchEmbedder(self.backbone)
        accuracies = {}
        for pairs in self.sets:
            result = verify(embed, pairs)
            accuracies[pairs.name] = result.accuracy
            self.best[pairs.name] = max(result.accuracy, self.best.get(pairs.name, 0.0))
            logger.info(
                "step %d  %s: accuracy %.2f +- %.2f %%  (best %.2f)  threshold %.3f (cosine)",
                step, pairs.name, 100 * result.accuracy, 100 * result.std, 100 * self.best[pairs.name],
                result.cosine_threshold,
            )  # fmt: skip
        self.metrics.write(step, **{f"accuracy/{name}": 100 * value for name, value in accuracies.items()})
        self.latest = accuracies
        return sum(accuracies.values()) / len(accuracies)


class StopSignal:
    """Records signals that ask a run to stop in a ``with`` block, so that it can save first.

    These are SIGTERM, SIGUSR1 (SLURM's early warning), SIGHUP (the terminal is gone) and Ctrl-C; a second Ctrl-C ends
    the process at once. All ranks learn of it at the same step, whichever received it. One that the process
    ignores, as nohup makes it do, stays ignored.

    Attributes:
        received: the signal's number; 0: none.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)

    def __enter__(self) -> StopSignal:
        self.received = 0
        heard = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._remember) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        self.received = self.received or number
        signal.signal(
            signal.SIGINT, signal.SIG_DFL
        )  # the system's default, which also ends a process that waits for another
        if number == signal.SIGINT:
            os.write(2, b"\nstopping after this step; Ctrl-C again ends the run at once, without saving\n")

    def agreed(self) -> int:
        """The signal, on every rank, once any rank has received it; else 0."""
        if rank_and_world_size()[1] == 1:
            return self.received
        number = torch.tensor([self.received])  # on the CPU: goes over gloo and does not wait for the GPU
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number.item())
