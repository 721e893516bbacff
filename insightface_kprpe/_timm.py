"""Makes timm importable even if torchvision's compiled operators do not match the installed torch.

timm needs only the Python half of torchvision. A torchvision wheel built for CUDA next to a CPU-only torch (or the
other way round) cannot load its compiled half, and then fails on import because it describes operators that were never
defined. Defining their schemas is enough for the Python half to work; calling such an operator still fails, as it
should.
"""

from __future__ import annotations

import torch

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from timm.layers import Attention, Mlp, PatchEmbed
from timm.models import create_model, register_model
from timm.models.mlp_mixer import MixerBlock
from timm.models.vision_transformer import Block

__all__ = ["Attention", "Block", "MixerBlock", "Mlp", "PatchEmbed", "create_model", "register_model"]
