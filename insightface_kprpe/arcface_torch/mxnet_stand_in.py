"""The few calls of MXNet that arcface_torch's scripts make, on this package's RecordIO reader, OpenCV and NumPy.

MXNet is retired and does not run on current Python versions. Its data formats live on; see
:mod:`insightface_kprpe.data.recordio`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import cv2
import numpy as np

from ..data.image_codec import decode_image
from ..data.record_format import HEADER, decode_content
from ..data.recordio import RecordReader
from .changes import Change, change

CHANGES: list[Change] = []


class IRHeader(NamedTuple):
    """What a record says besides its payload, in MXNet's order."""

    flag: int
    label: float | np.ndarray
    id: int
    id2: int


class NDArray(np.ndarray):
    """A NumPy array that answers to MXNet's ``asnumpy``."""

    def asnumpy(self) -> np.ndarray:
        """A contiguous copy as a plain array."""
        return np.array(self, order="C", subok=False)


class MXIndexedRecordIO:
    """``mxnet.recordio.MXIndexedRecordIO`` for reading.

    Args:
        idx_path: the ``.idx`` file, which must stand next to the ``.rec``.
        uri: the ``.rec`` file.
        flag: "r".

    Raises:
        ValueError: flag is not "r", or the index belongs to another file.
    """

    def __init__(self, idx_path: str, uri: str, flag: str) -> None:
        if flag != "r":
            raise ValueError(
                f'flag must be "r", got {flag!r}: this stand-in for MXNet only reads; write with '
                "insightface_kprpe.RecordWriter"
            )
        if Path(idx_path) != Path(uri).with_suffix(".idx"):
            raise ValueError(f"the index of {uri} must be {Path(uri).with_suffix('.idx')}, got {idx_path}")
        self._reader = RecordReader(uri)
        self.keys = self._reader.keys.tolist()

    def read_idx(self, idx: int) -> bytes:
        """One record's content, for :func:`unpack`."""
        header, payload = self._reader[idx]
        labels = np.asarray(header.label, "<f4").tobytes() if header.flag else b""
        return HEADER.pack(header.flag, 0 if header.flag else header.label, header.id, header.id2) + labels + payload

    def close(self) -> None:
        """Nothing to close."""


def unpack(s: bytes) -> tuple[IRHeader, bytes]:
    """Header and payload of a record's content."""
    header, payload = decode_content(s)
    return IRHeader(header.flag, header.label, header.id, header.id2), payload


def imdecode(buf: bytes | np.ndarray, *args, **kwargs) -> NDArray:
    """A compressed image -> (H, W, 3) uint8 RGB."""
    if args or kwargs:
        raise ValueError(f"this stand-in for MXNet decodes to RGB only, got extra arguments {args or kwargs}")
    return decode_image(bytes(buf)).view(NDArray)


def resize_short(src: np.ndarray, size: int, interp: int = cv2.INTER_CUBIC) -> NDArray:
    """Resize so that the shorter side has ``size`` pixels; interp is OpenCV's number, as in MXNet."""
    height, width = src.shape[:2]
    shape = (size * width // height, size) if height < width else (size, size * height // width)  # OpenCV's (w, h)
    return cv2.resize(np.asarray(src), shape, interpolation=interp).view(NDArray)


def transpose(data: np.ndarray, axes: tuple[int, ...]) -> NDArray:
    """Reorder the axes."""
    return np.transpose(data, axes).view(NDArray)


def flip(data: np.ndarray, axis: int) -> NDArray:
    """Reverse one axis."""
    return np.flip(data, axis).view(NDArray)


class _StandIn(ModuleType):
    """A module whose error for a missing attribute says what it is."""

    def __getattr__(self, name: str):
        raise AttributeError(
            f"{self.__name__}.{name} is not one of the few calls that insightface_kprpe's stand-in for MXNet provides; "
            "this script needs MXNet itself"
        )


def build() -> dict[str, ModuleType]:
    """The stand-in's modules by their names in ``sys.modules``."""
    contents = {
        "mxnet": {},
        "mxnet.recordio": {"MXIndexedRecordIO": MXIndexedRecordIO, "unpack": unpack, "IRHeader": IRHeader},
        "mxnet.image": {"imdecode": imdecode, "resize_short": resize_short},
        "mxnet.ndarray": {"NDArray": NDArray, "transpose": transpose, "flip": flip},
        "mxnet.gluon": {},
        "mxnet.gluon.data": {"Dataset": object},
    }
    modules = {name: _StandIn(name, "Stands in for MXNet.") for name in contents}
    for name, attributes in contents.items():
        modules[name].__dict__.update(attributes)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, modules[name])
    modules["mxnet"].nd = modules["mxnet.ndarray"]
    return modules


@change(
    "mxnet",
    "a stand-in for the calls that read RecordIO and .bin files: mx.recordio, mx.image, mx.nd, mx.gluon.data.Dataset",
    to=CHANGES,
)
def _stand_in(root: Path, cpu: bool) -> bool:
    try:
        import mxnet  # noqa: F401
    except Exception:  # not installed, or broken by today's NumPy
        sys.modules.update(build())
        return True
    return False
