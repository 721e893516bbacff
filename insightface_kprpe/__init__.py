"""KPRPE vision transformers, the AdaFace loss and the Differentiable Face Aligner for InsightFace.

Importing this package registers its networks with timm and does nothing else; what needs OpenCV, onnxruntime or
``insightface`` is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .backbones import VisionTransformer, get_model, list_models, register_backbone
from .losses import AdaFace, ArcFace, CombinedMarginLoss, CosFace
from .partial_fc import PartialFC

if TYPE_CHECKING:
    from . import evaluation, geometry
    from .backbones import relative_position
    from .data.record_writer import RecordWriter
    from .data.recordio import RecordReader
    from .deployment import model_pack
    from .deployment.onnx_export import export_onnx
    from .deployment.weights import load_weights
    from .dfa import DFA
    from .model_zoo import register, unregister

__version__ = "0.1.0"

# Public name -> (module, attribute); no attribute: the module itself.
_LAZY = {
    "DFA": (".dfa", "DFA"),
    "RecordReader": (".data.recordio", "RecordReader"),
    "RecordWriter": (".data.record_writer", "RecordWriter"),
    "evaluation": (".evaluation", None),
    "export_onnx": (".deployment.onnx_export", "export_onnx"),
    "geometry": (".geometry", None),
    "load_weights": (".deployment.weights", "load_weights"),
    "model_pack": (".deployment.model_pack", None),
    "register": (".model_zoo", "register"),
    "relative_position": (".backbones.relative_position", None),
    "unregister": (".model_zoo", "unregister"),
}

__all__ = [
    "DFA",
    "AdaFace",
    "ArcFace",
    "CombinedMarginLoss",
    "CosFace",
    "PartialFC",
    "RecordReader",
    "RecordWriter",
    "VisionTransformer",
    "evaluation",
    "export_onnx",
    "geometry",
    "get_model",
    "list_models",
    "load_weights",
    "model_pack",
    "register",
    "register_backbone",
    "relative_position",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module, __name__)
    return loaded if attribute is None else getattr(loaded, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
