"""Compressed images in memory to pixels, and back."""

from __future__ import annotations

import cv2
import numpy as np

_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"


def decode_image(data: bytes) -> np.ndarray:
    """Decode one JPEG or PNG (or whatever else OpenCV reads).

    A file that was cut short never decodes to a half-grey picture. Damage *inside* a JPEG's compressed pixels cannot be
    seen: the format has no checksum.

    Args:
        data: the whole compressed file.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ValueError: the data are no image or a truncated one.
    """
    # libjpeg fills what is missing with grey, and not every OpenCV refuses such a picture: look for the end ourselves.
    # The end must follow the last scan, as a thumbnail in the head of the file has an end of its own.
    unended = data.startswith(_JPEG_START) and not data.endswith(_JPEG_END)
    if unended and data.find(_JPEG_END, data.rfind(_JPEG_SCAN)) < 0:
        raise ValueError(f"the JPEG is truncated ({len(data)} bytes without an end marker)")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    except cv2.error:  # a damaged head that claims an impossible size
        image = None
    if image is None:
        raise ValueError(f"{len(data)} bytes starting with {data[:8].hex(' ') or 'nothing'} are not a readable image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """A JPEG file of an (H, W, 3) uint8 RGB image; quality is 1 to 100."""
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
