"""Exact search for the most similar rows of a large matrix: by faiss where it is the faster, else by one product."""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np

# For few rows faiss is twice as fast as a matrix product, for many slower (benchmarks/gallery_search.py); and importing
# it takes as long as some searches in all but large matrices.
FAISS_FROM, FAISS_ROWS = 1_000_000, 8


def nearest_rows(rows: np.ndarray, among: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a matrix that have the highest inner product with each of some others.

    Args:
        rows: (B, D) float32.
        among: (T, D) float32.
        top: how many, from 1 to T.

    Returns:
        (B, top) int and (B, top) float32, the highest first: which rows, and their products.
    """
    if len(among) >= FAISS_FROM and len(rows) <= FAISS_ROWS and faiss() is not None:
        return by_faiss(rows, among, top)
    return by_product(rows, among, top)


def by_product(rows: np.ndarray, among: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`nearest_rows` by a matrix product, (B, T) numbers of which are in memory at a time."""
    scores = rows @ among.T
    best = np.argpartition(scores, -top, axis=1)[:, -top:] if top > 1 else scores.argmax(1)[:, None]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), 1, kind="stable"), 1)
    return best, np.take_along_axis(scores, best, 1)


def by_faiss(rows: np.ndarray, among: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """:func:`nearest_rows` by faiss, which compares with all rows, too, and copies none of them."""
    scores, best = faiss().knn(rows, np.ascontiguousarray(among), top, metric=faiss().METRIC_INNER_PRODUCT)
    return best, scores


@functools.cache
def faiss() -> ModuleType | None:
    """The module, which the extra ``faiss`` brings; None where it is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss
