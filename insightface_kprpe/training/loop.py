"""The loop around every training step here: epochs in order, accumulation, checkpoints, resuming, stopping."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ..data.sampler import EpochSampler
from ..distributed import RESTARTS, rank_and_world_size
from ..files import atomic_path, write_atomically
from .callbacks import StopSignal, start_logging
from .checkpoint import NEW_RUN, Checkpointer
from .optimization import Batch, NotFinite
from .random_state import seed_from
from .state import Plan, TrainingState

logger = logging.getLogger(__name__)

EXIT_STOPPED = 128 + 15  # what a shell reports for a process ended by SIGTERM
WORKER_GRACE = 10  # seconds that a reader process goes on after SIGTERM

Log = Callable[[int, int, float, float, float | None], None]  # step, epoch, loss, lr, loss scale of fp16


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stood."""


def run_steps(
    state: TrainingState,
    take_step: Callable[[int, Sequence[Batch]], float],
    loader: DataLoader,
    plan: Plan,
    *,
    step: int = 0,
    log: Log | None = None,
    checkpoints: Checkpointer | None = None,
    validate: Callable[[int], float | None] | None = None,
    verbose: int = 1,
) -> None:
    """Take the steps of a run that are still to do.

    Args:
        state: what ``take_step`` changes.
        take_step: called with the steps done so far and the batches of this one; returns the loss (of all ranks), or
            raises ``NotFinite``.
        loader: made by :func:`build_loader`.
        plan: how long the run is.
        step: steps done before.
        log: called after every step.
        checkpoints: saves at the end of every epoch, as often as it was told to, after the best validation so far, and
            when a signal asks the run to stop; None: nothing is saved, and a signal does what it does elsewhere.
        validate: called with the number of steps done; returns a score, the higher the better, or None. Other ranks
            wait meanwhile, so it may be None there.
        verbose: steps between validations; there is always one at the end.

    Raises:
        TrainingError: the loss or a gradient is not finite.
        SystemExit: a signal asked the run to stop; its state is saved.
    """
    with StopSignal() if checkpoints else contextlib.nullcontext() as stop:
        while step < plan.total_steps:
            epoch, done = divmod(step, plan.steps_per_epoch)
            loader.batch_sampler.set_position(epoch, done * plan.batches_per_step)
            state.model.train()
            for batches in grouped(loader, plan.batches_per_step):
                lr = state.optimizer.param_groups[0]["lr"]
                try:
                    loss = take_step(step, batches)
                except NotFinite as error:
                    folder = checkpoints.output if checkpoints else None
                    if checkpoints:
                        checkpoints.wait()
                    raise broken_step(error, state, step, plan, batches, loader, folder) from error
                state.scheduler.step()
                step += 1
                if log:
                    scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
                    log(step, epoch, loss, lr, scale)
                stopping = stop.agreed() if stop else False
                score = None
                if (step % verbose == 0 or step == plan.total_steps) and not stopping:
                    score = _same_on_all_ranks(validate(step) if validate else None)
                if checkpoints and (stopping or checkpoints.due(step, plan, score)):
                    checkpoints.save(step, state, plan, score)
                if stopping:
                    checkpoints.wait()
                    logger.warning("stopped by a signal after step %d; continue with resume=True", step)
                    raise SystemExit(EXIT_STOPPED)
                if step % plan.steps_per_epoch == 0:
                    break
        if checkpoints:
            checkpoints.wait()


def _same_on_all_ranks(score: float | None) -> float | None:
    """What rank 0 says, on all ranks once rank 0 has got here."""
    if rank_and_world_size()[1] == 1:
        return score
    value = torch.tensor(math.nan if score is None else score, dtype=torch.float64)  # on the CPU: goes over gloo
    dist.broadcast(value, 0)
    return None if value.isnan() else value.item()


def broken_step(
    error: NotFinite,
    state: TrainingState,
    step: int,
    plan: Plan,
    batches: Sequence[Batch],
    loader: DataLoader,
    output: Path | None,
) -> TrainingError:
    """Write what a step that is not finite was made of, and say where training stood.

    Args:
        error: of the step.
        state: not changed by it.
        step: steps done before.
        plan: how long the run is.
        batches: of the step, as they were loaded.
        loader: of the batches.
        output: ``bad_batch_step_N_rank_R.json`` and ``.pt`` are written here; None: nowhere.
    """
    epoch, done = divmod(step, plan.steps_per_epoch)
    lr, scale = state.optimizer.param_groups[0]["lr"], state.scaler.get_scale()
    names = ", ".join(error.names[:3]) + (f" and {len(error.names) - 3} more" if len(error.names) > 3 else "")
    saved = ""
    if output is not None:
        path = output / f"bad_batch_step_{step + 1}_rank_{rank_and_world_size()[0]}.json"
        loader.batch_sampler.set_position(epoch, done * plan.batches_per_step)
        indices = [int(i) for batch in itertools.islice(loader.batch_sampler, plan.batches_per_step) for i in batch]
        keys = [loader.dataset.record_key(index) for index in indices]
        report = {
            "step": step + 1, "epoch": epoch, "lr": lr, "loss_scale": scale, "loss": str(error.loss),
            "not_finite": error.names, "indices": indices, "keys": keys,
        }  # fmt: skip
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        with atomic_path(path.with_suffix(".pt")) as temporary:
            torch.save([[tensor.cpu() for tensor in batch] for batch in batches], temporary)
        saved = f"its images are in {path.with_suffix('.pt')}, their keys in {path.name}; "
    what = f"loss is {error.loss}" if not math.isfinite(error.loss) else "a gradient is not finite"
    return TrainingError(
        f"{what} at step {step + 1} (epoch {epoch}, lr {lr:.6g}, loss scale {scale:g}; not finite: "
        f"{names or 'nothing on this rank but the loss'}); {saved}"
        "lower lr, lengthen warmup_epoch or use precision bf16; resume=True starts from the last checkpoint"
    )


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
    return torch.Generator().manual_seed(seed_from(*numbers))


def begin(output: Path, resume: bool) -> bool:
    """Make a run's folder and open its log; to be called before anything that may fail.

    torchrun starts a failed run again, with the same arguments. If the first attempt was a new run in the folder of an
    older one and failed before it had put that aside, the second is a new run too.

    Returns:
        Whether to go on from the last checkpoint: asked for, or this is torchrun's second attempt after a failure.
    """
    rank = rank_and_world_size()[0] if dist.is_initialized() else int(os.environ.get("RANK", 0))
    output.mkdir(parents=True, exist_ok=True)
    start_logging(output, rank)
    if int(os.environ.get(RESTARTS, 0)) > 0:
        return resume or not (output / NEW_RUN).exists()
    if rank == 0 and not resume:
        (output / NEW_RUN).touch()
    elif rank == 0:
        (output / NEW_RUN).unlink(missing_ok=True)
    return resume
