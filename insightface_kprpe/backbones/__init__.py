"""Backbones: face crops (and keypoints) -> embeddings."""

import importlib
import os

from .interface import Backbone
from .registry import get_model, list_models, register_backbone
from .vision_transformer import VisionTransformer

__all__ = ["Backbone", "VisionTransformer", "get_model", "list_models", "register_backbone"]

# Modules that register a user's own networks when imported, so that every command knows them.
for _module in filter(None, os.environ.get("INSIGHTFACE_KPRPE_BACKBONES", "").split(",")):
    try:
        importlib.import_module(_module.strip())
    except ImportError as error:
        raise ImportError(
            f"INSIGHTFACE_KPRPE_BACKBONES must name importable modules, could not import {_module.strip()!r} "
            f"({error}); is its folder on PYTHONPATH?"
        ) from error
