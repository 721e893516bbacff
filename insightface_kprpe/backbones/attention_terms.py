"""The terms of attention, layer by layer: similarity of queries and keys, and what the keypoints add."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn

from .vision_transformer import VisionTransformer


class AttentionTerms(NamedTuple):
    """The two terms of one layer's attention logits.

    Attributes:
        similarity: (B, H, N, N) float32, scaled q . k of every query and key.
        bias: (B, H or 1, N, N) float32, of KPRPE; zeros without it.
    """

    similarity: torch.Tensor
    bias: torch.Tensor


@torch.no_grad()
def attention_terms(
    net: VisionTransformer, images: torch.Tensor, keypoints: torch.Tensor | None = None
) -> Iterator[AttentionTerms]:
    """Run a ViT in eval mode and look at its attention.

    Args:
        net: plain or with KPRPE, not iRPE, whose bias depends on the tokens.
        images: (B, 3, S, S) float RGB in [-1, 1].
        keypoints: (B, 5, 2) float in [0, 1] of the crop; needed by KPRPE.

    Yields:
        The terms of each layer, from the first.

    Raises:
        ValueError: the network has iRPE, or its keypoints are missing.
    """
    if net.position == "irpe":
        raise ValueError('net must have position None or "kprpe", got "irpe"')
    inputs: list[torch.Tensor] = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in net.blocks]
    try:
        with eval_mode(net):
            net.forward(images, keypoints)
    finally:
        for hook in hooks:
            hook.remove()
    tables = net.keypoint_linear(keypoints) if net.position == "kprpe" else None
    for layer, (block, tokens) in enumerate(zip(net.blocks, inputs, strict=True)):
        attention = block.attn
        batch, length, _ = tokens.shape
        qkv = attention.qkv(tokens).reshape(batch, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        similarity = (qkv[0] * attention.scale) @ qkv[1].mT
        bias = (
            net.keypoint_linear.attention_bias(tables, layer, torch.float32) if tables else torch.zeros_like(similarity)
        )
        yield AttentionTerms(similarity.float(), bias)


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a ``with`` block, and restore its mode afterwards."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)
