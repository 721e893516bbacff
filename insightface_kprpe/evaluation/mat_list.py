"""Lists of image names and identities in MATLAB's file format (level 5, as MATLAB 5 to 7 write it).

SciPy reads more of the format, but a damaged file can end its process. Here nothing is trusted: what does not fit is an
error. "MAT-File Format" (The MathWorks) describes the format; a list needs numbers and cells of text only.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_HEADER_BYTES = 128
_MOST_BYTES = 1 << 28  # of one variable, unpacked; a list of a million images has a tenth of it
_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_ENCODINGS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements
_CELL, _TEXT, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 4, 6, 15  # classes of matrices


def read_mat_list(path: str | Path, names_key: str, ids_key: str) -> tuple[list[str], np.ndarray]:
    """Read a list.

    Args:
        path: the ``.mat`` file.
        names_key: variable with a cell of text for each image.
        ids_key: variable with a whole number for each image.

    Returns:
        N names and (N,) int64 identities.

    Raises:
        ValueError: the file is damaged or of another version, lacks a variable, or both are not equally long.
    """
    path = Path(path)
    try:
        variables = dict(_variables(path.read_bytes(), (names_key, ids_key)))
        missing = [key for key in (names_key, ids_key) if key not in variables]
        if missing:
            raise ValueError(f"{' and '.join(missing)} not found in it")
        names, ids = (_content(*variables[key]) for key in (names_key, ids_key))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{names_key} must be a cell of text for each image")
        if not isinstance(ids, np.ndarray) or not (np.isfinite(ids) & (ids == np.rint(ids))).all():
            raise ValueError(f"{ids_key} must be whole numbers")
        if len(names) != len(ids) or not names:
            raise ValueError(f"there must be one identity for each image, got {len(ids)} for {len(names)}")
    except (ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{path} is not a list in MATLAB's format (version 5 to 7): {error}") from error
    return names, ids.astype(np.int64)


def _variables(content: bytes, wanted: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, list[tuple[int, bytes]]]]]:
    """Name, and class and elements, of the wanted variables of a file."""
    if content[126:128] != b"IM" or content[124:126] != b"\0\1":
        raise ValueError("its header is another one; save it with -v7 on a little-endian machine, or is it cut off?")
    for kind, data in _elements(content[_HEADER_BYTES:]):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(data, _MOST_BYTES)
            if not unpacker.eof:
                raise ValueError("a compressed variable is cut off or too large")
            ((kind, data),) = _elements(data)
        if kind == _MATRIX:
            name, of_class, parts = _matrix(data)
            if name in wanted:
                yield name, (of_class, parts)


def _elements(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and data of elements that stand one behind the other."""
    at = 0
    while at < len(content):
        kind, size = struct.unpack_from("<II", content, at)
        start, step = at + 8, size
        if kind >> 16:  # up to four bytes may share a word with their size
            kind, size, start, step = kind & 0xFFFF, kind >> 16, at + 4, 0
        if start + size > len(content) or (step == 0 and size > 4):
            raise ValueError("it is cut off or damaged")
        yield kind, content[start : start + size]
        at += 8 + (step if kind == _COMPRESSED else -(-step // 8) * 8)


def _matrix(data: bytes) -> tuple[str, int, list[tuple[int, bytes]]]:
    """Name, class and what follows of a matrix."""
    parts = list(_elements(data))
    if len(parts) < 3 or len(parts[0][1]) != 8:
        raise ValueError("a variable lacks its description")
    return parts[2][1].decode("latin-1"), parts[0][1][0], parts[3:]


def _content(of_class: int, parts: list[tuple[int, bytes]]) -> list | str | np.ndarray:
    """A list of what its cells hold, text, or (N,) numbers."""
    if of_class == _CELL:
        return [_content(*_matrix(data)[1:]) for kind, data in parts if kind == _MATRIX]
    kind, data = parts[0] if parts else (0, b"")
    if of_class == _TEXT and kind in _ENCODINGS:
        return data.decode(_ENCODINGS[kind])
    if _FIRST_NUMERIC <= of_class <= _LAST_NUMERIC and kind in _NUMBERS:
        return np.frombuffer(data, _NUMBERS[kind])
    raise ValueError(f"it holds a matrix of class {of_class} with data of kind {kind}; names and numbers are expected")
