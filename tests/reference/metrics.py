"""Verification and identification, one threshold, pair or probe at a time. Every rate is a fraction."""

from __future__ import annotations

import numpy as np

THRESHOLDS = np.arange(0, 4, 0.01)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def kfold_accuracy(a: np.ndarray, b: np.ndarray, is_same: np.ndarray, folds: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy and squared-distance threshold of each fold: the first that is best on the other folds."""
    distance = ((unit(a) - unit(b)) ** 2).sum(1)
    accuracies, chosen = [], []
    for test in np.array_split(np.arange(len(a)), folds):
        train = np.setdiff1d(np.arange(len(a)), test)
        tried = [((distance[train] < threshold) == is_same[train]).mean() for threshold in THRESHOLDS]
        chosen.append(THRESHOLDS[int(np.argmax(tried))])
        accuracies.append(((distance[test] < chosen[-1]) == is_same[test]).mean())
    return np.array(accuracies), np.array(chosen)


def roc_corners(scores: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float]]:
    """(FPR, TPR, threshold) of the points that scikit-learn's roc_curve keeps."""
    distinct = np.unique(scores)[::-1]
    false = np.array([(scores[~labels] >= t).sum() for t in distinct])
    true = np.array([(scores[labels] >= t).sum() for t in distinct])
    keep = np.ones(len(distinct), dtype=bool)
    for i in range(1, len(distinct) - 1):
        keep[i] = false[i + 1] - 2 * false[i] + false[i - 1] != 0 or true[i + 1] - 2 * true[i] + true[i - 1] != 0
    rows = [(0.0, 0.0, np.inf)]
    rows += [(f / false[-1], t / true[-1], s) for f, t, s, k in zip(false, true, distinct, keep, strict=True) if k]
    return rows


def tpr_at_fpr(scores: np.ndarray, labels: np.ndarray, target: float) -> tuple[float, float, float]:
    """(FPR, TPR, threshold) of the loosest score whose FPR does not exceed the target; infinite if none."""
    best = (0.0, 0.0, np.inf)
    for threshold in np.unique(scores)[::-1]:
        fpr = (scores[~labels] >= threshold).mean()
        if fpr <= target:
            best = (fpr, (scores[labels] >= threshold).mean(), threshold)
    return best


def nearest_on_roc(scores: np.ndarray, labels: np.ndarray, target: float) -> tuple[float, float, float]:
    """(FPR, TPR, threshold) that InsightFace's IJB scripts take: the nearest corner, the loosest of equally near."""
    return min(reversed(roc_corners(scores, labels)), key=lambda corner: abs(corner[0] - target))


def val_at_far(
    a: np.ndarray, b: np.ndarray, is_same: np.ndarray, target: float, folds: int
) -> tuple[np.ndarray, np.ndarray]:
    """VAL and FAR of each fold at the squared distance where a line through the other folds' FAR reaches the target."""
    distance = ((unit(a) - unit(b)) ** 2).sum(1)
    thresholds = np.arange(0, 4, 0.001)
    rates = []
    for test in np.array_split(np.arange(len(a)), folds):
        train = np.setdiff1d(np.arange(len(a)), test)
        far = (distance[train][~is_same[train], None] < thresholds).mean(0)
        chosen = 0.0
        if far.max() >= target:
            before = max(i for i in range(len(far)) if far[i] <= target)
            chosen = thresholds[before]
            if before + 1 < len(far):
                chosen += (target - far[before]) / (far[before + 1] - far[before]) * 0.001
        accepted = distance[test] < chosen
        rates.append((accepted[is_same[test]].mean(), accepted[~is_same[test]].mean()))
    val, far = np.array(rates).T
    return val, far


def insightface_1n(
    probe: np.ndarray, gallery: np.ndarray, probe_ids: np.ndarray, gallery_ids: np.ndarray, fars: tuple[float, ...]
) -> dict[str, float]:
    """Rank-1 and the rate of mated similarities above the ceil(P * FAR)-th largest of the nonmated ones."""
    similarity = unit(probe) @ unit(gallery).T
    mate = [int(np.flatnonzero(gallery_ids == who)[0]) for who in probe_ids]
    mated = np.array([row[m] for row, m in zip(similarity, mate, strict=True)])
    nonmated = np.concatenate([np.delete(row, m) for row, m in zip(similarity, mate, strict=True)])
    nonmated = sorted(nonmated, reverse=True)
    result = {"rank_1": np.mean([row.argmax() == m for row, m in zip(similarity, mate, strict=True)])}
    for far in fars:
        threshold = nonmated[int(np.ceil(len(probe) * far)) - 1]
        result |= {f"tpir_at_far_{far}": (mated > threshold).mean(), f"thresh_at_far_{far}": threshold}
    return result


def match(scores: np.ndarray, is_mate: np.ndarray) -> tuple[float, float, int]:
    """One probe against a gallery: best mate, best other, and 1 + the others that score as high as the best mate."""
    others = scores[~is_mate]
    best_other = max(others, default=-np.inf)
    if not is_mate.any():
        return -np.inf, best_other, 0
    best = max(scores[is_mate])
    return best, best_other, 1 + sum(other >= best for other in others)


def rank_k(ranks: np.ndarray, k: int) -> float:
    """Share of the probes with a mate (rank above 0) whose rank is k at most."""
    with_mate = [rank for rank in ranks if rank > 0]
    return sum(rank <= k for rank in with_mate) / len(with_mate)


def tpir_at_fpir(
    mate: np.ndarray, other: np.ndarray, ranks: np.ndarray, fpir: float, k: int
) -> tuple[float, float, float | None]:
    """(FPIR, TPIR, threshold): the n-th strongest probe without a mate sets off the last alarm allowed.

    Without any alarm allowed the threshold (None) is just above the strongest.
    """
    outside = sorted((score for score, rank in zip(other, ranks, strict=True) if rank == 0), reverse=True)
    alarms = round(fpir * len(outside))
    threshold = outside[alarms - 1] if alarms else None
    found = [
        rank <= k and (score >= threshold if alarms else score > outside[0])
        for score, rank in zip(mate, ranks, strict=True)
        if rank > 0
    ]
    reached = sum(alarms > 0 and score >= threshold for score in outside) / len(outside)
    return reached, sum(found) / len(found), threshold
