"""Margin losses on cosines, and the softmax cross-entropy over class centers that they feed.

The margins change a value but not its gradient, so no numeric difference could give the gradients: they are written
out, as the chain rule has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Scaled(NamedTuple):
    """Logits and their derivative by the cosine at the same place, both (B, C)."""

    logits: np.ndarray
    slope: np.ndarray


Margin = Callable[[np.ndarray, np.ndarray, np.ndarray], Scaled]  # cosines (B, C), labels (B,), norms (B,)


def _combined(
    cosines: np.ndarray,
    labels: np.ndarray,
    target_of: Callable[[float, int], float],
    scale: float,
    threshold: float = 0.0,
) -> Scaled:
    logits, slope = np.empty_like(cosines), np.full_like(cosines, scale)
    for i, j in np.ndindex(cosines.shape):
        if labels[i] == j:
            logits[i, j] = scale * target_of(cosines[i, j], i)
        elif threshold > 0 and cosines[i, j] > threshold:
            logits[i, j] = slope[i, j] = 0
        else:
            logits[i, j] = scale * cosines[i, j]
    return Scaled(logits, slope)


def arcface(m: float = 0.5, scale: float = 64.0, threshold: float = 0.0) -> Margin:
    """Target cos(theta + m); others above a threshold do not count."""
    return lambda cosines, labels, norms: _combined(
        cosines, labels, lambda cosine, _: np.cos(np.arccos(cosine) + m), scale, threshold
    )


def cosface(m: float = 0.4, scale: float = 64.0, threshold: float = 0.0) -> Margin:
    """Target cos(theta) - m; others above a threshold do not count."""
    return lambda cosines, labels, norms: _combined(cosines, labels, lambda cosine, _: cosine - m, scale, threshold)


def adaface_statistics(mean: float, std: float, norms: np.ndarray, t_alpha: float = 0.01) -> tuple[float, float]:
    """What the running mean and deviation of the norms are after a batch."""
    norms = np.clip(norms, 0.001, 100)
    deviation = np.sqrt(((norms - norms.mean()) ** 2).sum() / (len(norms) - 1))
    return t_alpha * norms.mean() + (1 - t_alpha) * mean, t_alpha * deviation + (1 - t_alpha) * std


def adaface(mean: float, std: float, m: float = 0.4, h: float = 0.333, scale: float = 64.0) -> Margin:
    """Target cos(theta - m z) - (m + m z), z the norm's place in the running statistics; theta stays in (0, pi)."""

    def margin(cosines: np.ndarray, labels: np.ndarray, norms: np.ndarray) -> Scaled:
        z = np.clip(h * (np.clip(norms, 0.001, 100) - mean) / (std + 1e-3), -1, 1)

        def target(cosine: float, i: int) -> float:
            theta = np.clip(np.arccos(cosine) - m * z[i], 1e-3, np.pi - 1e-3)
            return np.cos(theta) - (m + m * z[i])

        return _combined(cosines, labels, target, scale)

    return margin


class Step(NamedTuple):
    """A loss and its gradients."""

    loss: float
    embeddings: np.ndarray  # (B, D)
    centers: np.ndarray  # (C, D)


def softmax_loss(embeddings: np.ndarray, centers: np.ndarray, labels: np.ndarray, margin: Margin) -> Step:
    """Mean cross-entropy of a batch over all class centers.

    Args:
        embeddings: (B, D), not normalized.
        centers: (C, D), not normalized.
        labels: (B,) in [0, C).
        margin: one of this module's.
    """
    norms = np.sqrt((embeddings**2).sum(1))
    unit_embeddings = embeddings / norms[:, None]
    lengths = np.sqrt((centers**2).sum(1))
    unit_centers = centers / lengths[:, None]
    logits, slope = margin(unit_embeddings @ unit_centers.T, labels, norms)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()

    by_logits = probabilities.copy()
    by_logits[np.arange(len(labels)), labels] -= 1
    by_cosines = by_logits / len(labels) * slope
    return Step(
        loss,
        _through_length(by_cosines @ unit_centers, unit_embeddings, norms),
        _through_length(by_cosines.T @ unit_embeddings, unit_centers, lengths),
    )


def _through_length(gradient: np.ndarray, unit: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Gradient by a vector from the gradient by its direction: what lies along it is lost, the rest shrinks."""
    along = (gradient * unit).sum(1, keepdims=True)
    return (gradient - along * unit) / lengths[:, None]
