"""Learning rate schedules, counted in optimizer steps: linear warm-up, then polynomial, cosine or steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def lr_factor(
    scheduler: str, total_steps: int, warmup_steps: int = 0, decay_steps: Sequence[int] = ()
) -> Callable[[int], float]:
    """The factor of the peak learning rate that step number ``step`` (0, 1, ...) uses.

    Args:
        scheduler: "polynomial" (linear to 0, as arcface_torch), "cosine" (to 0) or "step" (divided by 10).
        total_steps: optimizer steps of the run, > 0.
        warmup_steps: first steps, over which the rate rises linearly.
        decay_steps: steps from which the rate is divided by 10 (scheduler "step").

    Raises:
        ValueError: unknown scheduler.
    """
    after_warmup = {
        "polynomial": lambda progress, _: 1 - progress,
        "cosine": lambda progress, _: 0.5 * (1 + math.cos(math.pi * progress)),
        "step": lambda _, step: 0.1 ** sum(step >= start for start in decay_steps),
    }
    if scheduler not in after_warmup:
        raise ValueError(f"scheduler must be one of {', '.join(after_warmup)}, got {scheduler!r}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return after_warmup[scheduler](progress, step)

    return factor


def build_scheduler(optimizer: Optimizer, *args, **kwargs) -> LambdaLR:
    """A torch scheduler over :func:`lr_factor`; call ``step()`` after every optimizer step."""
    return LambdaLR(optimizer, lr_factor(*args, **kwargs))
