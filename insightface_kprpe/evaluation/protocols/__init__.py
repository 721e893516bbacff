"""The protocols from images to results: which crops to embed, how to fuse and score them, how to describe it.

Models are what ``inference.models.open_model`` returns, or a ``TorchEmbedder``.
"""

from __future__ import annotations

from .ijb import run_ijb
from .ijbs import run_ijbs
from .pairs import run_pairs
from .templates import choose_fusions
from .tinyface import run_tinyface

__all__ = ["choose_fusions", "run_ijb", "run_ijbs", "run_pairs", "run_tinyface"]
