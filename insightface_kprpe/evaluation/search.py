"""1:N search: probes against a gallery, in blocks that fit into memory, without sorting, and the rates that follow.

In the terms of NIST, comparisons of the same person are mated, all others nonmated. Every rate is a fraction in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .metrics import SCORE_DECIMALS, OperatingPoint, inverse_norms, to_numpy, unit_rows


class Matches(NamedTuple):
    """The result of a 1:N search for each of P probes."""

    mated_score: np.ndarray  # (P,) float, the best mated score; -inf if the probe has no mate in the gallery
    nonmated_score: np.ndarray  # (P,) float, the best nonmated score; -inf if all entries are mates
    rank: np.ndarray  # (P,) int, 1 + number of nonmated scores at least as high as the best mated one; 0 without mate
    highest_nonmated: np.ndarray = np.empty(0)  # (n,) float, the highest of all probes' nonmated scores, descending


def match_scores(scores: np.ndarray, is_mate: np.ndarray, highest: int = 0) -> Matches:
    """Reduce a score matrix to a mated score, a nonmated score and a rank for each probe.

    A nonmated score that ties with the mated one ranks before it, so that a model whose scores are all equal recognizes
    nobody.

    Args:
        scores: (P, G) float, probes against gallery.
        is_mate: (P, G) bool, same identity.
        highest: keep this many of the highest nonmated scores (all, if there are fewer).

    Raises:
        ValueError: shapes differ or scores are not finite.
    """
    scores, is_mate = to_numpy(scores), to_numpy(is_mate).astype(bool)
    if scores.ndim != 2 or scores.shape != is_mate.shape or not scores.size:
        raise ValueError(f"scores and is_mate must both be (P, G), got {scores.shape} and {is_mate.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or Inf")
    copied = scores.astype(np.result_type(scores, np.float32))
    matches = _reduce(copied, *np.nonzero(is_mate))
    return matches._replace(highest_nonmated=_highest(copied, np.empty(0, copied.dtype), highest))


def search(
    probe: np.ndarray,
    gallery: np.ndarray,
    probe_ids: Sequence,
    gallery_ids: Sequence,
    highest: int = 0,
    block_bytes: int = 3 << 26,
) -> Matches:
    """Cosine search of probes in a gallery by matrix products in blocks of probes.

    Products are float64 if both sides are, and mathematically equal cosines are then equal; otherwise float32.

    Args:
        probe: (P, D) float, need not be normalized.
        gallery: (G, D) float, several entries may share an identity.
        probe_ids: (P,) identities, integers or strings.
        gallery_ids: (G,) identities of the same kind; a distractor is an entry whose identity no probe has.
        highest: keep this many of the highest nonmated scores (all, if there are fewer).
        block_bytes: size of one block of scores.

    Raises:
        ValueError: shapes do not fit or values are not finite.
    """
    probe, gallery = to_numpy(probe), to_numpy(gallery)
    probe_ids, gallery_ids = to_numpy(probe_ids), to_numpy(gallery_ids)
    dtype = np.float64 if probe.dtype == gallery.dtype == np.float64 else np.float32
    probe = unit_rows(probe, "probe", dtype)
    gallery_scale = inverse_norms(gallery, "gallery").astype(dtype)
    gallery = np.asarray(gallery, dtype=dtype)
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

    step = max(1, block_bytes // (probe.itemsize * len(gallery)))
    buffer = np.empty((min(step, len(probe)), len(gallery)), dtype=dtype)
    blocks, kept = [], np.empty(0, dtype)
    for start in range(0, len(probe), step):
        rows = slice(start, start + step)
        scores = np.matmul(probe[rows], gallery.T, out=buffer[: len(probe[rows])])
        scores *= gallery_scale
        if dtype is np.float64:
            np.round(scores, SCORE_DECIMALS, out=scores)
        counts = mates[rows]
        mate_row = np.repeat(np.arange(len(counts)), counts)
        nth_mate = np.arange(len(mate_row)) - np.repeat(counts.cumsum() - counts, counts)
        blocks.append(_reduce(scores, mate_row, order[first[rows][mate_row] + nth_mate])[:3])
        kept = _highest(scores, kept, highest)
    return Matches(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)), kept)


def _reduce(scores: np.ndarray, mate_row: np.ndarray, mate_column: np.ndarray) -> Matches:
    """``match_scores`` for mates given by index; overwrites their scores with -inf."""
    mated = np.full(len(scores), -np.inf, dtype=scores.dtype)
    np.maximum.at(mated, mate_row, scores[mate_row, mate_column])
    scores[mate_row, mate_column] = -np.inf
    nonmated = scores.max(1)
    rank = np.isfinite(mated).astype(np.int64)
    for row in np.flatnonzero(rank & (nonmated >= mated)):
        rank[row] += np.count_nonzero(scores[row] >= mated[row])
    return Matches(mated, nonmated, rank)


def _highest(scores: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` highest finite values of ``scores`` and of those kept before, descending."""
    if not count:
        return kept
    least = kept[-1] if len(kept) == count else -np.inf
    values = np.concatenate([kept, scores[scores > least]])
    if len(values) > count:
        values = np.partition(values, len(values) - count)[-count:]
    return np.sort(values)[::-1]


