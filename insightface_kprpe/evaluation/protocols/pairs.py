"""Verification of a set of pairs: a ``.bin`` file, or a folder with ``pairs.txt``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...data.verification_pairs import VerificationPairs, check_kinds
from ...inference.embedding import EmbedOptions, embed_faces
from ...inference.models import Embedder
from ..channels import pair_cosines, warn_of_swapped_channels
from ..curves import roc_points
from ..hardest import write_hardest_pairs
from ..metrics import kfold_accuracy, tpr_at_fpr, val_at_far
from ..result import Result
from .common import common_settings, metrics_of, reports, unreached

FPRS = (1e-4, 1e-3)


def run_pairs(
    embed: Embedder, pairs: VerificationPairs, options: EmbedOptions, sheets: Path | None = None
) -> list[Result]:
    """Verification of a set: accuracy over its folds (ten in a ``.bin``), VAL@FAR, and TPR at FPR over all pairs.

    A sample of the pairs is also embedded with red and blue swapped; if that is better, a warning says so.

    Args:
        embed: the model.
        pairs: what to verify. A pair with an unreadable image is left out, if the options permit it.
        options: how to embed.
        sheets: folder for an image of the hardest pairs.

    Returns:
        One result; none on ranks other than the first, if they share the work.

    Raises:
        ValueError: there are fewer pairs than folds, pairs of one kind only, or an image cannot be read.
    """
    try:
        check_kinds(pairs.is_same, pairs.folds)
    except ValueError as error:
        raise ValueError(f"{pairs.name}: {error}") from error
    found = embed_faces(embed, pairs.images, pairs.keypoints, options, name=pairs.name, source=pairs.source)
    if not reports(options):
        return []
    whole = found.readable[0::2] & found.readable[1::2]
    first, second, is_same = found.embeddings[0::2][whole], found.embeddings[1::2][whole], pairs.is_same[whole]
    folds = kfold_accuracy(first, second, is_same, pairs.folds)
    validation = val_at_far(first, second, is_same, folds=pairs.folds)
    scores = pair_cosines(first, second)
    kept = np.flatnonzero(whole)
    warn_of_swapped_channels(embed, pairs, options, kept, scores)
    if sheets is not None:
        file = sheets / f"hardest_{embed.name}_{pairs.name}.png"
        write_hardest_pairs(file, pairs.images, np.stack([2 * kept, 2 * kept + 1], 1), scores, is_same)
    points = tpr_at_fpr(scores, is_same, FPRS)
    metrics = {"accuracy": folds.accuracy, "accuracy_std": folds.std, "cosine_threshold": folds.cosine_threshold}
    metrics |= {f"val_at_far_{validation.target}": validation.val, "val_std": validation.std} | metrics_of(points)
    settings = {
        **common_settings(embed, options, found, pairs.keypoint_source, [f"image {i}" for i in range(2 * len(whole))]),
        "alignment": "the set's own crops",
        "pairs": f"{len(is_same)}, {int(is_same.sum())} of them of the same person",
        "threshold rule": (
            f"accuracy: best on the other {pairs.folds - 1} of {pairs.folds} folds; "
            "VAL (arcface_torch): where their interpolated FAR is the target; "
            "TPR: the highest whose FPR is at most the target"
        ),
        **unreached(points),
    }
    return [Result(embed.name, pairs.name, metrics, settings, roc=roc_points(scores, is_same))]
