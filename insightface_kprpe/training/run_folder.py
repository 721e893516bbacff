"""A run's folder: one run at a time writes to it, and a full disk is reported in one sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.api import CheckpointException

from ..distributed import RESTARTS, rank_and_world_size
from ..documents import read_json_object

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
NEW_RUN = ".new_run"  # exists from the start of a new run until it has moved an older one aside
_LOCK, _HOLDER = ".lock", ".lock_holder.json"
_READERS_END = 15  # seconds until the reader processes of a killed run have noticed and released its lock


class TrainingError(RuntimeError):
    """Training cannot continue; the message says where it was and what to do."""


@contextlib.contextmanager
def open_run(output: Path, resume: bool) -> Iterator[bool]:
    """Create a run's folder and keep other runs out of it; call it before anything that may fail.

    torchrun restarts a failed run with the same arguments. If the first attempt was a new run in the folder of an older
    one and failed before moving that aside, the second is a new run too.

    Yields:
        Whether to resume from the last checkpoint: requested, or torchrun's second attempt after a failure.

    Raises:
        TrainingError: another run writes to the folder, or it cannot be written to.
    """
    rank = rank_and_world_size()[0] if dist.is_initialized() else int(os.environ.get("RANK", 0))
    with writing("the folder of the run", output):
        output.mkdir(parents=True, exist_ok=True)
    with _locked(output) if rank == 0 else contextlib.nullcontext():
        yield _resumes(output, resume, rank)


def _resumes(output: Path, resume: bool, rank: int) -> bool:
    if int(os.environ.get(RESTARTS, 0)) > 0:
        return resume or not (output / NEW_RUN).exists()
    if rank == 0 and not resume:
        with writing("the folder of the run", output):
            (output / NEW_RUN).touch()
    elif rank == 0:
        (output / NEW_RUN).unlink(missing_ok=True)
    return resume


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """The folder's lock, which the system releases when its holder ends for any reason."""
    lock, holder = FileLock(output / _LOCK), output / _HOLDER
    _acquire(lock, holder)
    try:
        if lock.is_locked:
            with writing("the folder of the run", output):
                holder.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        if lock.is_locked:
            holder.unlink(missing_ok=True)
            (output / _LOCK).unlink(missing_ok=True)  # nobody waits for it: a second run is refused at once
            lock.release()


def _acquire(lock: FileLock, holder: Path) -> None:
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not _is_gone(_read(holder)):
                raise
            lock.acquire(timeout=_READERS_END)
    except Timeout:
        raise TrainingError(
            f"another run is writing to {holder.parent}: {_describe_holder(holder)}; wait for it, stop it, or choose "
            "another output"
        ) from None
    except (NotImplementedError, OSError) as error:
        logger.warning("%s cannot be locked (%s); make sure that no other run writes there", holder.parent, error)


def _read(holder: Path) -> dict[str, Any]:
    try:
        content = read_json_object(holder)
        return {"pid": int(content["pid"]), "host": str(content["host"])}
    except (OSError, ValueError, KeyError, TypeError, OverflowError):  # not written yet
        return {}


def _describe_holder(holder: Path) -> str:
    process = _read(holder)
    return f"process {process['pid']} on {process['host']}" if process else "a process that has just started"


def _is_gone(process: dict[str, Any]) -> bool:
    """Whether a process of this machine is known to have ended."""
    if not process or process["host"] != socket.gethostname():
        return False
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or no number of a process
        return False
    return False


@contextlib.contextmanager
def writing(what: str, folder: Path, size: int = 0, hint: str = "") -> Iterator[None]:
    """Turn the errors of a full disk or an unwritable folder in the block into one sentence.

    Args:
        what: is written.
        folder: where to.
        size: bytes needed; 0: few.
        hint: what else to know, and what to do.

    Raises:
        TrainingError: it could not be written.
    """
    try:
        yield
    except TrainingError:
        raise
    except (OSError, RuntimeError, CheckpointException) as error:
        reason = _reason(error)
        if size:
            with contextlib.suppress(OSError):
                free = shutil.disk_usage(_existing(folder)).free
                reason += f" (it needs {_bytes(size)}, {_bytes(free)} are free)"
        raise TrainingError(f"{what} could not be written to {folder}: {reason}{hint and f'; {hint}'}") from error


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _reason(error: BaseException) -> str:
    """The system's message in a chain of errors, or else the first line of the innermost."""
    pending, seen = [error], []
    while pending:
        link = pending.pop()
        seen.append(link)
        if isinstance(link, OSError) and link.errno is not None:
            return os.strerror(link.errno)
        if isinstance(link, CheckpointException):
            pending += [failure for failure, _ in link.failures.values()]
        pending += [other for other in (link.__cause__, link.__context__) if other is not None and other not in seen]
    return (str(seen[-1]).strip() or type(seen[-1]).__name__).splitlines()[0][:200]


def _bytes(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
