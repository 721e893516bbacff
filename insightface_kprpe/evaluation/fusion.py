"""Template fusion: how much each image of a template counts, and the pooling per media and then per template.

Each method is a function that returns one weight per image, by which ``pool_templates`` multiplies the image's unit
embedding: ones give the average, the embedding's norm gives Eq. 16, ``landmark_weights`` gives Eq. 18.
"""

from __future__ import annotations

import logging

import numpy as np

from ..geometry import CANONICAL_KEYPOINTS
from .metrics import inverse_norms, to_numpy

logger = logging.getLogger(__name__)

FUSION_METHODS = ("average", "norm", "detector", "norm_detector", "landmark")


def norm_weights(embeddings: np.ndarray) -> np.ndarray:
    """Weight by the norm of the embedding, i.e. the mean of raw embeddings (paper, Eq. 16).

    Args:
        embeddings: (N, D) float, as the backbone gives them.

    Returns:
        (N,) float64.
    """
    inverse = inverse_norms(embeddings)
    return np.divide(1.0, inverse, out=np.zeros_like(inverse), where=inverse > 0)


def landmark_weights(keypoints: np.ndarray, score: np.ndarray, h: float = 0.2) -> np.ndarray:
    """Weight by how well a face is aligned and how confident the aligner is (paper, Eq. 17 and 18).

    ``d = (h - min(distance, h)) / h``, weight ``d * score``. The text writes the distance as one norm over all
    coordinates; here it is, as in the authors' code, the mean over the five points of each one's distance to its
    canonical place.

    Args:
        keypoints: (N, 5, 2) float, xy in [0, 1] of the crop, as the aligner predicts them.
        score: (N,) float in [0, 1], face score.
        h: distance in [0, 1] of the crop beyond which an image no longer counts.

    Returns:
        (N,) float64 in [0, 1].

    Raises:
        ValueError: shapes do not fit, or keypoints are not finite or look like pixels.
    """
    keypoints, score = (to_numpy(values).astype(np.float64) for values in (keypoints, score))
    if keypoints.ndim != 3 or keypoints.shape[1:] != (5, 2) or score.shape != keypoints.shape[:1]:
        raise ValueError(f"keypoints must be (N, 5, 2) and score (N,), got {keypoints.shape} and {score.shape}")
    if not np.isfinite(keypoints).all() or (keypoints.size and np.abs(np.median(keypoints)) > 2):
        raise ValueError("keypoints must be finite xy in [0, 1] of the crop; divide pixels by the side of the crop")
    if not h > 0:
        raise ValueError(f"h must be above 0, got {h}")
    distance = np.linalg.norm(keypoints - CANONICAL_KEYPOINTS, axis=-1).mean(-1)
    return (h - np.minimum(distance, h)) / h * score


def fusion_weights(
    method: str,
    embeddings: np.ndarray,
    keypoints: np.ndarray | None = None,
    landmark_score: np.ndarray | None = None,
    detector_score: np.ndarray | None = None,
) -> np.ndarray:
    """The weights of one of ``FUSION_METHODS`` by name, for tables that compare them.

    Args:
        method: ``average``, ``norm``, ``detector``, ``norm_detector`` (InsightFace's default for IJB) or ``landmark``.
        embeddings: (N, D) float, as the backbone gives them.
        keypoints: (N, 5, 2) float, xy in [0, 1]; for ``landmark``.
        landmark_score: (N,) face score of the aligner; for ``landmark``.
        detector_score: (N,) face score of the detector that cut the images; for ``detector`` and ``norm_detector``.

    Returns:
        (N,) float64 weights of the unit embeddings.

    Raises:
        ValueError: an unknown method, or an argument that the method needs is missing.
    """
    if method not in FUSION_METHODS:
        raise ValueError(f"method must be one of {', '.join(FUSION_METHODS)}, got {method!r}")
    if "detector" in method and detector_score is None:
        raise ValueError(f"fusion {method!r} needs detector_score, one per image")
    if method == "landmark" and (keypoints is None or landmark_score is None):
        raise ValueError(
            "fusion 'landmark' needs keypoints and landmark_score; embed with a backbone that predicts them"
        )
    if method == "landmark":
        return landmark_weights(keypoints, landmark_score)
    weights = norm_weights(embeddings) if "norm" in method else np.ones(len(embeddings))
    return weights * to_numpy(detector_score).astype(np.float64) if "detector" in method else weights


def pool_templates(
    embeddings: np.ndarray, templates: np.ndarray, medias: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One unit embedding for each template: mean over the images of a media, then sum over the medias of a template.

    If all images of a template have weight 0, they are weighted equally.

    Args:
        embeddings: (N, D) float as the backbone gives them; may be a memory map.
        templates: (N,) int, template of each image.
        medias: (N,) int, media of each image (all frames of one video share it), counted within its template.
        weights: (N,) float >= 0, multiplies the unit embedding. None uses raw embeddings, i.e. weights by their norm
            (Eq. 16).

    Returns:
        (T, D) float64 unit embeddings (a zero row where all images of a template are zero), and (T,) the templates in
        ascending order.

    Raises:
        ValueError: shapes do not fit, embeddings are not finite, or a weight is negative or not finite.
    """
    embeddings, templates, medias = (to_numpy(values) for values in (embeddings, templates, medias))
    inverse = inverse_norms(embeddings)
    count = len(inverse)
    if templates.shape != (count,) or medias.shape != (count,) or not count:
        raise ValueError(
            f"templates and medias must be ({count},), one per embedding, got {templates.shape}, {medias.shape}"
        )
    coefficients = np.ones(count) if weights is None else inverse * _checked(weights, count)

    order = np.lexsort((medias, templates))
    new_template, new_media = (np.append(True, ids[order][1:] != ids[order][:-1]) for ids in (templates, medias))
    new_media |= new_template
    images_in_media = np.diff(np.append(np.flatnonzero(new_media), count))
    equal = 1 / np.repeat(images_in_media, images_in_media)  # of each image within its media, in the new order
    coefficients = coefficients[order] * equal
    starts = np.flatnonzero(new_template)
    pooled = np.empty((len(starts), embeddings.shape[1]))
    weightless = 0
    for row, (start, end) in enumerate(zip(starts, np.append(starts[1:], count), strict=True)):
        images, own = order[start:end], coefficients[start:end]
        if not own.any():
            own, weightless = equal[start:end] * inverse[images], weightless + 1
        pooled[row] = own @ embeddings[images].astype(np.float64)
    if weightless:
        logger.warning(
            "%d of %d templates have no image with a positive weight; using their plain average",
            weightless,
            len(starts),
        )
    pooled *= inverse_norms(pooled)[:, None]
    return pooled, templates[order[starts]]


def _checked(weights: np.ndarray, count: int) -> np.ndarray:
    weights = to_numpy(weights).astype(np.float64)
    if weights.shape != (count,):
        raise ValueError(f"weights must be ({count},), one per embedding, got shape {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("weights must be finite and not negative; check the scores they were computed from")
    return weights
