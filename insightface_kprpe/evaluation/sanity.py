"""Warnings if numbers look as if the inputs were wrong: faces not aligned, color channels swapped.

``sanity_warnings`` compares the results of each model with each other, ``channel_order_warning`` the cosines of some
pairs with those that they have with red and blue swapped. They return hints for humans, never errors: a hard set, or a
model that is weak on it, may look the same. Good models are hardly affected by the order of the channels, so the
absence of a warning does not prove that it is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ..documents import json_lines
from .metrics import to_numpy
from .result import Result

# Warn if rank-1 is below this fraction of what verification suggests. The estimate is rough, as real scores are not
# normal: by the paper's Table 7, TinyFace is at 2.4 times what 97.67 % on AgeDB suggest, and at 1.3 times what 99.06 %
# on CFP-FP do.
LEAST_RANK_1_RATIO = 0.25
# Expectations below this mean nothing: the model is weak, or the gallery is very large for it.
LEAST_EXPECTED_RANK_1 = 0.1
# Swapped channels must be better by this much area under the ROC, and by this many standard errors of the difference.
CHANNEL_GAIN, CHANNEL_ERRORS = 0.01, 3.0
_NORMAL = NormalDist()
_FPRS = ("0.001", "0.01", "0.0001")


def sanity_warnings(results: Sequence[Result]) -> list[str]:
    """Sentences about results that contradict each other.

    The best verification of each model (a metric ``accuracy`` or ``tpr_at_fpr_0.001``) gives the rank-1 rate to expect
    in a gallery as large as ``settings["gallery"]``, a number of entries. A rank-1 below ``LEAST_RANK_1_RATIO`` of it
    is worth a warning. Results without these are skipped.

    Args:
        results: of one model or several.
    """
    warnings = []
    separations: dict[str, tuple[float, str]] = {}
    for result in results:
        found = verification_separation(result.metrics)
        if found is not None:
            separations[result.model] = max((found, result.protocol), separations.get(result.model, (-math.inf, "")))
    for result in results:
        gallery = result.settings.get("gallery")
        if result.model not in separations or "rank_1" not in result.metrics or not isinstance(gallery, int):
            continue
        separation, protocol = separations[result.model]
        expected, rank_1 = expected_rank_1(separation, gallery), result.metrics["rank_1"]
        if expected >= LEAST_EXPECTED_RANK_1 and rank_1 < LEAST_RANK_1_RATIO * expected:
            warnings.append(
                f"{result.name} on {result.protocol}: rank-1 is {100 * rank_1:.1f} %, while its verification on "
                f"{protocol} suggests about {100 * expected:.0f} % among {gallery}; the images look unaligned, or "
                "their keypoints or identities belong to other images; look at a few crops"
            )
    return warnings


def results_of_training(model: str, path: str | Path) -> list[Result]:
    """The last results of a training run on each of its verification sets; empty if it is not a training run.

    Args:
        model: its name in the other results.
        path: of the model; a run has ``metrics.jsonl`` in its folder.
    """
    file = Path(path) / "metrics.jsonl"
    accuracies: dict[str, float] = {}
    for _, row in json_lines(file) if file.is_file() else ():
        for key, value in row.items():
            if key.startswith("accuracy/") and isinstance(value, int | float) and 0 <= value <= 100:
                accuracies[key] = value
    # The file has percent.
    names = {key: f"{key.removeprefix('accuracy/')} in training" for key in accuracies}
    return [Result(model, names[key], {"accuracy": percent / 100}) for key, percent in accuracies.items()]


def verification_separation(metrics: dict[str, float]) -> float | None:
    """The separation of the scores of same and different pairs, in standard deviations, assuming normal distributions.

    Args:
        metrics: fractions; ``accuracy`` at a balanced threshold, or ``tpr_at_fpr_0.001``, ``_0.01``, ``_0.0001``.

    Returns:
        0 for chance, about 4.6 for an accuracy of 0.99; None without such a metric. Rates of 0 and 1 count as 0.0001
        and 0.9999.
    """
    if "accuracy" in metrics:
        return 2 * _quantile(metrics["accuracy"])
    for fpr in _FPRS:
        if f"tpr_at_fpr_{fpr}" in metrics:
            return _quantile(metrics[f"tpr_at_fpr_{fpr}"]) - _NORMAL.inv_cdf(float(fpr))
    return None


def _quantile(rate: float) -> float:
    return _NORMAL.inv_cdf(min(max(rate, 1e-4), 1 - 1e-4))


def expected_rank_1(separation: float, gallery: int) -> float:
    """Rank-1, a fraction, when one mate scores against ``gallery - 1`` others, all scores normal and independent.

    Args:
        separation: from ``verification_separation``.
        gallery: number of entries, the mate included.

    Raises:
        ValueError: the gallery is empty.
    """
    if gallery < 1:
        raise ValueError(f"gallery must be 1 or more entries, got {gallery}")
    scores = np.linspace(-8, 16, 4801)  # of the mate, around its mean the separation
    density = np.exp(-np.square(scores - separation) / 2) / math.sqrt(2 * math.pi)
    below = np.array([_NORMAL.cdf(score) for score in scores])
    return float((density * below ** (gallery - 1)).sum() * (scores[1] - scores[0]))


def channel_order_warning(scores: np.ndarray, swapped: np.ndarray, is_same: np.ndarray) -> str | None:
    """Compare the area under the ROC of the same pairs, with the channels as given and swapped (DeLong's test).

    Args:
        scores: (P,) cosines with the channels as given.
        swapped: (P,) cosines with red and blue swapped.
        is_same: (P,) bool; a few thousand pairs at most.

    Returns:
        A sentence, or None.

    Raises:
        ValueError: lengths differ, or there are fewer than two pairs of a kind.
    """
    scores, swapped, is_same = to_numpy(scores), to_numpy(swapped), to_numpy(is_same).astype(bool)
    if not scores.shape == swapped.shape == is_same.shape or not 2 <= is_same.sum() <= len(is_same) - 2:
        raise ValueError(
            "scores, swapped and is_same must be (P,) with two same and two different pairs or more, got "
            f"{scores.shape}, {swapped.shape}, {is_same.shape} with {is_same.sum()} same"
        )
    wins, swapped_wins = (_wins(values[is_same], values[~is_same]) for values in (scores, swapped))
    gain = swapped_wins - wins
    variance = sum(np.var(placements, ddof=1) / len(placements) for placements in (gain.mean(0), gain.mean(1)))
    if gain.mean() < CHANNEL_GAIN or gain.mean() <= CHANNEL_ERRORS * math.sqrt(variance):
        return None
    return (
        f"with red and blue swapped this model verifies better (area under the ROC {swapped_wins.mean():.3f} instead "
        f"of {wins.mean():.3f}): the channel order looks wrong; InsightFace's models take RGB"
    )


def _wins(same: np.ndarray, different: np.ndarray) -> np.ndarray:
    """(same, different) 1 where the same pair scores higher, 0.5 where both are equal; the mean is the area."""
    return (same[:, None] > different) + 0.5 * (same[:, None] == different)
