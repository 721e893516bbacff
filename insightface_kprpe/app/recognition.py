"""Names the faces of a photo by a gallery."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from ..evaluation.fusion import landmark_weights
from ..fingerprint import file_sha256
from ..geometry import CANONICAL_KEYPOINTS, SCORE_THRESHOLD, align_face, estimate_alignment, transform_points
from ..packs.layout import MANIFEST, find_pack, read_manifest
from .gallery import Gallery, Match
from .pictures import as_bgr
from .recognizer import KeypointRecognizer
from .registration import register

# A common starting point for models trained on millions of faces; `pack --evaluate` measures a model's own.
DEFAULT_THRESHOLD = 0.3


class NamedFace(NamedTuple):
    """A face of a photo; ``name`` is None if nobody in the gallery is similar enough."""

    name: str | None
    nearest: Match | None  # also where too far; None: the gallery is empty
    quality: float
    face: Any  # insightface's Face


def open_pack(name: str | Path, root: str | Path = "~/.insightface", det_thresh: float = 0.5, **settings: Any) -> Any:
    """An installed pack as ``FaceAnalysis`` with :func:`~.registration.register`, prepared; nothing is downloaded.

    Args:
        name: of the pack in ``root/models``, or its folder.
        root: InsightFace's root folder.
        det_thresh: minimum detector score of a face.
        **settings: for ``FaceAnalysis``, such as ``aligned``, ``providers`` and ``strict_providers``.

    Raises:
        FileNotFoundError: there is no such pack.
        ValueError: it has no detector, or a file of it is damaged.
    """
    from insightface.app import FaceAnalysis

    register()
    folder = find_pack(name, root).resolve()
    try:
        app = FaceAnalysis(name=str(folder), **settings)
    except AssertionError as error:  # what insightface says of a pack without detector
        raise ValueError(
            f"{folder} has no face detector, which FaceAnalysis needs; see insightface-kprpe doctor"
        ) from error
    app.prepare(ctx_id=0, det_thresh=det_thresh)
    return app


def measured_evaluation(app: Any) -> dict[str, Any] | None:
    """What a pack's ``pack.json`` says of how its recognition model verifies: set, pairs, thresholds; None: nothing."""
    file = Path(app.models["recognition"].model_file)
    for folder in file.parents[:2]:
        if (folder / MANIFEST).is_file():
            record = read_manifest(folder)["files"].get(file.relative_to(folder).as_posix(), {})
            evaluation = record.get("evaluation", {})
            return evaluation if evaluation.get("thresholds") else None
    return None


def smallest_rate(evaluation: dict[str, Any]) -> tuple[str, float]:
    """The smallest false positive rate of :func:`measured_evaluation`, as text, and its threshold."""
    rate = min(evaluation["thresholds"], key=float)
    return rate, float(evaluation["thresholds"][rate])


def check_model(app: Any, gallery: Gallery) -> None:
    """Make sure that an app's embeddings may be compared with a gallery's; a new gallery becomes the app's.

    Raises:
        ValueError: they may not.
    """
    recognizer = app.models.get("recognition")
    if recognizer is None:
        raise ValueError("the pack must have a recognition model, got none")
    way = "" if getattr(recognizer, "aligned", True) else ", not aligned"
    model = f"{file_sha256(Path(recognizer.model_file))[:16]}{way}"
    if gallery.model and gallery.model != model:
        raise ValueError(
            f"the gallery was made with another recognition model ({gallery.model}, now {model}); "
            "use the same pack, or add its people to a new gallery"
        )
    gallery.model = model


def face_quality(face: Any) -> float:
    """``face.quality`` in [0, 1]; for a face of a stock recognition model, the same from its landmarks."""
    if face.quality is not None:
        return float(face.quality)
    keypoints = transform_points(face.kps, estimate_alignment(face.kps, 112)) / 112
    return float(landmark_weights(keypoints[None].clip(-1, 2), np.array([face.det_score]))[0])


