"""Evaluation: embeddings in, numbers out; one module a protocol."""

from . import embedding, fusion, ijb, landmarks, metrics, search, tinyface, verification

__all__ = ["embedding", "fusion", "ijb", "landmarks", "metrics", "search", "tinyface", "verification"]
