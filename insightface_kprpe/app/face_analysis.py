"""What ``register()`` adds to insightface's ``FaceAnalysis``: images of any kind, and faces embedded in batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from insightface.model_zoo.arcface_onnx import ArcFaceONNX
from insightface.utils import face_align

from .batches import LARGEST_BATCH, batches, check_crops, refuse_single
from .border import WithBorder, is_stripe
from .pictures import as_bgr
from .recognizer import KeypointRecognizer


def checked_get(stock_get: Callable) -> Callable:
    """``FaceAnalysis.get`` that takes what :func:`~.pictures.as_bgr` takes, and finds faces that fill their image.

    An image without pixels, or one that is a thin strip, has no faces; None and arrays that are not images raise.
    """

    def get(self, img: np.ndarray, *args: Any, **kwargs: Any) -> list:
        img = as_bgr(img)
        if is_stripe(img):
            return []
        faces = stock_get(self, img, *args, **kwargs)
        if faces:
            return faces
        wider = copy.copy(self)
        wider.det_model = WithBorder(self.det_model)
        return stock_get(wider, img, *args, **kwargs)

    return get


def get_batch(self, images: Iterable[np.ndarray], *args: Any, **kwargs: Any) -> list[list]:
    """What ``get`` finds in each of many images, with the faces of all of them embedded in few forward passes.

    Args:
        images: what ``get`` takes, of any sizes; may be a generator, of which few images are kept.
        *args, **kwargs: passed on to ``get``, which takes ``max_num`` (faces per image at most; 0: all) and
            ``det_metric`` (which ones then), or what a subclass makes of it.

    Returns:
        A list of insightface's ``Face`` for each image, equal to what ``get`` gives, up to rounding.

    Raises:
        ValueError: an array is not an image, or ``images`` is a single image.
    """
    refuse_single(images, "images", "photo")
    collector = _Collector(self.models.get("recognition"))
    collecting = copy.copy(self)
    collecting.models = {task: collector if task == "recognition" else model for task, model in self.models.items()}
    found = [collecting.get(as_bgr(image, f"images[{i}]"), *args, **kwargs) for i, image in enumerate(images)]
    collector.flush()
    return found


def embed_aligned(self, crops: Sequence[np.ndarray], keypoints: np.ndarray | None = None) -> np.ndarray:
    """Embed aligned crops with the pack's recognition model; nothing is detected.

    Args:
        crops: B images of one face each, (112, 112, 3) uint8 BGR, aligned to the template.
        keypoints: (B, 5, 2) float in [0, 1] of each crop, for a model that takes them; None: the template's.

    Returns:
        (B, D) float32, not normalized.

    Raises:
        ValueError: a crop is not an image or of another size, ``crops`` is a single one, keypoints do not fit, or the
            pack has no recognition model.
    """
    if "recognition" not in self.models:
        raise ValueError(f"embed_aligned needs a recognition model, this pack has only {', '.join(self.models)}")
    recognizer = self.models["recognition"]
    if isinstance(recognizer, KeypointRecognizer):
        return recognizer.embed_aligned(crops, keypoints)
    crops = check_crops(crops, recognizer.input_size)
    if keypoints is not None:
        raise ValueError("keypoints must be left out: this recognition model has no keypoint input")
    return _in_batches(recognizer, crops)


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
        if isinstance(self.recognizer, KeypointRecognizer):
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
    """Embed with a stock model; one by one if its file has a fixed batch size."""
    largest = 1 if isinstance(recognizer.input_shape[0], int) else LARGEST_BATCH
    rows = [recognizer.get_feat(crops[part]) for part in batches(len(crops), largest)]
    return np.concatenate(rows) if rows else np.empty((0, recognizer.output_shape[-1]), np.float32)
