"""The numbers of face recognition, each one exact and none of it knowing files or models.

Units: accuracy, TPR, TPIR and rank-k are percent; FPR and FPIR are fractions; a score is a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

# InsightFace tries these squared distances between unit vectors as thresholds.
DISTANCE_THRESHOLDS = np.arange(0, 4, 0.01)

ThresholdRule = Literal["insightface", "at_most"]


class KFoldResult(NamedTuple):
    """Verification accuracy over folds; distances are squared Euclidean between unit vectors, in [0, 4]."""

    accuracy: float  # mean over folds, percent
    std: float  # standard deviation over folds, percent
    threshold: float  # mean over folds; a pair is "same" below it
    fold_accuracies: np.ndarray  # (folds,) percent
    fold_thresholds: np.ndarray  # (folds,)

    @property
    def cosine_threshold(self) -> float:
        """The same threshold for cosine scores: a pair is "same" above it."""
        return 1 - self.threshold / 2


class OperatingPoint(NamedTuple):
    """One point of a ROC (TPR at FPR) or of an open-set search (TPIR at FPIR)."""

    target: float  # the false positive rate that was asked for, fraction
    fpr: float  # the one that was reached, fraction
    tpr: float  # percent
    threshold: float  # scores at or above it are accepted


class Roc(NamedTuple):
    """ROC points from the strictest threshold (infinite) to the loosest."""

    false_positives: np.ndarray  # (points,) int, negatives at or above the threshold
    true_positives: np.ndarray  # (points,) int
    thresholds: np.ndarray  # (points,)
    is_corner: np.ndarray  # (points,) bool, False where scikit-learn's roc_curve leaves the point out


def unit_rows(embeddings: np.ndarray, name: str = "embeddings", dtype: type = np.float64) -> np.ndarray:
    """Divide each row by its length; a zero row stays zero, so that it is equally unlike everything.

    Args:
        embeddings: (N, D) float.
        name: what to call them in an error.
        dtype: of the result.

    Raises:
        ValueError: not (N, D), or a row is not finite.
    """
    return np.asarray(embeddings, dtype=dtype) * inverse_norms(embeddings, name).astype(dtype)[:, None]


def inverse_norms(embeddings: np.ndarray, name: str = "embeddings") -> np.ndarray:
    """1 / length of each row as (N,) float64, 0 for a zero row; checked and failing as ``unit_rows`` does."""
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise ValueError(f"{name} must be (N, D), got shape {embeddings.shape}")
    squares = np.einsum("nd,nd->n", embeddings, embeddings, dtype=np.float64)
    if not np.isfinite(squares).all():
        bad = np.flatnonzero(~np.isfinite(squares))
        raise ValueError(
            f"{name} must be finite, got NaN or Inf in {len(bad)} of {len(squares)} rows (first: row {bad[0]}); "
            "look at the model's output for those images"
        )
    norms = np.sqrt(squares)
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _as_bool(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    """Check that labels are ``count`` zeros and ones with both present."""
    labels = np.asarray(labels)
    truth = labels.astype(bool)
    if truth.shape != (count,) or not (labels == truth).all():
        raise ValueError(f"{name} must be ({count},) zeros and ones, one for each pair, got shape {labels.shape}")
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
        embeddings_a: (N, D) float, first image of each pair; need not be normalised.
        embeddings_b: (N, D) float, second image.
        is_same: (N,) bool or 0/1.
        folds: number of folds, 2 to N.

    Raises:
        ValueError: shapes differ, values are not finite, pairs are of one kind, or there are fewer pairs than folds.
    """
    a, b = unit_rows(embeddings_a, "embeddings_a"), unit_rows(embeddings_b, "embeddings_b")
    if a.shape != b.shape:
        raise ValueError(f"embeddings_a and embeddings_b must have one shape, got {a.shape} and {b.shape}")
    is_same = _as_bool(is_same, len(a), "is_same")
    if not 2 <= folds <= len(a):
        raise ValueError(f"folds must be 2 to the number of pairs ({len(a)}), got {folds}")

    steps = len(DISTANCE_THRESHOLDS)
    # Index of the first threshold above the distance: the pair is called "same" from there on.
    called_same_from = np.searchsorted(DISTANCE_THRESHOLDS, np.square(a - b).sum(1), side="right")
    sizes = np.full(folds, len(a) // folds)
    sizes[: len(a) % folds] += 1
    fold = np.repeat(np.arange(folds), sizes)
    # Moving the threshold past a same pair makes one more right, past a different pair one more wrong.
    gain = np.zeros((folds, steps + 1), dtype=np.int64)
    np.add.at(gain, (fold, called_same_from), np.where(is_same, 1, -1))
    different = np.bincount(fold[~is_same], minlength=folds)
    correct = different[:, None] + gain[:, :steps].cumsum(1)  # (folds, steps)
    best = (correct.sum(0) - correct).argmax(1)

    accuracies = 100.0 * correct[np.arange(folds), best] / sizes
    thresholds = DISTANCE_THRESHOLDS[best]
    return KFoldResult(
        float(accuracies.mean()), float(accuracies.std()), float(thresholds.mean()), accuracies, thresholds
    )


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
        fprs: false positive rates, fractions in [0, 1].
        rule: ``"at_most"`` takes the highest TPR whose FPR does not exceed the target. ``"insightface"`` takes what
            InsightFace's IJB scripts take: the point nearest to the target, above or below it, among the corners that
            scikit-learn's ``roc_curve`` keeps (the looser one of two equally near).

    Returns:
        One point for each of ``fprs``. Where no score is accepted, the threshold is infinite.

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
    scores = np.asarray(scores)
    if scores.ndim != 1:
        raise ValueError(f"scores must be (N,), got shape {scores.shape}")
    labels = _as_bool(labels, len(scores), "labels")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite, got NaN or Inf in {(~np.isfinite(scores)).sum()} of {len(scores)}")
    return scores[labels], scores[~labels]


def _roc_head(positives: np.ndarray, negatives: np.ndarray, count: int) -> Roc:
    """The ROC from its strict end down to about ``count`` false positives; all of it if that is all negatives.

    Reorders ``negatives`` in place.
    """
    whole = count == len(negatives)
    if not whole:
        negatives.partition(len(negatives) - count)
        negatives = negatives[-count:]
        cut = negatives.min()  # of the scores equal to it some were left behind
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
        is_corner[-1:] = False  # the step from it is not known
    return Roc(
        np.append(0, false_positives),
        np.append(0, true_positives),
        np.append(np.inf, scores[last_of_equals]),
        np.append(True, is_corner),
    )


def _pick(curve: Roc, target: float, positives: int, negatives: int, rule: ThresholdRule) -> OperatingPoint | None:
    """The point of the curve that a rule takes; None where a curve that was cut off does not settle it."""
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
    tpr = 100.0 * curve.true_positives[chosen] / positives
    return OperatingPoint(float(target), float(fpr[chosen]), float(tpr), float(curve.thresholds[chosen]))


class Matches(NamedTuple):
    """What a 1:N search says of each probe, against the gallery entries of its own identity (mates) and the others."""

    mate_score: np.ndarray  # (P,) float, best score among mates; -inf where the probe has none
    other_score: np.ndarray  # (P,) float, best score among the others; -inf where there are none
    rank: np.ndarray  # (P,) int, 1 + number of others that score at least as high as the best mate; 0 without mate


def rank_k(matches: Matches, ranks: Sequence[int] = (1, 5, 20)) -> dict[int, float]:
    """Closed-set identification: percent of the probes with a mate that find it among the first k (a CMC curve).

    Raises:
        ValueError: a rank is below 1, or no probe has a mate.
    """
    found = matches.rank[matches.rank > 0]
    if not len(found):
        raise ValueError("no probe has its identity in the gallery; check that both use the same identity labels")
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks must be 1 or more, got {list(ranks)}")
    return {int(rank): float(100.0 * (found <= rank).mean()) for rank in ranks}


def tpir_at_fpir(matches: Matches, fpirs: Sequence[float] = (0.01, 0.1), rank: int = 1) -> list[OperatingPoint]:
    """Open-set identification: percent of the probes with a mate that find it within ``rank`` and above a threshold.

    The threshold is the best score of the n-th strongest probe without a mate, n = round(FPIR * such probes).

    Args:
        matches: result of ``search`` or ``match_scores``.
        fpirs: false positive identification rates, fractions in [0, 1].
        rank: how far down the list the mate may stand.

    Raises:
        ValueError: a rate is outside [0, 1], or probes with a mate or without one are missing.
    """
    has_mate = matches.rank > 0
    impostors = np.sort(matches.other_score[~has_mate])[::-1]
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
        found = (matches.mate_score >= threshold) & (matches.rank <= rank) & has_mate
        reached = float((impostors >= threshold).mean())
        points.append(OperatingPoint(fpir, reached, float(100.0 * found.sum() / has_mate.sum()), float(threshold)))
    return points
