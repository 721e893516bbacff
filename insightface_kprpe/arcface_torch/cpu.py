"""Lets scripts that ask for CUDA run without it: slow, and meant for trying things out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .changes import Change, change

CPU_ONLY: list[Change] = []


@change("CUDA_VISIBLE_DEVICES", "is empty: existing GPUs are not used", to=CPU_ONLY)
def _hide(root: Path, cpu: bool) -> bool:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return True


@change("torch.Tensor.cuda, torch.nn.Module.cuda", "return the tensor or module unchanged", to=CPU_ONLY)
def _cuda(root: Path, cpu: bool) -> bool:
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    return True


@change("torch.Tensor.to, torch.nn.Module.to, torch.tensor", "use the CPU for any CUDA device", to=CPU_ONLY)
def _device(root: Path, cpu: bool) -> bool:
    for owner, name in ((torch.Tensor, "to"), (torch.nn.Module, "to"), (torch, "tensor")):
        setattr(owner, name, _on_cpu(getattr(owner, name), positional=name == "to"))
    return True


def _on_cpu(original: Callable, positional: bool) -> Callable:
    def call(first: Any, *args, **kwargs) -> Any:
        if positional and args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original(first, *args, **kwargs)

    return call


def _is_cuda(device: Any) -> bool:
    """Whether something is a CUDA device in one of torch's notations: 0, "cuda:0", torch.device."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


@change("torch.cuda.set_device, .Stream, .stream, .current_stream", "do nothing", to=CPU_ONLY)
def _streams(root: Path, cpu: bool) -> bool:
    class Stream:
        def __init__(self, *args, **kwargs) -> None:
            pass

        def wait_stream(self, stream: Any) -> None:
            pass

    torch.cuda.set_device = lambda device: None
    torch.cuda.Stream = torch.cuda.current_stream = Stream
    torch.cuda.stream = contextlib.nullcontext
    return True


@change("torch.distributed.init_process_group", "uses gloo instead of nccl", to=CPU_ONLY)
def _gloo(root: Path, cpu: bool) -> bool:
    original = dist.init_process_group
    dist.init_process_group = lambda backend=None, *args, **kwargs: original("gloo", *args, **kwargs)
    return True


@change("torch.nn.parallel.DistributedDataParallel", "drops device_ids", to=CPU_ONLY)
def _ddp(root: Path, cpu: bool) -> bool:
    class OnCpu(DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, device_ids: Any = None, output_device: Any = None, **kwargs):
            super().__init__(module, **kwargs)

    torch.nn.parallel.DistributedDataParallel = OnCpu
    return True


@change("torch.load", "loads weights that were saved on a GPU onto the CPU", to=CPU_ONLY)
def _load(root: Path, cpu: bool) -> bool:
    original = torch.load
    torch.load = lambda f, map_location="cpu", **kwargs: original(f, map_location=map_location or "cpu", **kwargs)
    return True
