"""Template fusion (KPRPE paper, section 4): the weight of an image, and the pooling of a template."""

from __future__ import annotations

import numpy as np

from .geometry import TEMPLATE
from .metrics import unit


def landmark_weight(keypoints: np.ndarray, score: float, h: float = 0.2) -> float:
    """Eq. 17 and 18, with the mean over the five points of their distances, as the authors' code has it."""
    distance = np.mean([np.hypot(*(point - place)) for point, place in zip(keypoints, TEMPLATE, strict=True)])
    return (h - min(distance, h)) / h * score


def pool(rows: np.ndarray, templates: np.ndarray, medias: np.ndarray) -> dict[int, np.ndarray]:
    """Unit embedding of each template: the sum over its medias of the mean over the media's images."""
    pooled = {}
    for template in sorted(set(templates.tolist())):
        of_template = templates == template
        total = np.zeros(rows.shape[1])
        for media in set(medias[of_template].tolist()):
            total += rows[of_template & (medias == media)].mean(0)
        pooled[template] = unit(total)
    return pooled
