"""Backbones: face crops (and keypoints) -> embeddings."""

from .registry import get_model, list_models, register_backbone
from .vision_transformer import VisionTransformer

__all__ = ["VisionTransformer", "get_model", "list_models", "register_backbone"]
