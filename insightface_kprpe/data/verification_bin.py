"""InsightFace's ``.bin`` verification sets: compressed crops in pairs, and whether each pair shows one person.

The format is a pickle of ``(images, is_same)``, and a pickle can run any code when it is loaded. Here it cannot: the
few functions that such files need are replaced by harmless stand-ins, and any other name is an error.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ..files import atomic_path, user_file
from .image_codec import decode_image


@dataclass(frozen=True, eq=False)
class VerificationSet:
    """Crops in pairs: images 2i and 2i + 1 are pair i.

    Attributes:
        images: 2P compressed images.
        is_same: (P,) bool, whether a pair shows one person.
        name: of the set, for reports.
    """

    images: list[bytes]
    is_same: np.ndarray
    name: str

    def image(self, index: int) -> np.ndarray:
        """Decode one image.

        Returns:
            (H, W, 3) uint8 RGB; 112x112 in all the usual sets.

        Raises:
            ValueError: it is not a complete image.
        """
        try:
            return decode_image(self.images[index])
        except ValueError as error:
            raise ValueError(f"verification set {self.name}: image {index}: {error}") from error


def read_verification_bin(path: str | os.PathLike) -> VerificationSet:
    """Read a ``.bin`` set, whether Python 2, Python 3 or a tool that keeps images as NumPy arrays wrote it.

    Images are decoded when asked for.

    Args:
        path: the file; the set is named after it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, names anything that a verification set does not need, or does not hold two
            images for each answer.
    """
    path = user_file(path, "verification set")
    with open(path, "rb") as file:
        try:
            content = _SafeUnpickler(file).load()
            if not isinstance(content, (tuple, list)) or len(content) != 2:
                raise ValueError(f"expected a pair (images, is_same), got {type(content).__name__}")
            images, is_same = _checked_pairs(*content)
        except Exception as error:  # a damaged pickle raises anything from EOFError to KeyError
            raise ValueError(f"{path} is not a verification set: {error or type(error).__name__}") from error
    return VerificationSet(images, np.array(is_same, dtype=bool), path.stem)


def write_verification_bin(path: str | os.PathLike, images: Sequence[bytes], is_same: Sequence[bool]) -> None:
    """Write a ``.bin`` set that InsightFace's own loaders read; an existing file is replaced only by a whole one.

    Args:
        path: usually ends in ``.bin``.
        images: 2P compressed images; 2i and 2i + 1 are pair i.
        is_same: P answers.

    Raises:
        ValueError: there are no pairs, not two images for each answer, or an image that is not bytes.
    """
    content = _checked_pairs(list(images), [bool(answer) for answer in is_same])
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        pickle.dump(content, file, protocol=4)


def _checked_pairs(images: Any, is_same: Any) -> tuple[list[bytes], list[bool]]:
    """The content of a set, converted from the types that occur in practice to the expected ones."""
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"images must be a list, got {type(images).__name__}")
    images = [item.data if isinstance(item, _Array) else item for item in images]
    for i, image in enumerate(images):
        if not isinstance(image, (bytes, bytearray)) or not image:
            raise ValueError(f"image {i} must be a compressed image as bytes, got {image!r:.60}")
    if isinstance(is_same, _Array):
        is_same = is_same.integers()
    if not isinstance(is_same, (list, tuple)) or not all(isinstance(item, int) and item in (0, 1) for item in is_same):
        raise ValueError(f"is_same must be a list of True and False, got {is_same!r:.60}")
    if len(images) != 2 * len(is_same) or not images:
        raise ValueError(f"there must be two images per is_same, got {len(images)} and {len(is_same)}")
    return [bytes(image) for image in images], [bool(answer) for answer in is_same]


class _SafeUnpickler(pickle._Unpickler):
    """Loads lists, numbers, text and bytes; everything that a pickle looks up by name comes from ``_STAND_INS``.

    It is the unpickler that is written in Python: the one in C takes memory for as many objects as a file numbers, and
    nine bytes may number a billion.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # what Python 2 called str are JPEG bytes

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which verification sets do not need") from None


class _DType:
    """Stands in for numpy.dtype; of its state only the code given to the constructor matters."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        if state[1] in (">", b">"):
            raise pickle.UnpicklingError("big-endian arrays are not supported")


class _Array:
    """Stands in for numpy.ndarray: keeps type and bytes without interpreting them."""

    dtype: _DType
    data: bytes

    def __setstate__(self, state: Any) -> None:
        _, _, self.dtype, _, self.data = state

    def integers(self) -> list[int]:
        if not re.fullmatch("[biu][1248]", self.dtype.code):
            raise ValueError(f"expected True and False, got an array of {self.dtype.code!r}")
        return np.frombuffer(self.data, self.dtype.code.replace("b1", "u1")).tolist()


def _reconstruct(*_: Any) -> _Array:
    return _Array()  # its state follows


def _frombuffer(data: bytes, dtype: _DType, *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, None, dtype, False, data))
    return array


def _scalar(dtype: _DType, data: bytes) -> int:
    return _frombuffer(data, dtype).integers()[0]


def _to_bytes(value: Any = b"", encoding: Any = "latin1") -> bytes:
    """Stands in for bytes(), bytearray() and codecs.encode(), which older pickles keep bytes as latin-1 text for."""
    if isinstance(value, str) and encoding in ("latin1", "latin-1"):
        return value.encode("latin-1")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    raise pickle.UnpicklingError(f"bytes cannot come from {type(value).__name__} and encoding {encoding!r:.20}")


_STAND_INS = {
    ("_codecs", "encode"): _to_bytes,
    ("builtins", "bytes"): _to_bytes,
    ("builtins", "bytearray"): _to_bytes,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
}
