"""Metrics of 1:1 verification, exact and independent of files and models; ``search`` has those of 1:N.

Every rate is a fraction in [0, 1], a score is a cosine. Arrays may be torch tensors, with gradients or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

# InsightFace's thresholds: squared distances between unit vectors, and finer ones for VAL@FAR.
DISTANCE_THRESHOLDS = np.arange(0, 4, 0.01)
FINE_DISTANCE_THRESHOLDS = np.arange(0, 4, 0.001)
# Cosines in float64 are rounded to this many decimals, so that mathematically equal scores, such as those of duplicate
# images, are equal; the order of summation causes errors of about 1e-15.
SCORE_DECIMALS = 10

ThresholdRule = Literal["insightface", "at_most"]


class KFoldResult(NamedTuple):
    """Verification accuracy over folds; distances are squared Euclidean between unit vectors, in [0, 4]."""

    accuracy: float  # mean over folds
    std: float  # standard deviation over folds
    threshold: float  # mean over folds; a pair is "same" below it
    fold_accuracies: np.ndarray  # (folds,)
    fold_thresholds: np.ndarray  # (folds,)

    @property
    def cosine_threshold(self) -> float:
        """The same threshold for cosine scores: a pair is "same" above it."""
        return 1 - self.threshold / 2


class ValidationRate(NamedTuple):
    """What arcface_torch calls VAL@FAR: the rate of same pairs accepted at a threshold found on the other folds."""

    val: float  # mean over folds
    std: float  # standard deviation over folds
    far: float  # mean over folds of the rate of different pairs accepted, where ``target`` was asked for
    target: float


class OperatingPoint(NamedTuple):
    """One point of a ROC (TPR at FPR) or of an open-set search (TPIR at FPIR)."""

    target: float  # the requested false positive rate
    fpr: float  # the actual one
    tpr: float
    threshold: float  # scores at or above it are accepted; infinite if none are


class Roc(NamedTuple):
    """ROC points from the strictest threshold (infinite) to the loosest."""

    false_positives: np.ndarray  # (points,) int, negatives at or above the threshold
    true_positives: np.ndarray  # (points,) int
    thresholds: np.ndarray  # (points,)
    is_corner: np.ndarray  # (points,) bool, False where scikit-learn's roc_curve leaves the point out


def to_numpy(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Values as an array; a tensor is detached and moved to the CPU."""
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype is torch.bfloat16 else values).numpy()


def unit_rows(embeddings: np.ndarray, name: str = "embeddings", dtype: type = np.float64) -> np.ndarray:
    """Divide each row by its length; a zero row stays zero, and so is equally dissimilar to everything.

    Args:
        embeddings: (N, D) float.
        name: of the argument, for errors.
        dtype: of the result.

    Raises:
        ValueError: not (N, D), or a row is not finite.
    """
    embeddings = to_numpy(embeddings)
    return np.asarray(embeddings, dtype=dtype) * inverse_norms(embeddings, name).astype(dtype)[:, None]


