"""Verification: are two crops the same person? InsightFace's ``.bin`` sets and drawn ones."""

from __future__ import annotations

from ..data.verification_pairs import VerificationPairs
from ..inference.embedding import embed_images
from ..inference.models import Embedder, EmbedFunction
from .metrics import KFoldResult, kfold_accuracy


def verify(
    embed: Embedder | EmbedFunction, pairs: VerificationPairs, batch_size: int = 64, flip: bool = True
) -> KFoldResult:
    """Verification accuracy over the set's folds, as InsightFace measures it (embeddings of both flips added).

    Args:
        embed: the model.
        pairs: what to verify.
        batch_size: crops per call of the model.
        flip: add the embedding of the mirrored crop.
    """
    embeddings = embed_images(embed, pairs.images, pairs.keypoints, batch_size, flip, label=f"verifying {pairs.name}")
    return kfold_accuracy(embeddings[0::2], embeddings[1::2], pairs.is_same, pairs.folds)
