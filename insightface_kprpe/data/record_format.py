"""The bytes of MXNet's RecordIO: what a record is, and how it is stored in the file.

A ``.rec`` file is a chain of records, and a text file ``.idx`` next to it says at which byte the record of each key
starts. A record's content is a header (one label or several, two ids) and a payload, for us a compressed image. It is
stored as one part or, where it holds the format's magic number at a multiple of 4 bytes, as several: the magic is left
out there and restored when the parts are joined. Each part is ``magic, kind << 29 | length, bytes``, padded to 4.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
PART = struct.Struct("<II")  # magic, kind << 29 | length
HEADER = struct.Struct("<IfQQ")  # number of labels that follow (0: the next field is the label), label, id, id2
WHOLE, FIRST, MIDDLE, LAST = range(4)  # kinds of parts
LENGTH_LIMIT = 1 << 29


class RecordError(ValueError):
    """A damaged RecordIO file; the message names the file, the record's key and the byte."""


class RecordHeader(NamedTuple):
    """What a record says besides its payload.

    Attributes:
        label: one number, or (L,) float32 for records with several; MXNet keeps all as float32.
        id: usually the record's key.
        id2: unused by the usual writers.
    """

    label: float | np.ndarray
    id: int = 0
    id2: int = 0

    @property
    def flag(self) -> int:
        """MXNet's name for the number of labels stored as an array; 0 for a single number."""
        return np.size(self.label) if np.ndim(self.label) else 0


def encode_record(header: RecordHeader, payload: bytes) -> bytes:
    """A record as stored in the file, byte for byte as MXNet writes it.

    Raises:
        ValueError: the array of labels is empty, or the record too long for the format (512 MiB).
    """
    flag = header.flag
    if not flag and np.ndim(header.label):
        raise ValueError("label must be a number or a non-empty array, got an empty array")
    labels = np.asarray(header.label, "<f4").tobytes() if flag else b""
    content = HEADER.pack(flag, 0.0 if flag else header.label, header.id, header.id2) + labels + payload
    if len(content) >= LENGTH_LIMIT:
        raise ValueError(f"a record must be shorter than {LENGTH_LIMIT} bytes, got {len(content)}")
    parts = _split(content)
    kinds = [FIRST, *[MIDDLE] * (len(parts) - 2), LAST] if len(parts) > 1 else [WHOLE]
    pieces = [PART.pack(MAGIC, kind << 29 | len(part)) + part for kind, part in zip(kinds, parts, strict=True)]
    return b"".join(pieces) + bytes(-len(content) % 4)


def decode_content(content: bytes) -> tuple[RecordHeader, bytes]:
    """Header and payload from a record's content.

    Raises:
        ValueError: the content is too short for its header.
    """
    if len(content) < HEADER.size:
        raise ValueError(f"{len(content)} bytes are too short for a header")
    flag, label, id_, id2 = HEADER.unpack_from(content)
    payload_at = HEADER.size + 4 * flag
    if payload_at > len(content):
        raise ValueError(f"{len(content)} bytes are too short for {flag} labels")
    if flag:
        label = np.frombuffer(content, "<f4", flag, HEADER.size).copy()
    return RecordHeader(label, id_, id2), content[payload_at:]


def file_prefix(path: str | os.PathLike) -> Path:
    """The common part of a pair's names: from ``dir/train.rec``, ``dir/train``, or a folder (``train`` in it)."""
    path = Path(path)
    if path.is_dir():
        return path / "train"
    return path.with_suffix("") if path.suffix == ".rec" else path


def _split(content: bytes) -> list[bytes]:
    """Cut out every magic number that stands at a multiple of 4 bytes."""
    parts, start = [], 0
    at = content.find(MAGIC_BYTES)
    while at >= 0:
        if at % 4:
            at = content.find(MAGIC_BYTES, at + 1)
        else:
            parts.append(content[start:at])
            start = at + 4
            at = content.find(MAGIC_BYTES, start)
    return [*parts, content[start:]]
