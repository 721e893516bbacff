"""Restores what NumPy, torch and onnxruntime have removed since arcface_torch's scripts were written."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch.optim import lr_scheduler

from ..backbones import VisionTransformer
from ..deployment.onnx_export import export_onnx
from .changes import Change, change

COMPATIBILITY: list[Change] = []

_NUMPY_ALIASES = {"int": int, "float": float, "bool": bool, "object": object, "complex": complex, "str": str}


@change("numpy.int, .float, .bool, ...", "exist again, for the checkout's code only", to=COMPATIBILITY)
def _numpy_aliases(root: Path, cpu: bool) -> bool:
    original = np.__getattr__
    inside = f"{root}{os.sep}"

    def __getattr__(name: str) -> Any:
        if name in _NUMPY_ALIASES:
            asking = sys._getframe(1).f_code.co_filename
            if (
                asking.startswith(inside) and "site-packages" not in asking
            ):  # a virtual environment may be in the checkout
                return _NUMPY_ALIASES[name]
        return original(name)

    np.__getattr__ = __getattr__
    return True


@change("torch.optim.lr_scheduler._LRScheduler", "accepts the argument `verbose` again", to=COMPATIBILITY)
def _scheduler_verbose(root: Path, cpu: bool) -> bool:
    if "verbose" in inspect.signature(lr_scheduler.LRScheduler.__init__).parameters:
        return False

    class Scheduler(lr_scheduler.LRScheduler):
        def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1, verbose: Any = None) -> None:
            super().__init__(optimizer, last_epoch)

    lr_scheduler._LRScheduler = Scheduler
    return True


@change(
    "torch.onnx.export",
    "this package's networks: its own checked export, dynamic batch size; the checkout's: torch's older exporter, "
    "which supports the opset that the scripts ask for",
    to=COMPATIBILITY,
)
def _onnx_export(root: Path, cpu: bool) -> bool:
    original = torch.onnx.export

    def export(model: torch.nn.Module, args: Any, f: str | None = None, **kwargs) -> Any:
        if kwargs.get("dynamo"):  # from export_onnx below
            return original(model, args, f, **kwargs)
        if not isinstance(model, VisionTransformer):
            return original(model, args, f, **{**kwargs, "dynamo": False})
        export_onnx(model, f, image_only=True)
        _name_input(f, *kwargs.get("input_names", ("images",)))

    torch.onnx.export = export
    return True


def _name_input(path: str, name: str) -> None:
    """Give the only input of an ONNX file the requested name."""
    model = onnx.load(path)
    old, model.graph.input[0].name = model.graph.input[0].name, name
    for node in model.graph.node:
        for i, value in enumerate(node.input):
            if value == old:
                node.input[i] = name
    onnx.save(model, path)


@change(
    "onnxruntime.InferenceSession", "uses CUDA if available, else the CPU, unless providers are given", to=COMPATIBILITY
)
def _onnxruntime_providers(root: Path, cpu: bool) -> bool:
    offered = onnxruntime.get_available_providers()
    known = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in offered]
    default = ["CPUExecutionProvider"] if cpu else known
    original = onnxruntime.InferenceSession

    class Session(original):
        def __init__(self, path: Any, sess_options: Any = None, providers: Any = None, *args, **kwargs) -> None:
            super().__init__(path, sess_options, providers or default, *args, **kwargs)

    onnxruntime.InferenceSession = Session
    return True


@change(
    "scipy.interpolate.interp1d",
    'kind "slinear" accepts repeated values of x again, which false positive rates have',
    to=COMPATIBILITY,
)
def _interpolation(root: Path, cpu: bool) -> bool:
    try:
        from scipy import interpolate
    except ImportError:  # only some of the scripts need it
        return False
    original = interpolate.interp1d

    def interp1d(x: Any, y: Any, kind: Any = "linear", *args, **kwargs) -> Any:
        # Both kinds draw the same line through the points, but "slinear" now refuses x that do not increase.
        return original(x, y, "linear" if kind == "slinear" else kind, *args, **kwargs)

    interpolate.interp1d = interp1d
    return True


@change("multiprocessing", "data loaders fork again: spawned workers would not be patched", to=COMPATIBILITY)
def _fork(root: Path, cpu: bool) -> bool:
    if sys.platform != "linux" or sys.version_info < (3, 14):
        return False
    multiprocessing.set_start_method("fork", force=True)
    return True
