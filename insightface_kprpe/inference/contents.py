"""Hashes of image files, so that results of a file that has changed are not used."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..files import user_file
from .images import as_it_lies

DIGEST_BYTES = 16
_THREADS = 8  # hashing and reading release the GIL


class Contents(NamedTuple):
    """Of N files; a missing one has zeros."""

    stamps: np.ndarray  # (N, 2) int64, size in bytes and modification time in nanoseconds
    digests: np.ndarray  # (N, DIGEST_BYTES) uint8, hash of the bytes


def read_contents(paths: Sequence[Path], known: Contents | None = None) -> Contents:
    """Hash files; one with the same size and time as before is assumed to be unchanged.

    Args:
        paths: of N files.
        known: the previous result, in the same order.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = np.array(list(pool.map(_stamp, paths)), np.int64).reshape(-1, 2)
        fits = known is not None and known.stamps.shape == stamps.shape
        digests = known.digests.copy() if fits else np.zeros((len(stamps), DIGEST_BYTES), np.uint8)
        unknown = np.flatnonzero((known.stamps != stamps).any(1)) if fits else np.arange(len(stamps))
        found = pool.map(lambda i: _digest(paths[i]), unknown)
        for place, digest in zip(unknown, tqdm(found, "hashing", len(unknown), leave=False, disable=None), strict=True):
            digests[place] = np.frombuffer(digest, np.uint8)
    return Contents(stamps, digests)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = as_it_lies(path).stat()
    except (OSError, ValueError):  # a name may hold anything
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    try:
        with open(user_file(as_it_lies(path)), "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, ValueError):
        return bytes(DIGEST_BYTES)
    return digest.digest()
