"""Evaluation: embeddings in, numbers out; one module per protocol. Modules are loaded on first use."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "curves",
    "fusion",
    "hardest",
    "ijb",
    "ijbs",
    "landmarks",
    "metrics",
    "protocols",
    "report",
    "result",
    "sanity",
    "search",
    "tinyface",
    "verification",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