def rank_k(matches: Matches, ranks: Sequence[int] = (1, 5, 20)) -> dict[int, float]:
    """Closed-set identification: how many of the probes with a mate find it among the first k (a CMC curve).

    Returns:
        k -> rate, a fraction.

    Raises:
        ValueError: a rank is below 1, or no probe has a mate.
    """
    found = matches.rank[matches.rank > 0]
    if not len(found):
        raise ValueError("no probe has its identity in the gallery; check that both use the same identity labels")
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks must be 1 or more, got {list(ranks)}")
    return {int(rank): float((found <= rank).mean()) for rank in ranks}


def tpir_at_fpir(matches: Matches, fpirs: Sequence[float] = (0.01, 0.1), rank: int = 1) -> list[OperatingPoint]:
    """Open-set identification: how many of the probes with a mate find it within ``rank`` and above a threshold.

    The threshold is the best score of the n-th strongest probe without a mate, n = round(FPIR * such probes).

    Args:
        matches: result of ``search`` or ``match_scores``.
        fpirs: false positive identification rates.
        rank: the worst rank at which the mate counts.

    Raises:
        ValueError: a rate is outside [0, 1], or there are no probes with a mate, or none without one.
    """
    has_mate = matches.rank > 0
    impostors = np.sort(matches.nonmated_score[~has_mate])[::-1]
    if not has_mate.any() or not len(impostors):
        raise ValueError(
            f"open-set identification needs probes inside and outside the gallery, got {has_mate.sum()} inside and "
            f"{len(impostors)} outside"
        )
    if not all(0 <= fpir <= 1 for fpir in fpirs):
        raise ValueError(f"fpirs must be fractions in [0, 1], got {list(fpirs)}")
    points = []
    for fpir in fpirs:
        alarms = round(fpir * len(impostors))
        threshold = impostors[alarms - 1] if alarms else np.nextafter(impostors[0], np.inf, dtype=impostors.dtype)
        found = (matches.mated_score >= threshold) & (matches.rank <= rank) & has_mate
        reached = float((impostors >= threshold).mean())
        points.append(OperatingPoint(fpir, reached, float(found.sum() / has_mate.sum()), float(threshold)))
    return points


def count_for_far(probes: int, far: float) -> int:
    """The rank of the nonmated score that ``tpir_at_far`` uses as threshold: ``ceil(probes * far)``."""
    return math.ceil(probes * far)


def tpir_at_far(matches: Matches, fars: Sequence[float] = (0.01, 0.1)) -> list[OperatingPoint]:
    """Identification above a threshold as InsightFace's ``ijb_1n.py`` measures it: how many mated scores exceed it.

    The threshold is the ceil(P * FAR)-th highest of all nonmated scores. So "FAR" counts false alarms per probe, of
    which one probe can cause many, and the mate need not be first: this is neither an FPIR nor a false accept rate.

    Args:
        matches: of P probes that all have a mate, with at least ``count_for_far`` of ``highest_nonmated``.
        fars: false alarms per probe, above 0.

    Returns:
        One point for each of ``fars``; ``fpr`` is the number of nonmated scores above the threshold over P, and only
        what is above the threshold is accepted.

    Raises:
        ValueError: a probe has no mate, a rate is not in (0, 1], or there are fewer nonmated scores.
    """
    probes = len(matches.rank)
    if not (matches.rank > 0).all():
        raise ValueError(f"all probes must have a mate in the gallery, {(matches.rank == 0).sum()} of {probes} do not")
    if not all(0 < far <= 1 for far in fars):
        raise ValueError(f"fars must be fractions in (0, 1], got {list(fars)}")
    wanted = count_for_far(probes, max(fars, default=0))
    if wanted > len(matches.highest_nonmated):
        raise ValueError(
            f"{wanted} nonmated scores are needed, got {len(matches.highest_nonmated)}: search with highest={wanted}, "
            "in a gallery that is large enough"
        )
    points = []
    for far in fars:
        threshold = matches.highest_nonmated[count_for_far(probes, far) - 1]
        above = float((matches.highest_nonmated > threshold).sum() / probes)
        points.append(OperatingPoint(far, above, float((matches.mated_score > threshold).mean()), float(threshold)))
    return points
