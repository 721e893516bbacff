"""1:N search: probes against a gallery, in blocks that fit into memory, without sorting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .metrics import Matches, inverse_norms, unit_rows


def match_scores(scores: np.ndarray, is_mate: np.ndarray) -> Matches:
    """Reduce a score matrix to one mate score, one other score and one rank for each probe.

    An other that ties with the mate ranks before it, so that a model whose scores are all equal recognises nobody.

    Args:
        scores: (P, G) float, probes against gallery.
        is_mate: (P, G) bool, same identity.

    Raises:
        ValueError: shapes differ or scores are not finite.
    """
    scores, is_mate = np.asarray(scores), np.asarray(is_mate, dtype=bool)
    if scores.ndim != 2 or scores.shape != is_mate.shape or not scores.size:
        raise ValueError(f"scores and is_mate must both be (P, G), got {scores.shape} and {is_mate.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or Inf")
    copied = scores.astype(np.result_type(scores, np.float32))
    return _reduce(copied, *np.nonzero(is_mate))


def search(
    probe: np.ndarray,
    gallery: np.ndarray,
    probe_ids: Sequence,
    gallery_ids: Sequence,
    block_bytes: int = 3 << 26,
) -> Matches:
    """Cosine search of probes in a gallery by float32 matrix products in blocks of probes.

    Args:
        probe: (P, D) float, need not be normalised.
        gallery: (G, D) float, several entries may share an identity.
        probe_ids: (P,) identities, integers or strings.
        gallery_ids: (G,) identities of the same kind; a distractor is an entry whose identity no probe has.
        block_bytes: size of one block of scores.

    Raises:
        ValueError: shapes do not fit or values are not finite.
    """
    probe_ids, gallery_ids = np.asarray(probe_ids), np.asarray(gallery_ids)
    probe = unit_rows(probe, "probe", np.float32)
    gallery_scale = inverse_norms(gallery, "gallery").astype(np.float32)
    gallery = np.asarray(gallery, dtype=np.float32)
    if not probe.size or not gallery.size or probe.shape[1] != gallery.shape[1]:
        raise ValueError(f"probe and gallery must be (P, D) and (G, D), got {probe.shape} and {gallery.shape}")
    if probe_ids.shape != probe.shape[:1] or gallery_ids.shape != gallery.shape[:1]:
        raise ValueError(
            f"probe_ids and gallery_ids must name each row ({len(probe)} and {len(gallery)}), "
            f"got {probe_ids.shape} and {gallery_ids.shape}"
        )
    order = np.argsort(gallery_ids, kind="stable")
    first = np.searchsorted(gallery_ids, probe_ids, "left", sorter=order)
    mates = np.searchsorted(gallery_ids, probe_ids, "right", sorter=order) - first  # (P,) how many

    step = max(1, block_bytes // (4 * len(gallery)))
    buffer = np.empty((min(step, len(probe)), len(gallery)), dtype=np.float32)
    blocks = []
    for start in range(0, len(probe), step):
        rows = slice(start, start + step)
        scores = np.matmul(probe[rows], gallery.T, out=buffer[: len(probe[rows])])
        scores *= gallery_scale
        counts = mates[rows]
        mate_row = np.repeat(np.arange(len(counts)), counts)
        nth_mate = np.arange(len(mate_row)) - np.repeat(counts.cumsum() - counts, counts)
        blocks.append(_reduce(scores, mate_row, order[first[rows][mate_row] + nth_mate]))
    return Matches(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _reduce(scores: np.ndarray, mate_row: np.ndarray, mate_column: np.ndarray) -> Matches:
    """``match_scores`` for mates given by index; overwrites their scores."""
    mate_score = np.full(len(scores), -np.inf, dtype=scores.dtype)
    np.maximum.at(mate_score, mate_row, scores[mate_row, mate_column])
    scores[mate_row, mate_column] = -np.inf
    other_score = scores.max(1)
    rank = np.isfinite(mate_score).astype(np.int64)
    for row in np.flatnonzero(rank & (other_score >= mate_score)):
        rank[row] += np.count_nonzero(scores[row] >= mate_score[row])
    return Matches(mate_score, other_score, rank)
