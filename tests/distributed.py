"""Runs a function in several processes, or in one that may be killed, without importing torch in each of them again."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes are forked from one that has only imported these.
multiprocessing.set_forkserver_preload(["pytest", "insightface_kprpe.training.trainer"])


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """``function(rank, *args)`` on every rank of a gloo group; returns what each one returned (tensors, numbers)."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(args, Path(folder) / "args.pt")  # a fork server takes no more than a few hundred tensors
        arguments = (function, world_size, folder)
        mp.start_processes(_run, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _run(rank: int, function: Callable[..., Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    args = torch.load(Path(folder) / "args.pt", weights_only=False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def exit_code_of(function: Callable[..., Any], *args: Any, seconds: float = 120) -> int | None:
    """``function(*args)`` in a process of its own: its exit status, minus the signal's number where one ended it.

    None: it was not done in time.
    """
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    process.join(seconds)
    status = process.exitcode
    if status is None:
        process.kill()
    return status
