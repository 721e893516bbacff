"""Converts images of all usual kinds to the one that detectors and recognizers take: (H, W, 3) uint8 BGR."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from ..data.picture_files import read_image_file
from ..files import write_atomically

WRITTEN_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def as_bgr(image: np.ndarray, name: str = "image") -> np.ndarray:
    """An image as (H, W, 3) uint8 BGR; returned as it is if it already has that form.

    Args:
        image: (H, W), (H, W, 1), (H, W, 3) BGR or (H, W, 4) BGRA, uint8, or uint16 of full range; H or W may be 0.
        name: what to call it in an error.

    Raises:
        ValueError: it is None, or has another shape or dtype.
    """
    if image is None:
        raise ValueError(f"{name} must be an array, got None; cv2.imread returns None for a file that it cannot read")
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        got = f"shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{name} must be (H, W) gray, (H, W, 3) BGR or (H, W, 4) BGRA, got {got}")
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        raise ValueError(
            f"{name} must have 1, 3 or 4 channels last, got shape {image.shape}; channels first? transpose(1, 2, 0)"
        )
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(
            f"{name} must be uint8 in 0 to 255 or uint16 in 0 to 65535, got {image.dtype}; "
            "convert it first, e.g. (255 * image).astype(np.uint8) for floats in [0, 1]"
        )
    if image.ndim == 2 or image.shape[2] == 1:
        return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(image[..., :3]) if image.shape[2] == 4 else image


def read_picture(path: str | Path) -> np.ndarray:
    """Read an image file as (H, W, 3) uint8 BGR, rotated according to its EXIF entry.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a readable image, or too large; see :func:`~.data.image_codec.decode_image`.
    """
    return cv2.cvtColor(read_image_file(path), cv2.COLOR_RGB2BGR)


def check_picture_name(path: str | Path) -> Path:
    """A path that :func:`write_picture` can write to.

    Raises:
        ValueError: its suffix names no format of images.
    """
    if Path(path).suffix.lower() not in WRITTEN_SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(WRITTEN_SUFFIXES)} to be written as an image")
    return Path(path)


def write_picture(path: str | Path, image: np.ndarray) -> None:
    """Write an image atomically, in the format that its suffix names.

    Raises:
        ValueError: it names none, or the installed OpenCV cannot write it.
    """
    path = check_picture_name(path)
    try:
        whole, content = cv2.imencode(path.suffix, image)
    except cv2.error:
        whole = False
    if not whole:
        raise ValueError(f"{path}: the installed OpenCV cannot write that format; use .jpg or .png")
    write_atomically(path, content.tobytes())