def inverse_norms(embeddings: np.ndarray, name: str = "embeddings") -> np.ndarray:
    """1 / length of each row as (N,) float64, 0 for a zero row; checked like ``unit_rows``."""
    embeddings = to_numpy(embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f"{name} must be (N, D), got shape {embeddings.shape}")
    squares = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
    if not np.isfinite(squares).all():
        bad = np.flatnonzero(~np.isfinite(squares))
        raise ValueError(
            f"{name} must be finite, got NaN or Inf in {len(bad)} of {len(squares)} rows (first: row {bad[0]}); "
            "check the model's output for those images"
        )
    norms = np.sqrt(squares)
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _as_bool(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    """Check that labels are ``count`` zeros and ones with both present."""
    labels = to_numpy(labels)
    truth = labels.astype(bool)
    if truth.shape != (count,) or not (labels == truth).all():
        raise ValueError(f"{name} must be ({count},) zeros and ones, one per pair, got shape {labels.shape}")
    if truth.all() or not truth.any():
        kind = "positive" if truth.any() else "negative"
        raise ValueError(f"{name} must hold both same and different pairs, got {count} {kind} ones only")
    return truth


def kfold_accuracy(
    embeddings_a: np.ndarray, embeddings_b: np.ndarray, is_same: np.ndarray, folds: int = 10
) -> KFoldResult:
    """Verification accuracy as InsightFace measures it on LFW, CFP-FP, AgeDB and other ``.bin`` sets.

    Folds are consecutive pairs. The first threshold that is best on the other folds is applied to each fold.

    Args:
        embeddings_a: (N, D) float, first image of each pair; need not be normalized.
        embeddings_b: (N, D) float, second image.
        is_same: (N,) bool or 0/1.
        folds: number of folds, 2 to N.

    Raises:
        ValueError: shapes differ, values are not finite, pairs are of one kind, or there are fewer pairs than folds.
    """
    distance, is_same, fold = _pairs_in_folds(embeddings_a, embeddings_b, is_same, folds)
    sizes, different = (np.bincount(fold[chosen], minlength=folds) for chosen in (slice(None), ~is_same))
    accepted = [_accepted(distance[kind], fold[kind], folds, DISTANCE_THRESHOLDS) for kind in (is_same, ~is_same)]
    correct = different[:, None] + accepted[0] - accepted[1]  # (folds, steps)
    best = (correct.sum(0) - correct).argmax(1)

    accuracies = correct[np.arange(folds), best] / sizes
    thresholds = DISTANCE_THRESHOLDS[best]
    return KFoldResult(
        float(accuracies.mean()), float(accuracies.std()), float(thresholds.mean()), accuracies, thresholds
    )


def val_at_far(
    embeddings_a: np.ndarray, embeddings_b: np.ndarray, is_same: np.ndarray, far: float = 1e-3, folds: int = 10
) -> ValidationRate:
    """VAL@FAR as arcface_torch's ``eval/verification.py`` (and facenet before it) defines it.

    The threshold of a fold is where the FAR of the other folds, drawn as a line over 4,000 thresholds, reaches ``far``:
    between the last one that does not exceed it and the next. It is 0, and accepts nobody, if no threshold reaches it.
    arcface_torch uses SciPy's interpolation, whose current versions refuse such lines.

    Args:
        embeddings_a, embeddings_b, is_same, folds: as for ``kfold_accuracy``.
        far: false accept rate, a fraction.

    Returns:
        Means over the folds that have pairs of both kinds; NaN if there is no such fold.

    Raises:
        ValueError: as for ``kfold_accuracy``, or the rate is outside [0, 1].
    """
    if not 0 <= far <= 1:
        raise ValueError(f"far must be a fraction in [0, 1], got {far}")
    distance, is_same, fold = _pairs_in_folds(embeddings_a, embeddings_b, is_same, folds)
    steps = FINE_DISTANCE_THRESHOLDS
    counts = _accepted(distance[~is_same], fold[~is_same], folds, steps)
    different = np.bincount(fold[~is_same], minlength=folds)
    rates = []
    for test in range(folds):
        same_here, different_here = (distance[(fold == test) & kind] for kind in (is_same, ~is_same))
        if not len(same_here) or not len(different_here):
            continue
        others = max(different.sum() - different[test], 1)
        reached = (counts.sum(0) - counts[test]) / others
        threshold = 0.0 if reached[-1] < far else float(np.interp(far, reached, steps))
        rates.append(((same_here < threshold).mean(), (different_here < threshold).mean()))
    val, reached_far = np.array(rates).reshape(-1, 2).T if rates else np.full((2, 1), np.nan)
    return ValidationRate(float(val.mean()), float(val.std()), float(reached_far.mean()), far)


def _pairs_in_folds(
    embeddings_a: np.ndarray, embeddings_b: np.ndarray, is_same: np.ndarray, folds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) squared distances of unit vectors, labels, and fold of each pair; consecutive ones, the first longer."""
    a, b = unit_rows(embeddings_a, "embeddings_a"), unit_rows(embeddings_b, "embeddings_b")
    if a.shape != b.shape:
        raise ValueError(f"embeddings_a and embeddings_b must have the same shape, got {a.shape} and {b.shape}")
    is_same = _as_bool(is_same, len(a), "is_same")
    if not 2 <= folds <= len(a):
        raise ValueError(f"folds must be 2 to the number of pairs ({len(a)}), got {folds}")
    sizes = np.full(folds, len(a) // folds)
    sizes[: len(a) % folds] += 1
    return np.square(a - b).sum(1), is_same, np.repeat(np.arange(folds), sizes)


def _accepted(distance: np.ndarray, fold: np.ndarray, folds: int, thresholds: np.ndarray) -> np.ndarray:
    """(folds, thresholds) how many pairs of each fold are nearer than each threshold."""
    first_above = np.searchsorted(thresholds, distance, side="right")
    counts = np.zeros((folds, len(thresholds) + 1), dtype=np.int64)
    np.add.at(counts, (fold, first_above), 1)
    return counts[:, :-1].cumsum(1)


def roc(scores: np.ndarray, labels: np.ndarray) -> Roc:
    """All points of the ROC curve, for plotting; see ``tpr_at_fpr`` for the arguments and errors."""
    positives, negatives = split_scores(scores, labels)
    return _roc_head(positives, negatives, len(negatives))


def tpr_at_fpr(
    scores: np.ndarray, labels: np.ndarray, fprs: Sequence[float], rule: ThresholdRule = "at_most"
) -> list[OperatingPoint]:
    """True positive rate at false positive rates, exact also where scores tie.

    Only the highest-scoring negatives are sorted, as many as the largest of ``fprs`` needs.

    Args:
        scores: (N,) float, higher is more alike.
        labels: (N,) bool or 0/1, 1 for the same person.
        fprs: false positive rates.
        rule: ``"at_most"`` takes the highest TPR whose FPR does not exceed the target. ``"insightface"`` takes what
            InsightFace's IJB scripts take: the point nearest to the target, above or below it, among the corners that
            scikit-learn's ``roc_curve`` keeps (the looser one of two equally near).

    Returns:
        One point for each of ``fprs``. If the rule accepts no score, e.g. because more of the highest are tied than the
        rate allows, the TPR is 0 and the threshold infinite.

    Raises:
        ValueError: shapes differ, a score is not finite, one class is missing, a rate is outside [0, 1].
    """
    if not all(0 <= fpr <= 1 for fpr in fprs):
        raise ValueError(f"fprs must be fractions in [0, 1], got {list(fprs)}")
    if rule not in ("insightface", "at_most"):
        raise ValueError(f"rule must be 'insightface' or 'at_most', got {rule!r}")
    positives, negatives = split_scores(scores, labels)
    count = int(max(fprs, default=0) * len(negatives) * 1.5) + 1000
    while True:
        count = min(count, len(negatives))
        curve = _roc_head(positives, negatives, count)
        points = [_pick(curve, fpr, len(positives), len(negatives), rule) for fpr in fprs]
        if count == len(negatives) or None not in points:
            return points
        count *= 4


def split_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copies of the scores of the positives and of the negatives, checked as ``tpr_at_fpr`` says."""
    scores = to_numpy(scores)
    if scores.ndim != 1:
        raise ValueError(f"scores must be (N,), got shape {scores.shape}")
    labels = _as_bool(labels, len(scores), "labels")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got NaN or Inf in {(~np.isfinite(scores)).sum()} of {len(scores)}")
    return scores[labels], scores[~labels]


def _roc_head(positives: np.ndarray, negatives: np.ndarray, count: int) -> Roc:
    """The ROC from its strict end to about ``count`` false positives; complete if that is all negatives.

    Reorders ``negatives`` in place.
    """
    whole = count == len(negatives)
    if not whole:
        negatives.partition(len(negatives) - count)
        negatives = negatives[-count:]
        cut = negatives.min()  # some scores equal to it were left out
        positives, negatives = positives[positives > cut], negatives[negatives > cut]
    scores = np.concatenate([positives, negatives])
    order = np.argsort(scores)[::-1]
    scores = scores[order]
    last_of_equals = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))[: len(scores)]
    true_positives = (order < len(positives)).cumsum()[last_of_equals]
    false_positives = last_of_equals + 1 - true_positives
    # roc_curve drops a point where the step to it equals the step from it, but neither the first nor the last one.
    is_corner = np.ones(len(last_of_equals), dtype=bool)
    is_corner[1:-1] = (np.diff(true_positives, 2) != 0) | (np.diff(false_positives, 2) != 0)
    if not whole:
        is_corner[-1:] = False  # the step from it is unknown
    return Roc(
        np.append(0, false_positives),
        np.append(0, true_positives),
        np.append(np.inf, scores[last_of_equals]),
        np.append(True, is_corner),
    )


def _pick(curve: Roc, target: float, positives: int, negatives: int, rule: ThresholdRule) -> OperatingPoint | None:
    """The point of the curve that a rule chooses; None if a truncated curve does not determine it."""
    fpr = curve.false_positives / negatives
    whole = curve.false_positives[-1] == negatives
    if rule == "at_most":
        chosen = np.searchsorted(fpr, target, side="right") - 1
        settled = whole or chosen < len(fpr) - 1
    else:
        corners = np.flatnonzero(curve.is_corner)
        distance = np.abs(fpr[corners] - target)
        chosen = corners[len(corners) - 1 - distance[::-1].argmin()]
        settled = whole or fpr[chosen] < fpr[corners[-1]] >= target
    if not settled:
        return None
    tpr = curve.true_positives[chosen] / positives
    return OperatingPoint(float(target), float(fpr[chosen]), float(tpr), float(curve.thresholds[chosen]))
