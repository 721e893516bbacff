"""Do two photos, or two sets of them, show the same person?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..contact_sheet import CELL, arrange, face_cell, title_bar
from ..data.photos import photo_paths
from ..evaluation.fusion import pool_templates
from .pictures import as_bgr, read_picture
from .recognition import DEFAULT_THRESHOLD, crop_faces, face_crop, face_quality, measured_evaluation, smallest_rate

_AT_A_TIME = 32
_HEIGHT = 3 * CELL  # pixels, of the larger photo of a picture of both
_CROPS_SHOWN = 16  # of each side

Photos = str | Path | np.ndarray | Sequence[str | Path | np.ndarray]


class Threshold(NamedTuple):
    """The cosine from which on two faces are taken for one person's, what that means, and whether it was measured."""

    value: float
    meaning: str
    measured: bool = False


class ComparedFace(NamedTuple):
    """The face of a photo that was compared.

    Attributes:
        name: of the photo.
        photo: (H, W, 3) uint8 BGR.
        face: insightface's ``Face``.
        quality: in [0, 1].
        others: how many more faces are in the photo; the largest counts.
        crop: (S, S, 3) uint8 BGR, what the recognition model saw.
        crop_keypoints: (5, 2) float32 in [0, 1] of it.
    """

    name: str
    photo: np.ndarray
    face: Any
    quality: float
    others: int
    crop: np.ndarray
    crop_keypoints: np.ndarray


class Comparison(NamedTuple):
    """What came of comparing.

    Attributes:
        is_same: whether the similarity reaches the threshold.
        similarity: cosine in [-1, 1]; of several photos, that of their means, weighted by quality.
        threshold: what was compared with.
        first, second: the faces of each side.
        similarities: (len(first), len(second)) float32, of every two faces.
        left_out: why a photo could not be compared.
    """

    is_same: bool
    similarity: float
    threshold: Threshold
    first: list[ComparedFace]
    second: list[ComparedFace]
    similarities: np.ndarray
    left_out: dict[str, str]


def compare(
    app: Any, first: Photos, second: Photos, threshold: float | None = None, *, are_crops: bool = False
) -> Comparison:
    """Compare the largest face of a photo with that of another one; or photos of one person with photos of another.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared, such as ``open_pack`` gives.
        first, second: a picture file, a folder of pictures of one person, an array as ``app.get`` takes it, or several
            of these.
        threshold: cosine from which on they are the same person; None: the pack's, else a customary one.
        are_crops: every picture is one face, aligned to the template already; nothing is detected.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a side has no photo with a face, or is a URL; or the threshold is no cosine.
    """
    if threshold is not None and not -1 <= threshold <= 1:
        raise ValueError(f"threshold must be a cosine, in -1 to 1, got {threshold:g}")
    left_out: dict[str, str] = {}
    sides = [
        _faces(app, list(_pictures(photos, name)), name, are_crops, left_out)
        for photos, name in ((first, "first"), (second, "second"))
    ]
    rows = [np.stack([face.face.normed_embedding for face in side]) for side in sides]
    pooled = [_pool(side) for side in sides]
    limit = choose_threshold(app, threshold)
    similarity = float(pooled[0] @ pooled[1])
    similarities = (rows[0] @ rows[1].T).astype(np.float32)
    return Comparison(similarity >= limit.value, similarity, limit, *sides, similarities, left_out)


def choose_threshold(app: Any, asked: float | None = None) -> Threshold:
    """The threshold that was asked for, else the pack's own, else a customary one, each with its meaning.

    Args:
        app: as for :func:`compare`.
        asked: cosine; None: not asked for.
    """
    evaluation = measured_evaluation(app)
    if asked is None and evaluation is None:
        meaning = "a customary value: nothing was measured for this pack (pack --evaluate measures it)"
        return Threshold(DEFAULT_THRESHOLD, meaning)
    if evaluation is None:
        return Threshold(asked, "as asked for; how often it errs was not measured for this pack")
    of_set = f"of {evaluation['pairs']} pairs of {evaluation['set']}"
    if asked is None:
        rate, value = smallest_rate(evaluation)
        return Threshold(value, f"at most {float(rate):g} of different people score higher, {of_set}", True)
    reached = [rate for rate, value in evaluation["thresholds"].items() if asked >= value]
    known = f"at most {float(min(reached, key=float)):g}" if reached else "more than was measured"
    return Threshold(asked, f"as asked for: {known} of different people score higher, {of_set}", True)


