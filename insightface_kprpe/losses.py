"""Margin losses on cosine logits: ArcFace, CosFace, their combined form, and AdaFace.

All share one call, ``loss(logits, labels, norms) -> scaled logits``, to be followed by a softmax cross-entropy:

- logits: (B, C) float cosines of unit embeddings and the C class centers of this rank, in [-1, 1];
- labels: (B,) or (B, 1) int64 column of the sample's own class, -1 where that class is on another rank;
- norms: (B,) or (B, 1) float, norms of the embeddings before normalization (used only by AdaFace).

The margin changes the value of the target logit but not its gradient (d out / d logits = scale), as in arcface_torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn


def _replace_targets(logits: torch.Tensor, labels: torch.Tensor, margin) -> torch.Tensor:
    """Apply ``margin(target, rows)`` to the target cosines, with a straight-through gradient."""
    labels = labels.reshape(-1)
    rows = torch.where(labels >= 0)[0]
    columns = labels[rows]
    with torch.no_grad():
        target = logits[rows, columns]
        change = torch.zeros_like(logits)
        change[rows, columns] = margin(target, rows) - target
    return logits + change


def _angle(cosine: torch.Tensor) -> torch.Tensor:
    return cosine.clamp(-1, 1).acos()


class MarginLoss(nn.Module):
    """What every margin loss declares: ``(logits, labels, norms) -> scaled logits``, see the module's docstring.

    Attributes:
        needs_norms: the margin depends on the norms of the embeddings; :meth:`update_statistics` then updates the
            running statistics with those of a batch.
    """

    needs_norms: bool = False

    def update_statistics(self, norms: torch.Tensor) -> None:
        """Update the running statistics with the (B,) norms of a whole batch; does nothing if there are none."""


class CombinedMarginLoss(MarginLoss):
    """ArcFace's angular margin or CosFace's additive one, with arcface_torch's arguments.

    Args:
        s: scale of the logits.
        m1: must be 1 (SphereFace's multiplicative margin is not supported).
        m2: angle in radians added to the target's angle (ArcFace); exclusive with m3.
        m3: subtracted from the target's cosine (CosFace); exclusive with m2.
        interclass_filtering_threshold: other classes' cosines above it are set to 0, since they are probably label
            noise; 0 disables the filter.

    Raises:
        ValueError: m1 is not 1, or not exactly one of m2 and m3 is positive.
    """

    def __init__(
        self,
        s: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.5,
        m3: float = 0.0,
        interclass_filtering_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if m1 != 1 or (m2 > 0) == (m3 > 0):
            raise ValueError(f"margins must be (1, m2, 0) for ArcFace or (1, 0, m3) for CosFace, got {(m1, m2, m3)}")
        self.scale, self.m2, self.m3 = s, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, norms: torch.Tensor | None = None) -> torch.Tensor:
        """See the module's docstring for shapes; ``norms`` is not used. Returns (B, C) scaled logits."""
        if self.interclass_filtering_threshold > 0:
            columns = torch.arange(logits.shape[1], device=logits.device)
            others = columns != labels.reshape(-1, 1)
            logits = logits.masked_fill(others & (logits.detach() > self.interclass_filtering_threshold), 0.0)
        if self.m2 > 0:
            return self.scale * _replace_targets(logits, labels, lambda target, _: (_angle(target) + self.m2).cos())
        return self.scale * _replace_targets(logits, labels, lambda target, _: target - self.m3)


class ArcFace(CombinedMarginLoss):
    """Additive angular margin (Deng et al., CVPR 2019): target = cos(theta + m)."""

    def __init__(self, m: float = 0.5, s: float = 64.0, interclass_filtering_threshold: float = 0.0) -> None:
        super().__init__(s, 1.0, m, 0.0, interclass_filtering_threshold)


class CosFace(CombinedMarginLoss):
    """Additive cosine margin (Wang et al., CVPR 2018): target = cos(theta) - m."""

    def __init__(self, m: float = 0.4, s: float = 64.0, interclass_filtering_threshold: float = 0.0) -> None:
        super().__init__(s, 1.0, 0.0, m, interclass_filtering_threshold)


class AdaFace(MarginLoss):
    """A margin that follows image quality, read from the embedding's norm (Kim et al., CVPR 2022).

    Args:
        m: margin.
        h: concentration: how many standard deviations of the norm span the range of margins.
        t_alpha: weight of the new batch in the running mean and deviation of the norms.
        s: scale of the logits.
    """

    needs_norms = True

    def __init__(self, m: float = 0.4, h: float = 0.333, t_alpha: float = 0.01, s: float = 64.0) -> None:
        super().__init__()
        self.m, self.h, self.t_alpha, self.scale = m, h, t_alpha, s
        self.register_buffer("batch_mean", torch.tensor([20.0]))
        self.register_buffer("batch_std", torch.tensor([100.0]))

    @torch.no_grad()
    def update_statistics(self, norms: torch.Tensor) -> None:
        """Update the running mean and deviation with those of a batch; in training mode, every call does so.

        Args:
            norms: (B,) or (B, 1) float, lengths of the embeddings of the whole batch.
        """
        norms = self._clipped(norms)
        if len(norms) > 1:  # one sample has no deviation
            self.batch_mean.lerp_(norms.mean(), self.t_alpha)
            self.batch_std.lerp_(norms.std(), self.t_alpha)

    @torch.no_grad()
    def quality(self, norms: torch.Tensor) -> torch.Tensor:
        """Norms standardized by the running statistics: 0 is average quality.

        Args:
            norms: (B,) or (B, 1) float, lengths of the embeddings.

        Returns:
            (B,) float32 in [-1, 1], the factor of the margin.
        """
        return (self.h * (self._clipped(norms) - self.batch_mean) / (self.batch_std + 1e-3)).clamp(-1, 1)

    @staticmethod
    def _clipped(norms: torch.Tensor) -> torch.Tensor:
        return norms.detach().float().reshape(-1).clamp(0.001, 100)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """See the module's docstring for shapes. Returns (B, C) scaled logits.

        Raises:
            ValueError: norms do not match the batch.
        """
        if norms is None or norms.numel() != len(logits):
            got = None if norms is None else tuple(norms.shape)
            raise ValueError(f"norms must be ({len(logits)},) lengths of the unnormalized embeddings, got {got}")
        if self.training:
            self.update_statistics(norms)
        quality = self.quality(norms)

        def margin(target: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            z = quality[rows].to(target.dtype)
            angle = (_angle(target) - self.m * z).clamp(1e-3, math.pi - 1e-3)
            return angle.cos() - (self.m + self.m * z)

        return self.scale * _replace_targets(logits, labels, margin)
