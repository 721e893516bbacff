"""What ``register()`` adds to insightface's ``FaceAnalysis``: pictures of any kind, and faces embedded in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.utils import face_align

from ..geometry import KEYPOINT_LIMIT
from .pictures import as_bgr

LARGEST_BATCH = 64  # faces a run of the network; a power of two
# A picture this many times longer than wide has no row left in the detector's input.
_THINNEST = 100


def checked_get(stock_get: Callable) -> Callable:
    """``FaceAnalysis.get`` that takes what :func:`~.pictures.as_bgr` takes.

    A picture without pixels, or one that is a mere stripe, has no faces; None and arrays that are no picture raise.
    """

    def get(self, img: np.ndarray, *args: Any, **kwargs: Any) -> list:
        img = as_bgr(img)
        short, long = sorted(img.shape[:2])
        return stock_get(self, img, *args, **kwargs) if short and long <= _THINNEST * short else []

    return get


def get_batch(self, images: Iterable[np.ndarray], max_num: int = 0, det_metric: str = "default") -> list[list]:
    """What ``get`` finds in each of many pictures, with the faces of all of them embedded in few runs of the network.

    Args:
        images: what ``get`` takes, of any sizes; may be a generator, of which few pictures are kept.
        max_num: faces a picture at most; 0: all.
        det_metric: which ones then, as in ``get``.

    Returns:
        A list of insightface's ``Face`` for each picture, equal to what ``get`` gives to rounding.

    Raises:
        ValueError: an array is no picture, or ``images`` is a single one.
    """
    _refuse_single(images, "images", "photo")
    collector = _Collector(self.models.get("recognition"))
    collecting = copy.copy(self)
    collecting.models = {task: collector if task == "recognition" else model for task, model in self.models.items()}
    found = [
        collecting.get(as_bgr(image, f"images[{i}]"), max_num=max_num, det_metric=det_metric)
        for i, image in enumerate(images)
    ]
    collector.flush()
    return found


def embed_aligned(self, crops: Sequence[np.ndarray], keypoints: np.ndarray | None = None) -> np.ndarray:
    """Embed aligned crops with the pack's recognition model; nothing is detected.

    Args:
        crops: B pictures of one face each, (112, 112, 3) uint8 BGR, aligned to the template.
        keypoints: (B, 5, 2) float in [0, 1] of each crop, for a model that takes them; None: the template's.

    Returns:
        (B, D) float32, not normalised.

    Raises:
        ValueError: a crop is no picture or of another size, ``crops`` is a single one, keypoints do not fit, or the
            pack recognises nobody.
    """
    if "recognition" not in self.models:
        raise ValueError(f"embed_aligned needs a recognition model, this pack has only {', '.join(self.models)}")
    return embed_crops(self.models["recognition"], crops, keypoints)


def embed_crops(recognizer: ArcFaceONNX, crops: Sequence[np.ndarray], keypoints: np.ndarray | None) -> np.ndarray:
    """:func:`embed_aligned` for a recognition model by itself."""
    _refuse_single(crops, "crops", "crop")
    crops = [as_bgr(crop, f"crops[{i}]") for i, crop in enumerate(crops)]
    width, height = recognizer.input_size
    for i, crop in enumerate(crops):
        if crop.shape[:2] != (height, width):
            raise ValueError(
                f"crops must be ({height}, {width}, 3), aligned to the template, got crops[{i}] of shape {crop.shape}"
            )
    if hasattr(recognizer, "keypoint_name"):
        return recognizer.get_feat(crops, keypoints)
    if keypoints is not None:
        raise ValueError("keypoints were given to a recognition model without keypoint input; leave them out")
    return _in_batches(recognizer, crops)


def _refuse_single(images: Any, name: str, example: str) -> None:
    """One picture in the place of many would be taken for many rows of pixels."""
    if isinstance(images, np.ndarray) and images.ndim < 4:
        raise ValueError(f"{name} must be a list of arrays, got one of shape {images.shape}; give a list: [{example}]")


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

    Sessions prepare themselves for every new shape, so there are few; and no face is computed in vain.

    Args:
        count: of faces.
        largest: length of a part, a power of two.
    """
    start = 0
    while start < count:
        length = min(largest, 1 << ((count - start).bit_length() - 1))
        yield slice(start, start + length)
        start += length


class _Collector:
    """Stands in for a recognition model in ``FaceAnalysis.get`` and embeds later, many faces at a time."""

    taskname = "recognition"

    def __init__(self, recognizer: Any) -> None:
        self.recognizer = recognizer
        self.waiting: list[tuple[np.ndarray, Any]] = []

    def get(self, img: np.ndarray, face: Any) -> None:
        self.waiting.append((img, face))
        if len(self.waiting) == LARGEST_BATCH:
            self.flush()

    def flush(self) -> None:
        faces, self.waiting = self.waiting, []
        if not faces:
            return
        if hasattr(self.recognizer, "embed_faces"):
            self.recognizer.embed_faces(faces)
        elif type(self.recognizer).get is ArcFaceONNX.get:
            size = self.recognizer.input_size[0]
            crops = [face_align.norm_crop(img, landmark=face.kps, image_size=size) for img, face in faces]
            for (_, face), embedding in zip(faces, _in_batches(self.recognizer, crops), strict=True):
                face.embedding = embedding
        else:
            for img, face in faces:
                self.recognizer.get(img, face)


def _in_batches(recognizer: ArcFaceONNX, crops: list[np.ndarray]) -> np.ndarray:
    """Embed with a stock model; one by one where its file has a fixed batch."""
    largest = 1 if isinstance(recognizer.input_shape[0], int) else LARGEST_BATCH
    rows = [recognizer.get_feat(crops[part]) for part in batches(len(crops), largest)]
    return np.concatenate(rows) if rows else np.empty((0, recognizer.output_shape[-1]), np.float32)
