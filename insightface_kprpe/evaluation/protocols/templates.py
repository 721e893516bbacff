"""What the protocols of templates share: how images are fused, and results of galleries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...inference.embedding import Embeddings
from ..fusion import FUSION_METHODS, fusion_weights
from ..result import Result
from .common import CMC_RANKS

RANKS = (1, 5, 10)
ALIGNED = "InsightFace's template (112 x 112), by the landmarks of the set"
_FUSIONS = {
    "average": "unit embeddings, equally",
    "norm": "embeddings by their norm (Eq. 16)",
    "detector": "unit embeddings by the detector's score",
    "norm_detector": "embeddings by their norm times the detector's score (InsightFace's default)",
    "landmark": "unit embeddings by the alignment and score (Eq. 17, 18) of the ",
}


def choose_fusions(name: str) -> tuple[str, ...]:
    """The methods that ``--fusion`` names: one, or "all".

    Raises:
        ValueError: there is no such method.
    """
    if name == "all":
        return FUSION_METHODS
    if name not in FUSION_METHODS:
        raise ValueError(f"fusion must be all or one of {', '.join(FUSION_METHODS)}, got {name!r}")
    return (name,)


def weights_of(
    fusion: str, found: Embeddings, keypoints: np.ndarray, detector_scores: np.ndarray
) -> tuple[np.ndarray, str]:
    """Weights of the readable images, and a phrase about them. Without an aligner, the detector's are used.

    Args:
        fusion: of ``FUSION_METHODS``.
        found: of N images.
        keypoints: (N, 5, 2) the set's own, in [0, 1] of the crops.
        detector_scores: (N,) the set's own.
    """
    kept, how, score = found.readable, _FUSIONS[fusion], detector_scores
    if fusion == "landmark":
        located = bool(np.isfinite(found.scores[kept]).all())
        keypoints, score = (found.keypoints, found.scores) if located else (keypoints, detector_scores)
        how += "aligner's landmarks" if located else "detector's landmarks"
    embeddings = readable(found)
    weights = fusion_weights(fusion, embeddings, keypoints[kept], score[kept], detector_scores[kept])
    return weights, f"{how}; per media, then per template"


def readable(found: Embeddings) -> np.ndarray:
    """Embeddings of the readable images; no copy if all are."""
    return found.embeddings if found.readable.all() else found.embeddings[found.readable]


def gallery_results(
    blank: Result, rates: Mapping[str, Mapping[str, float]], sizes: Mapping[str, int], probes: int
) -> list[Result]:
    """The mean over galleries, with the CMC curve, and then each gallery.

    Args:
        blank: with model, protocol, settings and fusion.
        rates: what ``ijb.identification_rates`` gives for ranks 1 to ``CMC_RANKS``.
        sizes: templates of each gallery.
        probes: probe templates.
    """
    results = []
    sizes = {**sizes, "mean": round(float(np.mean(list(sizes.values()))))}
    for name in ("mean", *(key for key in rates if key != "mean")):
        settings = {"probes": probes, "gallery": sizes[name], "open set": "rank 1 and above the threshold"}
        result = ranked_result(blank, rates[name], settings)
        results.append(result if name == "mean" else replace(result, variant=f"{blank.variant}, {name}", cmc=None))
    return results


def ranked_result(blank: Result, rates: Mapping[str, float], settings: Mapping[str, Any]) -> Result:
    """``blank`` with the rates that tables show, the CMC curve, and more settings."""
    cmc = np.array([rates[f"rank_{rank}"] for rank in range(1, CMC_RANKS + 1)])
    metrics = {f"rank_{rank}": rates[f"rank_{rank}"] for rank in RANKS}
    metrics |= {key: value for key, value in rates.items() if not key.startswith("rank_")}
    return replace(blank, metrics=metrics, settings={**blank.settings, **settings}, cmc=cmc)
