"""Checks of crops and keypoints passed as arguments, and how many are embedded at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..geometry import KEYPOINT_LIMIT
from .pictures import as_bgr

LARGEST_BATCH = 64  # faces per forward pass; a power of two


def refuse_single(images: Any, name: str, example: str) -> None:
    """Refuse a single image, whose rows of pixels would be taken for images."""
    if isinstance(images, np.ndarray) and images.ndim < 4:
        raise ValueError(f"{name} must be a list of arrays, got one of shape {images.shape}; give a list: [{example}]")


def check_crops(crops: Sequence[np.ndarray], input_size: tuple[int, int]) -> list[np.ndarray]:
    """Crops as (H, W, 3) uint8 BGR.

    Args:
        crops: one image each, of what :func:`~.pictures.as_bgr` takes.
        input_size: width and height that the network takes.

    Raises:
        ValueError: a crop is not an image or of another size, or ``crops`` is a single one.
    """
    refuse_single(crops, "crops", "crop")
    crops = [as_bgr(crop, f"crops[{i}]") for i, crop in enumerate(crops)]
    width, height = input_size
    for i, crop in enumerate(crops):
        if crop.shape[:2] != (height, width):
            raise ValueError(
                f"crops must be ({height}, {width}, 3), aligned to the template, got crops[{i}] of shape {crop.shape}"
            )
    return crops


def check_keypoints(keypoints: np.ndarray, count: int) -> np.ndarray:
    """Keypoints as (count, 5, 2) float32.

    Raises:
        ValueError: another shape, not finite, or pixels.
    """
    keypoints = np.asarray(keypoints, dtype=np.float32)
    if keypoints.shape != (count, 5, 2) or not np.isfinite(keypoints).all():
        raise ValueError(f"keypoints must be ({count}, 5, 2) finite numbers, got shape {keypoints.shape}")
    if count and np.median(np.abs(keypoints)) > KEYPOINT_LIMIT:
        raise ValueError("keypoints must be in [0, 1] of the crop, got pixels; divide them by the side of the crop")
    return keypoints


def batches(count: int, largest: int = LARGEST_BATCH) -> Iterator[slice]:
    """Parts of ``count`` faces, each a power of two long, the longest first.

    Sessions do setup work for every new shape, so there are few shapes; and there is no padding.

    Args:
        count: of faces.
        largest: length of a part, a power of two.
    """
    start = 0
    while start < count:
        length = min(largest, 1 << ((count - start).bit_length() - 1))
        yield slice(start, start + length)
        start += length
