"""Evaluation: embeddings in, numbers out; one module a protocol."""

from . import (
    embedding,
    fusion,
    ijb,
    ijbs,
    landmarks,
    metrics,
    models,
    protocols,
    report,
    search,
    tinyface,
    verification,
)

__all__ = [
    "embedding",
    "fusion",
    "ijb",
    "ijbs",
    "landmarks",
    "metrics",
    "models",
    "protocols",
    "report",
    "search",
    "tinyface",
    "verification",
]
