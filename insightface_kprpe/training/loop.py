"""The loop around every training step here: epochs in order, accumulation, checkpoints, resuming, stopping."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from easydict import EasyDict as edict
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from ..data.face_dataset import EpochSampler
from ..partial_fc import rank_and_world_size
from .callbacks import StopSignal
from .checkpoint import barrier, list_checkpoints, load_checkpoint, save_checkpoint, save_model
from .lr_scheduler import build_scheduler

logger = logging.getLogger(__name__)

AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
EXIT_STOPPED = 128 + 15  # what a shell reports for a process ended by SIGTERM
WORKER_GRACE = 10  # seconds that a reader process goes on after SIGTERM

Batch = Any  # whatever the data set's items are, stacked
Log = Callable[[int, int, float, float, float | None], None]  # step, epoch, loss, lr, loss scale of fp16


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stood."""


class Plan(NamedTuple):
    """How long a run is; a step is one of the optimizer.

    Attributes:
        steps_per_epoch: at least 1.
        epochs: at least 1.
        batches_per_step: forward passes whose gradients one step adds up.
    """

    steps_per_epoch: int
    epochs: int
    batches_per_step: int = 1

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs


class TrainingState(NamedTuple):
    """Everything that changes while training runs.

    Attributes:
        model: the network, not wrapped; its weights alone are ``model.pt``.
        loss: may have weights too, as PartialFC has.
        optimizer: over both.
        scheduler: of the learning rate, by optimizer step.
        scaler: scales the loss in fp16 training; disabled otherwise.
    """

    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler

    def state_dict(self, step: int) -> dict:
        """What a checkpoint holds."""
        return {"step": step, **{name: part.state_dict() for name, part in self._asdict().items()}}

    def resume(self, output: Path) -> int:
        """Load the newest checkpoint, if there is one; returns the optimizer steps done."""
        checkpoints = list_checkpoints(output)
        if not checkpoints:
            logger.info("resume=True: no checkpoint in %s yet, starting from the beginning", output)
            return 0
        state = load_checkpoint(checkpoints[-1])
        for name, part in self._asdict().items():
            part.load_state_dict(state[name])
        logger.info("resumed from %s", checkpoints[-1])
        return state["step"]


def run_steps(
    state: TrainingState,
    take_step: Callable[[int, Sequence[Batch]], float],
    loader: DataLoader,
    plan: Plan,
    *,
    step: int = 0,
    log: Log | None = None,
    output: Path | None = None,
    validate: Callable[[int], None] | None = None,
    verbose: int = 1,
) -> None:
    """Take the steps of a run that are still to do.

    Args:
        state: what ``take_step`` changes.
        take_step: called with the steps done so far and the batches of this one; returns the loss (of all ranks).
        loader: made by :func:`build_loader`.
        plan: how long the run is.
        step: steps done before.
        log: called after every step.
        output: a checkpoint is saved here at the end of every epoch and when a signal asks the run to stop; None: the
            run saves nothing and a signal does what it does elsewhere.
        validate: called with the number of steps done; other ranks wait meanwhile, so it may be None there.
        verbose: steps between validations; there is always one at the end.

    Raises:
        TrainingError: the loss is not finite.
        SystemExit: a signal asked the run to stop; its state is saved.
    """
    with StopSignal() if output else contextlib.nullcontext() as stop:
        while step < plan.total_steps:
            epoch, done = divmod(step, plan.steps_per_epoch)
            loader.batch_sampler.set_position(epoch, done * plan.batches_per_step)
            state.model.train()
            for batches in grouped(loader, plan.batches_per_step):
                lr = state.optimizer.param_groups[0]["lr"]
                loss = take_step(step, batches)
                scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"loss is {loss} at step {step + 1} (epoch {epoch}, lr {lr:.6g}, loss scale {scale or 1:g}); "
                        "lower lr, lengthen warmup_epoch or use precision bf16; "
                        "resume=True starts from the last checkpoint"
                    )
                state.scheduler.step()
                step += 1
                if log:
                    log(step, epoch, loss, lr, scale)
                end_of_epoch = step % plan.steps_per_epoch == 0
                if stop:
                    _save_and_stop(output, step, state, end_of_epoch, stop.agreed())
                if step % verbose == 0 or step == plan.total_steps:
                    if validate:
                        validate(step)
                    barrier()
                if end_of_epoch:
                    break


