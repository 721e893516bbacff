"""Reads untrusted ``.npz`` files: their content is checked before it is loaded into memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

_AT_ONCE = 1 << 24  # bytes
_HEADER_LIMIT = 4096  # characters, enough for any array of numbers or texts


def read_npz(path: Path, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Read some arrays of a file that NumPy's ``savez`` wrote.

    An array takes no more memory than it takes in the file, as compressed ones are refused; nothing is unpickled.

    Args:
        path: of the file.
        required: names of arrays that must be there.
        optional: names of arrays that are read if all of them are there.

    Raises:
        ValueError: it is not such a file, an array is missing, compressed, of Python objects, or does not fit its
            header.
    """
    required, optional = tuple(required), tuple(optional)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            names = required + (optional if all(f"{name}.npy" in members for name in optional) else ())
            missing = [name for name in names if f"{name}.npy" not in members]
            if missing:
                raise ValueError(f"it has no array {', '.join(missing)}")
            return {name: _read(archive, members[f"{name}.npy"]) for name in names}
    except ValueError:
        raise
    except Exception as error:  # damaged archives and headers raise anything from OSError to TokenError
        raise ValueError(f"it is not a complete .npz file ({error or type(error).__name__})") from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise ValueError(f"{member.filename} is compressed")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{member.filename} has the unknown version {version}")
        shape, fortran, dtype = readers[version](file, _HEADER_LIMIT)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or fortran or file.tell() + size != member.file_size:
            raise ValueError(f"{member.filename} does not hold {shape} of {dtype}, as its header says")
        buffer = np.empty(size, np.uint8)
        for start in range(0, size, _AT_ONCE):  # in parts, as the file returns copies
            part = file.read(min(_AT_ONCE, size - start))
            buffer[start : start + len(part)] = np.frombuffer(part, np.uint8)
        return buffer.view(dtype).reshape(shape)
