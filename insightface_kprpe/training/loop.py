"""The training loop: epochs in order, accumulation, checkpoints, resuming, stopping."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from torch.utils.data import DataLoader, Dataset

from ..data.reading import start_worker
from ..data.sampler import EpochSampler
from ..distributed import rank_and_world_size
from ..files import atomic_path, write_atomically
from .callbacks import StopSignal
from .checkpoint import Checkpointer
from .optimization import Batch, NotFinite
from .random_state import seed_from
from .run_folder import TrainingError, writing
from .state import Schedule, TrainingState
from .validation import Validation

logger = logging.getLogger(__name__)

EXIT_STOPPED = 128 + signal.SIGTERM  # a shell's exit status for a process ended by it
EXIT_INTERRUPTED = 128 + signal.SIGINT  # and by Ctrl-C
WORKER_GRACE = 10  # seconds that a reader process continues after SIGTERM

Log = Callable[[int, int, float, float, float | None], None]  # step, epoch, loss, lr, loss scale of fp16


def run_steps(
    state: TrainingState,
    take_step: Callable[[int, Sequence[Batch]], float],
    loader: DataLoader,
    schedule: Schedule,
    *,
    step: int = 0,
    log: Log | None = None,
    checkpoints: Checkpointer | None = None,
    validation: Validation | None = None,
) -> None:
    """Take the remaining steps of a run.

    Args:
        state: changed by ``take_step``.
        take_step: called with the steps done so far and the batches of this one; returns the loss (of all ranks), or
            raises ``NotFinite``.
        loader: made by :func:`build_loader`.
        schedule: how long the run is.
        step: steps done before.
        log: called after every step.
        checkpoints: saves at the end of every epoch, at its own interval, before every validation, and when a signal
            asks the run to stop; None: nothing is saved, and signals have their usual effect.
        validation: runs when it is due, on every rank; needs ``checkpoints``.

    Raises:
        TrainingError: the loss or a gradient is not finite, or a checkpoint could not be written.
        SystemExit: a signal asked the run to stop; its state is saved.
    """
    state.model.train()
    with StopSignal() if checkpoints else contextlib.nullcontext() as stop:
        if validation:
            validation.start(step)
        for batches in remaining_steps(loader, schedule, step):
            epoch, lr = step // schedule.steps_per_epoch, state.optimizer.param_groups[0]["lr"]
            try:
                loss = take_step(step, batches)
            except NotFinite as error:
                if checkpoints:
                    checkpoints.wait()
                raise broken_step(error, state, step, schedule, batches, loader, checkpoints) from error
            state.scheduler.step()
            step += 1
            if log:
                log(step, epoch, loss, lr, state.scaler.get_scale() if state.scaler.is_enabled() else None)
            if checkpoints:
                checkpoints.check()
                number, validating = stop.agreed(), validation is not None and validation.due(step)
                if number or validating or checkpoints.due(step, schedule):
                    checkpoints.save(step, state, schedule)
                if number:
                    _stop(number, step, checkpoints)
                if validating:
                    validation(step)
        if checkpoints:
            checkpoints.wait()
    if validation:
        validation.warn_if_failed()


def remaining_steps(loader: DataLoader, schedule: Schedule, step: int) -> Iterator[tuple[Batch, ...]]:
    """The batches of every remaining step, epoch by epoch."""
    while step < schedule.total_steps:
        epoch, done = divmod(step, schedule.steps_per_epoch)
        loader.batch_sampler.set_position(epoch, done * schedule.batches_per_step)
        for batches in itertools.islice(grouped(loader, schedule.batches_per_step), schedule.steps_per_epoch - done):
            yield batches
            step += 1


def _stop(number: int, step: int, checkpoints: Checkpointer) -> NoReturn:
    """End the run by a signal, once its state is on disk."""
    checkpoints.wait()
    logger.warning("stopped by a signal after step %d; continue with resume=True", step)
    raise SystemExit(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)


def broken_step(
    error: NotFinite,
    state: TrainingState,
    step: int,
    schedule: Schedule,
    batches: Sequence[Batch],
    loader: DataLoader,
    checkpoints: Checkpointer | None,
) -> TrainingError:
    """Write the data of a step that is not finite, and report the state of training.

    Args:
        error: of the step.
        state: not changed by it.
        step: steps done before.
        schedule: how long the run is.
        batches: of the step, as they were loaded.
        loader: of the batches.
        checkpoints: ``bad_batch_step_N_rank_R.json`` and ``.pt`` are written to their run's folder; None: nowhere.
    """
    epoch = step // schedule.steps_per_epoch
    lr, loss_scale = state.optimizer.param_groups[0]["lr"], state.scaler.get_scale()
    saved = ""
    if checkpoints:
        path = checkpoints.output / f"bad_batch_step_{step + 1}_rank_{rank_and_world_size()[0]}.json"
        report = {
            "step": step + 1, "epoch": epoch, "lr": lr, "loss_scale": loss_scale, "loss": str(error.loss),
            "not_finite": error.names, **_images_of(step, schedule, loader),
        }  # fmt: skip
        try:
            with writing("the images of this step", path.parent):
                write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
                with atomic_path(path.with_suffix(".pt")) as temporary:
                    torch.save([[tensor.cpu() for tensor in batch] for batch in batches], temporary)
            saved = f"its images are in {path.with_suffix('.pt')}, their keys in {path.name}; "
        except TrainingError as full:
            saved = f"{full}; "
    names = ", ".join(error.names[:3]) + (f" and {len(error.names) - 3} more" if len(error.names) > 3 else "")
    what = f"loss is {error.loss}" if not math.isfinite(error.loss) else "a gradient is not finite"
    return TrainingError(
        f"{what} at step {step + 1} (epoch {epoch}, lr {lr:.6g}, loss scale {loss_scale:g}; not finite: "
        f"{names or 'nothing on this rank but the loss'}); {saved}"
        "lower lr, lengthen warmup_epoch or use precision bf16; resume=True starts from the last checkpoint"
    )


def _images_of(step: int, schedule: Schedule, loader: DataLoader) -> dict[str, list]:
    """Indices and keys of the images that this rank takes in a step."""
    epoch, done = divmod(step, schedule.steps_per_epoch)
    loader.batch_sampler.set_position(epoch, done * schedule.batches_per_step)
    indices = [int(i) for batch in itertools.islice(loader.batch_sampler, schedule.batches_per_step) for i in batch]
    return {"indices": indices, "keys": [loader.dataset.record_key(index) for index in indices]}


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
        generator=torch.Generator().manual_seed(seed),  # otherwise every epoch draws a number from the global one
    )


def _start_worker(worker: int) -> None:
    start_worker(worker)
    # A signal to the whole process group is for the rank, which may still need a batch before it saves and stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))
    # If it ended by the signal, torch would raise an error in the rank, perhaps in the middle of saving.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def grouped(batches: Iterable[Batch], size: int) -> Iterator[tuple[Batch, ...]]:
    """Groups of ``size`` batches; an incomplete last group is left out."""
    iterator = iter(batches)
    while len(group := tuple(itertools.islice(iterator, size))) == size:
        yield group


def step_generator(*numbers: int) -> torch.Generator:
    """A CPU generator whose state depends only on these numbers (seed, step, rank)."""
    return torch.Generator().manual_seed(seed_from(*numbers))
