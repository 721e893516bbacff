"""KPRPE vision transformers, the AdaFace loss and the Differentiable Face Aligner for InsightFace.

Importing this package loads nothing else: each name is imported when it is first used. ``timm.create_model`` knows the
networks once ``insightface_kprpe.backbones`` is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import evaluation, geometry
    from .app.registration import register, unregister
    from .backbones import VisionTransformer, get_model, list_models, register_backbone, relative_position
    from .data.record_writer import RecordWriter
    from .data.recordio import RecordReader
    from .deployment import model_pack
    from .deployment.onnx_export import export_onnx
    from .dfa import DFA
    from .losses import AdaFace, ArcFace, CombinedMarginLoss, CosFace
    from .partial_fc import PartialFC
    from .state_dict import load_weights

__version__ = "0.1.0"

# Public name -> (module, attribute); no attribute: the module itself.
_LAZY = {
    "AdaFace": (".losses", "AdaFace"),
    "ArcFace": (".losses", "ArcFace"),
    "CombinedMarginLoss": (".losses", "CombinedMarginLoss"),
    "CosFace": (".losses", "CosFace"),
    "DFA": (".dfa", "DFA"),
    "PartialFC": (".partial_fc", "PartialFC"),
    "RecordReader": (".data.recordio", "RecordReader"),
    "RecordWriter": (".data.record_writer", "RecordWriter"),
    "VisionTransformer": (".backbones", "VisionTransformer"),
    "evaluation": (".evaluation", None),
    "export_onnx": (".deployment.onnx_export", "export_onnx"),
    "geometry": (".geometry", None),
    "get_model": (".backbones", "get_model"),
    "list_models": (".backbones", "list_models"),
    "load_weights": (".state_dict", "load_weights"),
    "model_pack": (".deployment.model_pack", None),
    "register": (".app.registration", "register"),
    "register_backbone": (".backbones", "register_backbone"),
    "relative_position": (".backbones.relative_position", None),
    "unregister": (".app.registration", "unregister"),
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