def _save_and_stop(output: Path, step: int, state: TrainingState, end_of_epoch: bool, stopping: bool) -> None:
    if end_of_epoch or stopping:
        save_checkpoint(output, step, state.state_dict(step))
        if rank_and_world_size()[0] == 0:
            save_model(output / "model.pt", state.model.state_dict())
    if stopping:
        logger.warning("stopped by a signal after step %d; continue with resume=True", step)
        raise SystemExit(EXIT_STOPPED)


def optimize(
    loss_of: Callable[[Batch], torch.Tensor],
    batches: Sequence[Batch],
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clip_grad: float,
) -> float:
    """One optimizer step over one or more batches, whose gradients are those of their union.

    Args:
        loss_of: the mean loss of one batch.
        batches: of equal size.
        network: what ``loss_of`` runs, wrapped or not.
        optimizer: over the network and whatever else learns.
        scaler: scales the loss in fp16 training; disabled otherwise.
        clip_grad: largest norm of the network's gradient.

    Returns:
        The mean loss over all batches and ranks.
    """
    total = 0.0
    for number, batch in enumerate(batches, 1):
        local = number < len(batches) and isinstance(network, DistributedDataParallel)
        with network.no_sync() if local else contextlib.nullcontext():
            loss = loss_of(batch) / len(batches)
            scaler.scale(loss).backward()
        total += loss.item()
    total = _mean_over_ranks(total)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(network.parameters(), clip_grad)
    if math.isfinite(total):  # a broken loss must not reach the weights
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


def _mean_over_ranks(value: float) -> float:
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)  # on the CPU: goes over gloo
    dist.all_reduce(total)
    return total.item() / world_size


def build_state(config: edict, net: nn.Module, loss: nn.Module, plan: Plan, device: torch.device) -> TrainingState:
    """What a config's ``optimizer``, ``scheduler`` and ``precision`` ask for; network and loss are on the device."""
    optimizer = build_optimizer(config, net, loss)
    scheduler = build_scheduler(
        optimizer,
        config.scheduler,
        plan.total_steps,
        round(max(0.0, config.warmup_epoch) * plan.steps_per_epoch),
        [epoch * plan.steps_per_epoch for epoch in config.decay_epochs],
    )
    scaler_class = ShardedGradScaler if rank_and_world_size()[1] > 1 else torch.amp.GradScaler
    return TrainingState(net, loss, optimizer, scheduler, scaler_class(device.type, enabled=config.precision == "fp16"))


def build_optimizer(config: edict, net: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over network and loss, without weight decay on biases, norms and what the network names."""
    spared = net.no_weight_decay() if hasattr(net, "no_weight_decay") else set()
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in named if parameter.ndim > 1 and name not in spared]
    plain = [parameter for name, parameter in named if parameter.ndim <= 1 or name in spared]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}, {"params": loss.parameters()}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def build_loader(
    dataset: Dataset, sampler: EpochSampler, num_workers: int, device: torch.device, seed: int
) -> DataLoader:
    """A loader of whole batches in the sampler's order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(seed),  # else every epoch takes a number from the global one
    )


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)  # one thread a worker: they are many
    # A signal to the whole process group is for the rank, which may still need a batch before it saves and stops.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def grouped(batches: Iterable[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    """Groups of ``size`` batches; an incomplete last group is left out."""
    iterator = iter(batches)
    while len(group := tuple(itertools.islice(iterator, size))) == size:
        yield group


def step_generator(*numbers: int) -> torch.Generator:
    """A CPU generator that the same numbers (seed, step, rank) put into the same state everywhere."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


def distributed(net: nn.Module, device: torch.device) -> nn.Module:
    """The network itself, or, where there are several ranks, wrapped to share its gradients with them."""
    if rank_and_world_size()[1] == 1:
        return net
    return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """The device of this rank; under torchrun with several ranks also a process group (gloo, and nccl on CUDA)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()
