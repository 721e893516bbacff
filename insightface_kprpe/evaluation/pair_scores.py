"""Scores of millions of pairs of templates, from matrix products of blocks."""

from __future__ import annotations

import numpy as np

from .metrics import SCORE_DECIMALS, to_numpy

SCORE_BLOCK_BYTES = 1 << 26
# One pair costs about as much time as this many entries of a matrix product over the same templates.
PRODUCT_ENTRIES_PER_PAIR = 64
# Template numbers within such a range are looked up in a table, others searched (ten times slower).
LOOKUP_SPAN = 1 << 24


def positions(known: np.ndarray, wanted: np.ndarray, name: str) -> np.ndarray:
    """The index of each wanted template among the known ones, in the smallest dtype that holds it.

    Args:
        known: (T,) int, ascending.
        wanted: (N,) int.
        name: of ``wanted``, for errors.

    Raises:
        ValueError: they are not whole numbers, or one is not known.
    """
    wanted = to_numpy(wanted)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a list of template numbers, got {wanted.dtype} of shape {wanted.shape}")
    smallest = np.min_scalar_type(len(known))
    offset = wanted.astype(np.int64) - int(known[0])
    span = int(known[-1]) - int(known[0]) + 1
    if span <= LOOKUP_SPAN:
        table = np.full(span + 1, len(known), dtype=smallest)  # the last entry stands for everything outside
        table[known - known[0]] = np.arange(len(known))
        offset[(offset < 0) | (offset >= span)] = span
        position = table[offset]
        unknown = position == len(known)
    else:
        position = np.minimum(np.searchsorted(known, wanted), len(known) - 1).astype(smallest)
        unknown = known[position] != wanted
    if unknown.any():
        missing = np.unique(wanted[unknown])
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{name} names templates that have no images ({len(missing)}): {shown}")
    return position


def pair_scores(pooled: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dot products of pairs of rows, read from blocks of the matrix of all rows with all rows.

    Templates of the side with fewer different ones come first and each pair is turned so that its earlier template
    gives the row. If pairs join galleries and probes, only the galleries' rows are computed; otherwise half the matrix
    is.

    Args:
        pooled: (T, D) float64; is overwritten.
        first, second: (pairs,) unsigned int, rows; are overwritten.

    Returns:
        (pairs,) float64, rounded to ``SCORE_DECIMALS``.
    """
    used = [np.bincount(side, minlength=len(pooled)) > 0 for side in (first, second)]
    lead, other = sorted(used, key=np.count_nonzero)
    order = np.concatenate([np.flatnonzero(lead), np.flatnonzero(other & ~lead)])
    pooled[: len(order)] = pooled[order]
    pooled = pooled[: len(order)]
    rank = np.empty(len(lead), dtype=first.dtype)
    rank[order] = np.arange(len(order))
    rank.take(first, out=first)
    rank.take(second, out=second)
    turned = np.flatnonzero(first > second)
    first[turned], second[turned] = second[turned], first[turned]

    step = min(len(pooled), max(64, SCORE_BLOCK_BYTES // (8 * len(pooled)), len(pooled) >> 15))
    starts = np.arange(0, len(pooled), step)
    block = (first // step).astype(np.uint16)  # few bits: sorted by radix, in linear time
    pairs = np.argsort(block, kind="stable")
    ends = np.searchsorted(block, np.arange(len(starts)), side="right", sorter=pairs)
    pairs = pairs.astype(np.min_scalar_type(len(pairs)))  # half the memory
    buffer = np.empty(step * len(pooled))  # one for all blocks: fresh memory would cost more time than the product
    scores = np.empty(len(first))
    for start, begin, end in zip(starts, np.append(0, ends), ends, strict=False):
        chosen = pairs[begin:end]
        if not len(chosen):
            continue
        rows, columns = first[chosen].astype(np.intp) - start, second[chosen].astype(np.intp) - start
        height, width = int(rows.max()) + 1, len(pooled) - start
        if height * width <= PRODUCT_ENTRIES_PER_PAIR * len(chosen):
            product = buffer[: height * width].reshape(height, width)
            np.matmul(pooled[start : start + height], pooled[start:].T, out=product)
            scores[chosen] = buffer.take(rows * width + columns)
        else:
            for part in range(0, len(chosen), 8192):
                take = slice(part, part + 8192)
                a, b = pooled[start + rows[take]], pooled[start + columns[take]]
                scores[chosen[take]] = np.einsum("pd,pd->p", a, b)
    return np.round(scores, SCORE_DECIMALS, out=scores)
