"""Backbones: face crops (and keypoints) -> embeddings."""

import importlib
import os

from .interface import Backbone
from .registry import get_model, list_models, register_backbone
from .vision_transformer import VisionTransformer

__all__ = ["Backbone", "VisionTransformer", "get_model", "list_models", "register_backbone"]

# A user's own networks, which every command should know: modules that register them when they are imported.
for _module in filter(None, os.environ.get("INSIGHTFACE_KPRPE_BACKBONES", "").split(",")):
    try:
        importlib.import_module(_module.strip())
    except ImportError as error:
        raise ImportError(
            f"INSIGHTFACE_KPRPE_BACKBONES must name modules that can be imported, {_module.strip()!r} cannot "
            f"({error}); is its folder on PYTHONPATH?"
        ) from error
