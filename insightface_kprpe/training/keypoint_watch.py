"""Checks on a batch, from time to time, whether a KPRPE network uses its keypoints."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F

from ..backbones.attention_terms import attention_terms, eval_mode
from ..backbones.relative_position import template_keypoints
from ..backbones.vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)

LEAST_SHIFT = 0.05  # of a unit embedding's length; below it the keypoints do not matter
_IMAGES = 32  # of a batch; enough for means


def keypoint_use(net: VisionTransformer, images: torch.Tensor, keypoints: torch.Tensor) -> dict[str, float]:
    """How much a KPRPE network uses the keypoints of some images.

    Attention does not change if the same number is added to all keys of a query, so each row's mean is removed.

    Args:
        net: has ``position="kprpe"``; its mode and weights are left as they are, and no random number is drawn.
        images: (B, 3, S, S) float RGB in [-1, 1].
        keypoints: (B, 5, 2) float in [0, 1] of the crop.

    Returns:
        ``keypoints/attention_share``, mean |bias| over the sum of mean |bias| and mean |q . k|, in [0, 1], mean over
        layers; ``keypoints/template_shift``, how far the unit embedding moves if the template's keypoints replace the
        image's, mean over images, in [0, 2].
    """
    shares = []
    for similarity, bias in attention_terms(net, images, keypoints):
        terms = [(term - term.mean(-1, keepdim=True)).abs().mean() for term in (bias, similarity)]
        shares.append((terms[0] / (terms[0] + terms[1]).clamp_min(1e-12)).item())
    with torch.no_grad(), eval_mode(net):
        template = template_keypoints(len(images), images.device)
        seen, other = (F.normalize(net.forward(images, points)) for points in (keypoints, template))
    shift = (seen - other).norm(dim=1).mean().item()
    return {"keypoints/attention_share": sum(shares) / len(shares), "keypoints/template_shift": shift}


class KeypointWatch:
    """Keeps a part of the latest batch, measures on it, and warns at the end of a run if its keypoints are ignored.

    Args:
        net: of the run, on its device.
    """

    def __init__(self, net: VisionTransformer) -> None:
        self.net = net
        self.shift: float | None = None
        self._batch: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def __call__(self, images: torch.Tensor, keypoints: torch.Tensor | None) -> None:
        """Keep part of a batch: (B, 3, S, S) float in [-1, 1], and (B, 5, 2) or None: the network finds them."""
        self._batch = (images[:_IMAGES], None if keypoints is None else keypoints[:_IMAGES])

    def values(self) -> dict[str, float]:
        """:func:`keypoint_use` of the latest batch; empty before the first."""
        if self._batch is None:
            return {}
        images, keypoints = self._batch
        if keypoints is None:
            keypoints = self.net.find_keypoints(images)
        use = keypoint_use(self.net, images, keypoints)
        self.shift = use["keypoints/template_shift"]
        return {name: round(value, 6) for name, value in use.items()}

    def warn_if_ignored(self) -> None:
        """Warn once, if the latest :meth:`values` show that the network hardly uses its keypoints."""
        if self.shift is not None and self.shift < LEAST_SHIFT:
            logger.warning(
                "the network ignores its keypoints: replacing them by the template's moves its embeddings by %.1f %% "
                "of "
                "their length (less than %.0f %%), so KPRPE has no effect. Raise position_lr_scale (30 for runs of a "
                "few "
                "thousand steps), train longer, and train on augmented crops (augment) that have landmarks of "
                "their own (ldmk_5points.csv); see docs/does_kprpe_help.md",
                100 * self.shift,
                100 * LEAST_SHIFT,
            )
