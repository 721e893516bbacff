"""Checks on training batches whether the norm of an embedding reflects image quality."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..geometry import CANONICAL_KEYPOINTS
from ..losses import AdaFace

_LAPLACE = ((0.0, 1.0, 0.0), (1.0, -4.0, 1.0), (0.0, 1.0, 0.0))


class NormWatch:
    """Statistics of embedding norms, of AdaFace's margins based on them, and their correlation with quality.

    AdaFace uses the norm as a proxy for image quality. For KPRPE the relation may be reversed (paper's supplement,
    section 4), which a negative correlation shows.

    Args:
        margin_loss: of the run.
    """

    def __init__(self, margin_loss: nn.Module) -> None:
        self.margin_loss = margin_loss
        self._norms: list[torch.Tensor] = []
        self._sharpness: list[torch.Tensor] = []
        self._distance: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor | None, embeddings: torch.Tensor) -> None:
        """Take note of one batch.

        Args:
            images: (B, 3, S, S) float in [-1, 1].
            keypoints: (B, 5, 2) float in [0, 1]; None: the network finds them.
            embeddings: (B, D) float, not normalized.
        """
        self._norms.append(embeddings.float().norm(dim=1))
        self._sharpness.append(sharpness(images))
        if keypoints is not None:
            template = torch.tensor(CANONICAL_KEYPOINTS, device=keypoints.device)
            self._distance.append((keypoints - template).norm(dim=-1).mean(1))

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Statistics since the last call; undefined ones, such as the correlation of equal numbers, are absent.

        Returns:
            ``norm/mean`` and ``norm/std`` of the batches; for AdaFace also ``norm/running_mean`` and
            ``norm/running_std``, ``margin/mean`` (added to the cosine) and ``margin/quality_mean`` (the factor of the
            margin, in [-1, 1]); and the correlations of the norm ``correlation/norm_sharpness`` and
            ``correlation/norm_alignment`` (minus the distance of the keypoints from the template).
        """
        norms, seen = torch.cat(self._norms), {}
        seen["norm/mean"], seen["norm/std"] = norms.mean().item(), norms.std().item()
        if isinstance(self.margin_loss, AdaFace):
            quality = self.margin_loss.quality(norms)
            seen["norm/running_mean"] = self.margin_loss.batch_mean.item()
            seen["norm/running_std"] = self.margin_loss.batch_std.item()
            seen["margin/quality_mean"] = quality.mean().item()
            seen["margin/mean"] = (self.margin_loss.m * (1 + quality)).mean().item()
        seen["correlation/norm_sharpness"] = correlation(norms, torch.cat(self._sharpness).clamp_min(1e-12).log())
        if self._distance:
            seen["correlation/norm_alignment"] = correlation(norms, -torch.cat(self._distance))
        self._norms, self._sharpness, self._distance = [], [], []
        return {name: round(value, 6) for name, value in seen.items() if math.isfinite(value)}


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """Variance of the Laplacian of the middle of each image, where rotated crops have no black corners.

    Args:
        images: (B, 3, S, S) float.

    Returns:
        (B,) float32.
    """
    size = images.shape[-1]
    middle = slice(size // 4, size - size // 4)
    gray = images[..., middle, middle].float().mean(1, keepdim=True)
    edges = F.conv2d(gray, torch.tensor(_LAPLACE, device=gray.device)[None, None])
    return edges.flatten(1).var(1)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Pearson's correlation of two vectors; NaN where one of them is constant or has one element."""
    a, b = a - a.mean(), b - b.mean()
    return ((a @ b) / (a.norm() * b.norm())).item()