def crop_faces(app: Any, crops: Sequence[np.ndarray]) -> list[list[Any]]:
    """What ``app.get_batch`` gives, for images of one face each that are aligned to the template already.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``.
        crops: what ``app.get`` takes; crops of another size than the network's are resized.

    Returns:
        For each crop a list with its face, whose box and landmarks are the template's.

    Raises:
        ValueError: a crop is not a square.
    """
    from insightface.app.common import Face

    side = app.models["recognition"].input_size[0]
    fitted, faces = [], []
    for i, crop in enumerate(crops):
        crop = as_bgr(crop, f"crops[{i}]")
        height, width = crop.shape[:2]
        if not height or height != width:
            raise ValueError(f"an aligned crop must be a square, got one of {width} x {height} pixels")
        smooth = cv2.INTER_AREA if height > side else cv2.INTER_CUBIC
        fitted.append(crop if height == side else cv2.resize(crop, (side, side), interpolation=smooth))
        box = np.float32([0, 0, width, height])
        faces.append([Face(bbox=box, kps=CANONICAL_KEYPOINTS * np.float32(width), det_score=1.0)])
    for (face,), embedding in zip(faces, app.embed_aligned(fitted), strict=True):
        face.embedding = embedding
    return faces


def face_crop(app: Any, photo: np.ndarray, face: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the app's recognition model sees of a face that it has embedded.

    Returns:
        (S, S, 3) uint8 BGR, and the face's landmarks as (5, 2) float32 keypoints in [0, 1] of it.
    """
    recognizer = app.models["recognition"]
    if isinstance(recognizer, KeypointRecognizer):
        return recognizer.crop(photo, face)
    return align_face(photo, face.kps, recognizer.input_size[0])


def recognize(
    app: Any, gallery: Gallery, photo: np.ndarray, threshold: float = DEFAULT_THRESHOLD, is_crop: bool = False
) -> list[NamedFace]:
    """Name the people in a photo, from left to right.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared.
        gallery: of people, made with the same model.
        photo: (H, W, 3) uint8 BGR, or what ``app.get`` takes.
        threshold: minimum cosine similarity of a match.
        is_crop: the photo is one face, aligned to the template already.

    Raises:
        ValueError: the gallery was made with another recognition model.
    """
    check_model(app, gallery)
    (faces,) = crop_faces(app, [photo]) if is_crop else app.get_batch([photo])
    faces = sorted(faces, key=lambda face: face.bbox[0])
    nearest = gallery.search(np.stack([face.embedding for face in faces])) if faces else []
    named = []
    for face, matches in zip(faces, nearest, strict=True):
        match = matches[0] if matches else None
        name = match.name if match is not None and match.similarity >= threshold else None
        named.append(NamedFace(name, match, face_quality(face), face))
    return named


def annotate(photo: np.ndarray, faces: Sequence[NamedFace], first: int | None = None) -> np.ndarray:
    """Draw boxes, landmarks, names, similarity and quality into a copy of a photo, (H, W, 3) uint8 BGR.

    Args:
        photo: (H, W, 3) uint8 BGR.
        faces: in it.
        first: the number of its first face; None: faces have no numbers.
    """
    drawn = photo.copy()
    unit = max(photo.shape[:2]) / 1000  # sizes grow with the photo
    thickness, scale = max(1, round(2 * unit)), max(0.4, 0.7 * unit)
    labels = []  # drawn last, so that no neighbor's box cuts one
    for number, (name, nearest, quality, face) in enumerate(faces, 1 if first is None else first):
        color = (80, 220, 80) if name is not None else (190, 190, 190)
        left, top, right, bottom = (int(value) for value in face.bbox)
        cv2.rectangle(drawn, (left, top), (right, bottom), color, thickness, cv2.LINE_AA)
        landmarks = face.dfa_kps if (face.dfa_score or 0) >= SCORE_THRESHOLD else face.kps
        for x, y in () if landmarks is None else landmarks:
            cv2.circle(drawn, (round(float(x)), round(float(y))), thickness + 1, (60, 60, 255), -1, cv2.LINE_AA)
        similarity = "" if nearest is None else f" {nearest.similarity:.2f}"
        text = f"{'unknown' if name is None else _drawable(name) or f'no. {number}'}{similarity} q{quality:.2f}"
        text = text if first is None else f"{number}: {text}"
        labels.append((text, left, top, scale, color))
    for label in labels:
        _label(drawn, *label)
    return drawn


def _label(drawn: np.ndarray, text: str, left: int, top: int, scale: float, color: tuple[int, int, int]) -> None:
    """Black text on a colored background above a box, moved inside the image if necessary."""
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    line = height + below + 4
    left = max(0, min(left, drawn.shape[1] - width - 4))
    top = max(line, top)
    cv2.rectangle(drawn, (left, top - line), (left + width + 4, top), color, -1)
    cv2.putText(drawn, text, (left + 2, top - below), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)


def _drawable(name: str) -> str:
    """A name in characters that OpenCV can draw."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()
