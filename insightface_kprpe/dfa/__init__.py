"""The Differentiable Face Aligner: landmarks of one face per crop, and the crop aligned by them."""

from .aligner import DFA, AlignedFace
from .loss import DFALoss
from .network import RETINAFACE, RetinaFaceNet, describe, start_from_retinaface
from .weights import load_dfa

__all__ = [
    "DFA",
    "RETINAFACE",
    "AlignedFace",
    "DFALoss",
    "RetinaFaceNet",
    "describe",
    "load_dfa",
    "start_from_retinaface",
]
