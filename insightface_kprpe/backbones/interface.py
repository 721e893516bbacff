"""What every backbone declares, so that training, evaluation, export and packs work with any of them."""

from __future__ import annotations

import contextlib
from abc import abstractmethod

import torch
import torch.nn as nn


class Backbone(nn.Module):
    """A network that embeds face crops: ``(images, keypoints) -> embeddings``.

    A subclass sets ``img_size`` and ``num_features`` and implements ``forward``; the rest has defaults.

    Attributes:
        img_size: side of its square input crops, in pixels.
        num_features: D, length of its embeddings.
        bgr: its weights are for BGR, so it swaps the channels of its RGB input.
        needs_keypoints: embeddings depend on the keypoints.
        finds_keypoints: with ``needs_keypoints``: it finds them itself if none are given, with :meth:`find_keypoints`.
    """

    img_size: int
    num_features: int
    bgr: bool = False
    needs_keypoints: bool = False
    finds_keypoints: bool = False

    @abstractmethod
    def forward(self, images: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        """Embed face crops.

        Args:
            images: (B, 3, img_size, img_size) float RGB in [-1, 1].
            keypoints: (B, 5, 2) float, xy in [0, 1] of the crop; None if they are not needed, or are found.

        Returns:
            (B, num_features) float32 embeddings, not normalized: the norm carries quality.
        """

    def find_keypoints(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 5, 2) keypoints in [0, 1] of the crops; only for networks with ``finds_keypoints``."""
        raise NotImplementedError(f"{type(self).__name__} finds no keypoints")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and norms."""
        return set()

    @torch.jit.ignore
    def position_tables(self) -> set[str]:
        """Names of the parameters that ``position_lr_scale`` is for: tables of relative positions."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute activations in the backward pass.

        Raises:
            ValueError: the network does not support it.
        """
        if enable:
            raise ValueError(f"gradient_checkpointing must be False: {type(self).__name__} does not support it")


def own_half_precision(fp16: bool, images: torch.Tensor) -> contextlib.AbstractContextManager:
    """Float16 autocast for a network built with ``fp16``, on CUDA; otherwise the caller's autocast state."""
    return torch.autocast("cuda", dtype=torch.float16) if fp16 and images.is_cuda else contextlib.nullcontext()


def check_backbone(net: object, name: str) -> Backbone:
    """Return a network that follows the interface, or raise an error that says how it does not.

    Args:
        net: what a registered function built.
        name: under which it is registered.

    Raises:
        ValueError: it is not a :class:`Backbone`, or an attribute is missing or contradicts another.
    """
    if not isinstance(net, Backbone):
        raise ValueError(
            f"backbone {name!r} must be an insightface_kprpe.backbones.Backbone, got {type(net).__name__}; derive its "
            "class from Backbone and set img_size and num_features"
        )
    for attribute in ("img_size", "num_features"):
        value = getattr(net, attribute, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"backbone {name!r} must set {attribute} to a positive integer, got {value!r}")
    if net.finds_keypoints and not net.needs_keypoints:
        raise ValueError(f"backbone {name!r} must set needs_keypoints if it sets finds_keypoints")
    return net
