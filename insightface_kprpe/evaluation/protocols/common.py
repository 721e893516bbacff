"""Settings that all protocols report, and the rank that reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...distributed import rank_and_world_size
from ...inference.embedding import Embeddings, EmbedOptions
from ...inference.models import Embedder
from ..metrics import OperatingPoint

CMC_RANKS = 20
_LISTED = 50  # missing images that a report names


def reports(options: EmbedOptions) -> bool:
    """Whether this rank has results to return."""
    return not options.all_ranks or rank_and_world_size()[0] == 0


def common_settings(
    embed: Embedder, options: EmbedOptions, found: Embeddings, given: str, names: Sequence[str]
) -> dict[str, Any]:
    """Settings of a ``Result`` that do not depend on the protocol.

    Args:
        embed, options: as used.
        found: the embeddings.
        given: source of the set's keypoints.
        names: of the N images.
    """
    if embed.finds_keypoints:
        keypoints = "found by the network itself"
    elif not embed.needs_keypoints:
        keypoints = "not used by this network"
    else:
        keypoints = options.aligner_name if options.aligner is not None else given
    missing = [names[i] for i in np.flatnonzero(~found.readable)]
    listed = ", ".join(missing[:_LISTED]) + (f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else "")
    return {
        "model": embed.describe(),
        "flip": "sum of both embeddings" if options.flip else "off",
        "keypoints": keypoints,
        "images": len(names),
        "missing images": f"{len(missing)} left out: {listed}" if missing else "none",
    }


def metrics_of(points: Sequence[OperatingPoint]) -> dict[str, float]:
    """``tpr_at_fpr_0.001``, ``thresh_at_fpr_0.001`` and so on."""
    return {
        f"{name}_at_fpr_{point.target}": value
        for point in points
        for name, value in (("tpr", point.tpr), ("thresh", point.threshold))
    }


def unreached(points: Sequence[OperatingPoint]) -> dict[str, str]:
    """A setting that lists rates at which no threshold accepts anybody; none if all do."""
    fprs = ", ".join(f"{point.target:g}" for point in points if np.isinf(point.threshold))
    why = "the highest scores are those of different people, or tie with them: nobody is accepted"
    return {"no threshold": f"at FPR {fprs}: {why}"} if fprs else {}