def side_by_side(compared: Comparison) -> np.ndarray:
    """A picture of both sides, with boxes, landmarks, qualities and the answer, (H, W, 3) uint8 BGR."""
    sides = [_draw_one(side[0]) if len(side) == 1 else _draw_many(side) for side in (compared.first, compared.second)]
    height = max(side.shape[0] for side in sides)
    sides = [cv2.copyMakeBorder(side, 0, height - len(side), 4, 4, cv2.BORDER_CONSTANT) for side in sides]
    both = np.hstack(sides)
    answer = "the same person" if compared.is_same else "different people"
    text = f"{answer}: similarity {compared.similarity:.3f}, threshold {compared.threshold.value:.3f}"
    bar = title_bar(text, both.shape[1])
    bar[-3:] = (80, 200, 80) if compared.is_same else (80, 80, 220)
    return np.vstack([bar, both])


def _pictures(photos: Photos, side: str) -> Iterable[tuple[str, np.ndarray | Path]]:
    """Name and picture, or its file, of all photos of a side."""
    several = [photos] if isinstance(photos, (str, Path, np.ndarray)) else list(photos)
    for number, photo in enumerate(several):
        if isinstance(photo, (str, Path)):
            yield from ((str(path), path) for path in photo_paths(photo))
        else:
            yield side if len(several) == 1 else f"{side}[{number}]", photo


def _faces(
    app: Any, pictures: list[tuple[str, np.ndarray | Path]], side: str, are_crops: bool, left_out: dict[str, str]
) -> list[ComparedFace]:
    """The largest face of each photo of a side; photos without one are left out."""
    chosen = []
    for start in range(0, len(pictures), _AT_A_TIME):
        names, photos = [], []
        for name, picture in pictures[start : start + _AT_A_TIME]:
            try:
                photos.append(read_picture(picture) if isinstance(picture, Path) else as_bgr(picture, name))
                names.append(name)
            except ValueError as error:
                if len(pictures) == 1:
                    raise
                left_out[name] = str(error).removeprefix(f"{name} ")
        found = crop_faces(app, photos) if are_crops else app.get_batch(photos)
        for name, photo, faces in zip(names, photos, found, strict=True):
            if faces:
                face = max(faces, key=lambda face: np.prod(face.bbox[2:] - face.bbox[:2]))
                crop = face_crop(app, photo, face)
                chosen.append(ComparedFace(name, photo, face, face_quality(face), len(faces) - 1, *crop))
            else:
                left_out[name] = "no face found"
    if not chosen:
        what = pictures[0][0] if len(pictures) == 1 else f"any of the {len(pictures)} photos of the {side} side"
        raise ValueError(f"no face found in {what}; see --det-thresh, and --crops for aligned crops")
    return chosen


def _pool(side: list[ComparedFace]) -> np.ndarray:
    """(D,) unit embedding of all faces of a side."""
    embeddings = np.stack([face.face.normed_embedding for face in side])
    count = len(side)
    weights = np.array([face.quality for face in side])
    return pool_templates(embeddings, np.zeros(count, int), np.arange(count), weights)[0][0]


def _draw_one(side: ComparedFace) -> np.ndarray:
    """A photo with its face's box, and below the crop that was embedded, with its landmarks."""
    photo = side.photo
    scale = _HEIGHT / max(photo.shape[:2])
    size = max(1, round(photo.shape[1] * scale)), max(1, round(photo.shape[0] * scale))
    drawn = cv2.resize(photo, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    left, top, right, bottom = (round(float(value) * scale) for value in side.face.bbox)
    cv2.rectangle(drawn, (left, top), (right, bottom), (80, 220, 80), 2, cv2.LINE_AA)
    below = _crop_cell(side)
    width = max(drawn.shape[1], below.shape[1])
    parts = [cv2.copyMakeBorder(part, 0, 0, 0, width - part.shape[1], cv2.BORDER_CONSTANT) for part in (drawn, below)]
    return np.vstack(parts)


def _draw_many(side: list[ComparedFace]) -> np.ndarray:
    """The crops of the best photos of a side."""
    best = sorted(side, key=lambda face: -face.quality)[:_CROPS_SHOWN]
    return arrange([_crop_cell(face) for face in best], math.ceil(math.sqrt(len(best))))


def _crop_cell(side: ComparedFace) -> np.ndarray:
    return face_cell(side.crop[..., ::-1], side.crop_keypoints, f"quality {side.quality:.2f}")
