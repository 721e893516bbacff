"""One optimizer step: forward passes, gradients of their union, clipping, and a check that everything is finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ..distributed import rank_and_world_size
from .state import TrainingState

AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
LOWEST_SCALE = 1.0  # fp16: gradients that overflow without any scaling are not due to the scaler

Batch = Any  # whatever the data set's items are, stacked


class NotFinite(ArithmeticError):
    """A loss or gradient is not finite, on this rank or another; the weights are unchanged.

    Attributes:
        loss: of the step, over all ranks.
        names: what is not finite on this rank: weights, or else gradients.
    """

    def __init__(self, loss: float, names: list[str]) -> None:
        super().__init__(f"loss {loss}, not finite: {', '.join(names) or 'nothing here'}")
        self.loss, self.names = loss, names


def optimize(
    loss_of: Callable[[Batch], torch.Tensor],
    batches: Sequence[Batch],
    network: nn.Module,
    state: TrainingState,
    clip_grad: float,
) -> float:
    """One optimizer step over one or more batches, whose gradients are those of their union.

    Args:
        loss_of: the mean loss of one batch.
        batches: of equal size.
        network: what ``loss_of`` runs, wrapped or not.
        state: its weights and moments change.
        clip_grad: largest norm of the network's gradient.

    Returns:
        The mean loss over all batches and ranks.

    Raises:
        NotFinite: the loss is not finite, or a gradient is not (in fp16: at a loss scale of 1; above it the step is
            skipped and the scale halved).
    """
    total = 0.0
    for number, batch in enumerate(batches, 1):
        local = number < len(batches) and isinstance(network, DistributedDataParallel)
        with network.no_sync() if local else contextlib.nullcontext():
            loss = loss_of(batch) / len(batches)
            state.scaler.scale(loss).backward()
        total += loss.item()
    state.scaler.unscale_(state.optimizer)
    norm = _gradient_norm(network.parameters())
    finite = bool((norm + _gradient_norm(state.loss.parameters())).isfinite())
    total, all_finite = _over_ranks(total, finite)
    may_overflow = state.scaler.is_enabled() and state.scaler.get_scale() > LOWEST_SCALE
    if not math.isfinite(total) or not (all_finite or may_overflow):
        raise NotFinite(total, names_of_not_finite(state))
    nn.utils.clip_grads_with_norm_(network.parameters(), clip_grad, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return total


def names_of_not_finite(state: TrainingState) -> list[str]:
    """The weights that are not finite, or if all are, the gradients that are not."""
    parameters = state.named_parameters()
    names = [name for name, parameter in parameters.items() if not parameter.isfinite().all()]
    return names or [
        f"gradient of {name}"
        for name, parameter in parameters.items()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _over_ranks(loss: float, finite: bool) -> tuple[float, bool]:
    """The mean loss, and whether it is finite on all ranks."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return loss, finite
    total = torch.tensor([loss, float(not finite)], dtype=torch.float64)  # on the CPU: goes over gloo
    dist.all_reduce(total)
    return total[0].item() / world_size, total[1].item() == 0


def distributed(net: nn.Module, device: torch.device, gradient_compression: str | None = None) -> nn.Module:
    """The network itself, or, where there are several ranks, wrapped to average its gradients.

    Args:
        net: on the device.
        device: of this rank.
        gradient_compression: "bf16" exchanges gradients in half precision; None: unchanged.
    """
    if rank_and_world_size()[1] == 1:
        return net
    network = DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    if gradient_compression == "bf16":
        # By its own name, DDP refuses the hook over gloo, which supports bf16 by now.
        network.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return network
