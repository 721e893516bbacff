"""The pairs that a model judges worst, as numbers and as a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..contact_sheet import CELL, arrange, face_cell, title_bar, write_sheet
from .metrics import split_scores, to_numpy


class HardestPairs(NamedTuple):
    """Indices of pairs among those that were scored, the worst first."""

    false_accepts: np.ndarray  # (up to count,) int, different people with the highest cosines
    false_rejects: np.ndarray  # (up to count,) int, the same person with the lowest cosines


def hardest_pairs(scores: np.ndarray, is_same: np.ndarray, count: int) -> HardestPairs:
    """Find the most similar pairs of different people, and the least similar pairs of the same person.

    Args:
        scores: (P,) cosines.
        is_same: (P,) bool or 0/1.
        count: how many of each kind; all, if there are fewer. Tied pairs keep their order.

    Raises:
        ValueError: count is below 1, shapes differ, scores are not finite, or pairs are of one kind only.
    """
    if count < 1:
        raise ValueError(f"count must be 1 or more pairs of each kind, got {count}")
    scores, is_same = to_numpy(scores), to_numpy(is_same)
    split_scores(scores, is_same)
    same, different = np.flatnonzero(is_same), np.flatnonzero(~is_same.astype(bool))
    return HardestPairs(different[_lowest(-scores[different], count)], same[_lowest(scores[same], count)])


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` lowest values are, in ascending order, ties in their order; sorts only those."""
    count = min(count, len(values))
    limit = np.partition(values, count - 1)[count - 1]
    candidates = np.flatnonzero(values <= limit)
    return candidates[np.argsort(values[candidates], kind="stable")[:count]]


def write_hardest_pairs(
    path: str | Path,
    read: Callable[[int], np.ndarray] | Sequence[np.ndarray],
    pairs: np.ndarray,
    scores: np.ndarray,
    is_same: np.ndarray,
    count: int = 16,
    keypoints: np.ndarray | None = None,
    columns: int = 4,
) -> HardestPairs:
    """Write a PNG of the hardest pairs: false accepts above, false rejects below, each pair with its cosine.

    Args:
        path: the PNG.
        read: the images (H, W, 3) uint8 RGB, or what returns one by its index; only those shown are read.
        pairs: (P, 2) int, indices of the two images of each pair; for templates, one image that stands for each.
        scores: (P,) cosines.
        is_same: (P,) bool or 0/1.
        count: pairs of each kind.
        keypoints: (N, 5, 2) xy in [0, 1] of the images, drawn where given.
        columns: pairs side by side.

    Returns:
        The pairs shown.

    Raises:
        ValueError: as for ``hardest_pairs``, or pairs do not match scores.
    """
    pairs = np.asarray(pairs)
    if pairs.shape != (len(scores), 2):
        raise ValueError(f"pairs must be ({len(scores)}, 2), two images per score, got {pairs.shape}")
    read = read if callable(read) else read.__getitem__
    hardest = hardest_pairs(scores, is_same, count)
    width = 2 * columns * CELL
    parts = []
    for title, chosen in (
        ("different people, highest cosine (false accepts)", hardest.false_accepts),
        ("the same person, lowest cosine (false rejects)", hardest.false_rejects),
    ):
        cells = []
        for pair in chosen:
            captions = (f"{scores[pair]:+.3f}  pair {pair}", "")
            faces = zip(pairs[pair], captions, strict=True)
            cells.append(
                np.hstack([face_cell(read(i), None if keypoints is None else keypoints[i], text) for i, text in faces])
            )
            cells[-1][:, [0, -1]] = cells[-1][[0, -1]] = 96  # a frame that keeps pairs apart
        parts += [title_bar(title, width), arrange(cells, columns)]
    write_sheet(path, np.vstack(parts))
    return hardest
