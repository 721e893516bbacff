"""Ranks: how many there are, which one this process is, barriers, and the process group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if rank_and_world_size()[1] > 1:
        dist.barrier()


def wait_for_rank_0() -> None:
    """Wait until rank 0 gets here, if there are several ranks; over gloo, which waits longer than nccl."""
    if rank_and_world_size()[1] > 1:
        dist.broadcast(torch.zeros(1), 0)


def rank_and_world_size() -> tuple[int, int]:
    """This process' rank and the number of ranks; (0, 1) if no process group was initialized."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # set by torchrun


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
    # torchrun keeps its store when it restarts a group, with the addresses of ranks that no longer exist.
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {os.environ.get(RESTARTS, 0)} of {world_size}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    try:
        yield device
    finally:
        dist.destroy_process_group()
