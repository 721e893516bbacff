"""Backbones: face crops (and keypoints) -> embeddings."""

from .interface import Backbone
from .registry import get_model, list_models, register_backbone
from .vision_transformer import VisionTransformer

__all__ = ["Backbone", "VisionTransformer", "get_model", "list_models", "register_backbone"]
