"""A KPRPE ViT that finds its keypoints itself: image in, embedding out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from ..dfa import DFA
from ..dfa.network import RetinaFaceNet
from ..dfa.weights import load_dfa, network_of
from ..geometry import SCORE_THRESHOLD
from .relative_position import template_keypoints
from .vision_transformer import VisionTransformer

logger = logging.getLogger(__name__)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Suppress the warning about random aligner weights in a ``with`` block: they come later, or do not matter."""
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


class ViTWithDFA(VisionTransformer):
    """A KPRPE network with a frozen, built-in Differentiable Face Aligner.

    Its weights are those of the network without aligner, and DFA's under ``dfa.``: one file holds both. DFA never
    learns: its parameters require no gradient, so optimizers, weight decay and gradient exchange skip them, and it
    stays in eval mode. Gradients flow *through* it to images that require them.

    Args:
        dfa_weights: of a DFA: a file, the output folder of ``train-dfa``, or a state dict; its body and whether it has
            an aggregator are inferred from them. None: random weights, to be loaded later.
        dfa_threshold: a face with a lower score in [0, 1] gets the canonical keypoints.
        **settings: of :class:`VisionTransformer`.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: the weights are not those of a DFA, or an argument is out of range.
    """

    finds_keypoints = True

    def __init__(
        self,
        dfa_weights: str | Path | Mapping[str, torch.Tensor] | None = None,
        dfa_threshold: float = SCORE_THRESHOLD,
        **settings,
    ) -> None:
        if settings.setdefault("position", "kprpe") != "kprpe":
            raise ValueError(f'position must be "kprpe" to use keypoints, got {settings["position"]!r}')
        if not 0 <= dfa_threshold <= 1:
            raise ValueError(f"dfa_threshold must be in [0, 1], got {dfa_threshold}")
        super().__init__(**settings)
        self.dfa_threshold = dfa_threshold
        if dfa_weights is None:
            logger.warning(
                "the built-in aligner has random weights, so its keypoints are meaningless until weights are loaded; "
                "pass dfa_weights=FILE"
            )
            self.dfa = DFA()
        else:
            self.dfa = load_dfa(dfa_weights)
            if not torch.equal(self.dfa.anchors, RetinaFaceNet(**network_of(self.dfa.state_dict())).anchors):
                raise ValueError(
                    "dfa_weights must be those of a DFA with aggregator at 160 pixels, or RetinaFace's; got those of a "
                    "network with other anchors, which a file with both networks' weights could not record"
                )
        self.dfa.requires_grad_(False)
        self.register_buffer("template", template_keypoints(1).clone(), persistent=False)
        # Buffers that never change need not be broadcast before every step either.
        frozen = [*self.dfa.named_parameters(), *self.dfa.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [f"dfa.{name}" for name, _ in frozen]
        self.train(self.training)

    def train(self, mode: bool = True) -> ViTWithDFA:
        """Set training or eval mode for everything except the aligner, which is always in eval mode."""
        super().train(mode)
        self.dfa.eval()
        return self

    def forward_features(self, images: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        """All blocks and the last normalization.

        Args:
            images: (B, 3, img_size, img_size) float RGB in [-1, 1].
            keypoints: (B, 5, 2) float, xy in [0, 1] of the crop; None: the aligner finds them.

        Returns:
            (B, N, D) float32 tokens.

        Raises:
            ValueError: the keypoints given are of a wrong shape, not finite or in pixels.
        """
        return super().forward_features(images, self.find_keypoints(images) if keypoints is None else keypoints)

    def find_keypoints(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 5, 2) keypoints in [0, 1] of the crops: the aligner's, or the canonical ones below the threshold."""
        with torch.autocast(images.device.type, enabled=False):  # the same points in training as in inference
            keypoints, score, _ = self.dfa.locate(images)
        return torch.where((score >= self.dfa_threshold)[:, None, None], keypoints, self.template.to(keypoints))
