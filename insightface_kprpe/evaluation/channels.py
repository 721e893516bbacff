"""Checks that a model gets the channel order it expects, by embedding a sample of pairs with red and blue swapped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..data.verification_pairs import VerificationPairs
from ..inference.embedding import EmbedOptions, embed_faces
from ..inference.models import Embedder
from .metrics import SCORE_DECIMALS, unit_rows
from .sanity import channel_order_warning

logger = logging.getLogger(__name__)

SAMPLE = 100  # pairs


class _Swapped(Sequence):
    """Images with red and blue swapped."""

    def __init__(self, images: Sequence[np.ndarray], places: np.ndarray) -> None:
        self.images, self.places = images, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.images[self.places[index]][..., ::-1])


def warn_of_swapped_channels(
    embed: Embedder, pairs: VerificationPairs, options: EmbedOptions, measured: np.ndarray, scores: np.ndarray
) -> None:
    """Log a warning if a sample of the pairs is verified clearly better with red and blue swapped.

    Args:
        embed: the model.
        pairs: the set.
        options: how the set was embedded.
        measured: (P,) int, pairs whose images are all readable.
        scores: (P,) their cosines.
    """
    sample = np.unique(np.linspace(0, len(measured) - 1, SAMPLE).round().astype(int))
    chosen = measured[sample]
    is_same, places = pairs.is_same[chosen], np.stack([2 * chosen, 2 * chosen + 1], 1).reshape(-1)
    if not 2 <= is_same.sum() <= len(is_same) - 2:
        return
    alone = replace(options, all_ranks=False, cache=None)  # other ranks do not take part
    swapped = _Swapped(pairs.images, places)
    found = embed_faces(embed, swapped, pairs.keypoints[places], alone, name="swapped channels").embeddings
    warning = channel_order_warning(scores[sample], pair_cosines(found[0::2], found[1::2]), is_same)
    if warning is not None:
        logger.warning("%s on %s: %s", embed.name, pairs.name, warning)


def pair_cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(P,) float64 cosines of rows, equal where they are mathematically equal."""
    return np.round(np.einsum("pd,pd->p", unit_rows(first), unit_rows(second)), SCORE_DECIMALS)
