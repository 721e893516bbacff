"""Compressed images in memory to pixels, and back."""

from __future__ import annotations

import io
import os

import cv2
import numpy as np

from .image_header import image_kind, image_size

PIXEL_LIMIT = "INSIGHTFACE_KPRPE_MAX_MEGAPIXELS"  # environment variable; also named in the error
HEIF_REMEDY = "HEIC needs: pip install 'insightface-kprpe[heif]'"
_MEGAPIXELS = 200.0
CROP_SIZE = 112  # side of the crops that networks see, pixels
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"


def decode_image(data: bytes) -> np.ndarray:
    """Decode one JPEG, PNG, BMP, WebP, TIFF, GIF (its first frame) or AVIF, and HEIC with the extra ``heif``.

    A file that was cut short never decodes to a half-gray image. Damage *inside* a JPEG's compressed pixels cannot be
    detected: the format has no checksum.

    Args:
        data: the whole compressed file.

    Returns:
        (H, W, 3) uint8 RGB, rotated according to its EXIF entry.

    Raises:
        ValueError: the data are not an image or a truncated one, in a format that cannot be read here, or claim more
            pixels than the environment variable ``INSIGHTFACE_KPRPE_MAX_MEGAPIXELS`` allows (200 million without it).
    """
    kind = image_kind(data)
    # libjpeg fills missing data with gray, and not every OpenCV refuses such an image, so look for the end ourselves.
    # The end must follow the last scan, as a thumbnail in the head of the file has an end of its own.
    unended = kind == "JPEG" and not data.endswith(_JPEG_END)
    if unended and data.find(_JPEG_END, data.rfind(_JPEG_SCAN)) < 0:
        raise ValueError(f"the JPEG is truncated ({len(data)} bytes without an end marker)")
    size = image_size(data)
    if size is None:
        start = data[:8].hex(" ") or "nothing"
        raise ValueError(f"{len(data)} bytes starting with {start} are not a readable image")
    _check_size(*size)
    image = _decode_heic(data) if kind == "HEIC" else _decode(data)
    if image is None:
        raise ValueError(
            f"{len(data)} bytes of {kind} are not a readable image: damaged, or in a format that the installed OpenCV "
            f"{cv2.__version__} does not read"
        )
    return image


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """A JPEG file of an (H, W, 3) uint8 RGB image; quality is 1 to 100."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def fit_crop(image: np.ndarray, size: int = CROP_SIZE) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, size, 3) uint8; the whole image, averaged where it is larger, bicubic where smaller."""
    if image.shape[:2] == (size, size):
        return image
    smooth = cv2.INTER_AREA if min(image.shape[:2]) > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=smooth)


def _check_size(width: int, height: int) -> None:
    text = os.environ.get(PIXEL_LIMIT)
    try:
        limit = _MEGAPIXELS if text is None else float(text)
    except ValueError as error:
        raise ValueError(f"the environment variable {PIXEL_LIMIT} must be a number, got {text!r}") from error
    if not width * height <= limit * 1e6:  # also where the limit is NaN
        raise ValueError(
            f"{width} x {height} pixels exceed the limit of {limit:g} megapixels; set {PIXEL_LIMIT} to change it"
        )


def _decode(data: bytes) -> np.ndarray | None:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        return None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_heic(data: bytes) -> np.ndarray | None:
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError(HEIF_REMEDY) from error
    try:
        # Rotated by the decoder, as the format has its own entry for that.
        return np.ascontiguousarray(np.asarray(pillow_heif.open_heif(io.BytesIO(data)).to_pillow().convert("RGB")))
    except (ValueError, RuntimeError, EOFError, SyntaxError, OSError):
        return None
