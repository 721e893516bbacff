"""Identifies contents: a short fingerprint of values, and the SHA-256 of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch


def fingerprint(*parts: str | bytes | np.ndarray | torch.Tensor) -> str:
    """Twelve hexadecimal digits that identify the inputs."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().reshape(-1).view(torch.uint8).numpy()  # works even for dtypes that NumPy lacks
        elif isinstance(part, str):
            part = part.encode()
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()[:12]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
