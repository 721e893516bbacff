"""The Differentiable Face Aligner: landmarks of one face per crop, and the crop aligned by them."""

from insightface_kprpe.dfa.aligner import DFA, AlignedFace
from insightface_kprpe.dfa.loss import DFALoss
from insightface_kprpe.dfa.network import RETINAFACE, RetinaFaceNet, describe, start_from_retinaface
from insightface_kprpe.dfa.weights import load_dfa

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
