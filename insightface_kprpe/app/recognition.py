"""Who is it? People of pictures into a gallery, and the faces of a photo named by it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from ..data.picture_files import list_people
from ..evaluation.fusion import landmark_weights
from ..fingerprint import file_sha256
from ..geometry import SCORE_THRESHOLD, estimate_alignment, transform_points
from ..packs.layout import MANIFEST, find_pack, read_manifest
from .gallery import Gallery, Match
from .pictures import read_picture
from .registration import register

# A customary starting point for models trained on millions of faces; `pack --evaluate` measures one's own.
DEFAULT_THRESHOLD = 0.3
_PICTURES_AT_A_TIME = 32
_PICTURES_A_SAVE = 256  # what a kill while adding costs at most


class NamedFace(NamedTuple):
    """A face of a photo; ``name`` is None where nobody of the gallery is similar enough."""

    name: str | None
    nearest: Match | None  # also where too far; None: the gallery is empty
    quality: float
    face: Any  # insightface's Face


class Enrolled(NamedTuple):
    """What became of pictures that were to be added to a gallery."""

    added: int
    passed_over: dict[Path, str]  # whose picture each is in the gallery already
    left_out: dict[Path, str]  # why each could not be added


def open_pack(name: str | Path, root: str | Path = "~/.insightface", det_thresh: float = 0.5, **settings: Any) -> Any:
    """An installed pack as ``FaceAnalysis`` with :func:`~.registration.register`, prepared; nothing is downloaded.

    Args:
        name: of the pack in ``root/models``, or its folder.
        root: InsightFace's root folder.
        det_thresh: score from which on the detector's find is a face.
        **settings: more for ``FaceAnalysis``, as ``aligned``, ``providers`` and ``strict_providers``.

    Raises:
        FileNotFoundError: there is no such pack.
    """
    from insightface.app import FaceAnalysis

    register()
    app = FaceAnalysis(name=str(find_pack(name, root).resolve()), **settings)
    app.prepare(ctx_id=0, det_thresh=det_thresh)
    return app


def measured_threshold(app: Any) -> float | None:
    """The threshold that a pack's ``pack.json`` holds, of the smallest false positive rate; None if it has none."""
    file = Path(app.models["recognition"].model_file)
    for folder in file.parents[:2]:
        if (folder / MANIFEST).is_file():
            record = read_manifest(folder)["files"].get(file.relative_to(folder).as_posix(), {})
            thresholds = record.get("evaluation", {}).get("thresholds", {})
            return float(thresholds[min(thresholds, key=float)]) if thresholds else None
    return None


def people_of_folder(folder: str | Path) -> list[tuple[str, Path]]:
    """Name and path of every picture: a sub-folder holds one person's, a picture beside them is the person of its name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no pictures.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of people not found: {folder}")
    people = list_people(folder, single=True)
    if not people:
        raise ValueError(f"{folder} holds no pictures; expected {folder}/NAME/*.jpg, or {folder}/NAME.jpg")
    return [(name, path) for name, paths in people.items() for path in paths]


def enrol(app: Any, gallery: Gallery, pictures: Iterable[tuple[str, Path]], path: Path | None = None) -> Enrolled:
    """Add the largest face of each picture to a gallery; pictures that are in it already are passed over.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared.
        gallery: to add to.
        pictures: name and file of each.
        path: where to save the gallery, now and then and at the end, if anything was added.

    Returns:
        What was added, what was in it, and what was left out: files that are no pictures, and pictures without a face.

    Raises:
        ValueError: the gallery was made with another recognition model.
    """
    check_model(app, gallery)
    known = dict(zip(gallery.sources.tolist(), gallery.names.tolist(), strict=True))
    pictures = list(pictures)
    passed_over = {file: known[str(file.resolve())] for _, file in pictures if str(file.resolve()) in known}
    waiting = [(name, file) for name, file in pictures if file not in passed_over]
    left_out: dict[Path, str] = {}
    before, since_save = len(gallery.names), 0
    for group in _groups(tqdm(waiting, "enrolling", disable=None), _PICTURES_AT_A_TIME):
        readable = _read(group, left_out)
        found = app.get_batch([picture for _, _, picture in readable])
        largest = []
        for (name, file, _), faces in zip(readable, found, strict=True):
            if faces:
                largest.append((name, str(file.resolve()), max(faces, key=_area)))
            else:
                left_out[file] = "no face found"
        if largest:
            names, sources, faces = zip(*largest, strict=True)
            embeddings = np.stack([face.embedding for face in faces])
            gallery.add(names, embeddings, [face_quality(face) for face in faces], sources)
        since_save += len(group)
        if path is not None and since_save >= _PICTURES_A_SAVE:
            gallery.save(path)
            since_save = 0
    added = len(gallery.names) - before
    if path is not None and added:
        gallery.save(path)
    return Enrolled(added, passed_over, left_out)


def _read(group: Iterable[tuple[str, Path]], left_out: dict[Path, str]) -> list[tuple[str, Path, np.ndarray]]:
    """Name, file and pixels of pictures; why a file could not be read goes to ``left_out``."""
    readable = []
    for name, file in group:
        try:
            readable.append((name, file, read_picture(file)))
        except ValueError as error:
            left_out[file] = str(error).removeprefix(f"{file} ")
    return readable


def check_model(app: Any, gallery: Gallery) -> None:
    """Make sure that an app's embeddings may be compared with a gallery's; a new gallery becomes the app's.

    Raises:
        ValueError: they may not.
    """
    recognizer = app.models.get("recognition")
    if recognizer is None:
        raise ValueError("the pack must have a recognition model, it has none")
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


def recognize(app: Any, gallery: Gallery, photo: np.ndarray, threshold: float = DEFAULT_THRESHOLD) -> list[NamedFace]:
    """Name the people in a photo, from left to right.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared.
        gallery: of people, made with the same model.
        photo: (H, W, 3) uint8 BGR, or what ``app.get`` takes.
        threshold: cosine similarity from which on a face is somebody's.

    Raises:
        ValueError: the gallery was made with another recognition model.
    """
    check_model(app, gallery)
    (faces,) = app.get_batch([photo])
    faces = sorted(faces, key=lambda face: face.bbox[0])
    nearest = gallery.search(np.stack([face.embedding for face in faces])) if faces else []
    named = []
    for face, matches in zip(faces, nearest, strict=True):
        match = matches[0] if matches else None
        name = match.name if match is not None and match.similarity >= threshold else None
        named.append(NamedFace(name, match, face_quality(face), face))
    return named


def annotate(photo: np.ndarray, faces: Sequence[NamedFace]) -> np.ndarray:
    """Draw boxes, landmarks, names, similarity and quality into a copy of a photo, (H, W, 3) uint8 BGR."""
    drawn = photo.copy()
    unit = max(photo.shape[:2]) / 1000  # sizes grow with the photo
    thickness, scale = max(1, round(2 * unit)), max(0.4, 0.7 * unit)
    labels = []  # drawn last, so that no neighbour's box cuts one
    for number, (name, nearest, quality, face) in enumerate(faces, 1):
        colour = (80, 220, 80) if name is not None else (190, 190, 190)
        left, top, right, bottom = (int(value) for value in face.bbox)
        cv2.rectangle(drawn, (left, top), (right, bottom), colour, thickness, cv2.LINE_AA)
        landmarks = face.dfa_kps if (face.dfa_score or 0) >= SCORE_THRESHOLD else face.kps
        for x, y in () if landmarks is None else landmarks:
            cv2.circle(drawn, (round(float(x)), round(float(y))), thickness + 1, (60, 60, 255), -1, cv2.LINE_AA)
        similarity = "" if nearest is None else f" {nearest.similarity:.2f}"
        text = f"{'unknown' if name is None else _drawable(name) or f'no. {number}'}{similarity} q{quality:.2f}"
        labels.append((text, left, top, scale, colour))
    for label in labels:
        _label(drawn, *label)
    return drawn


def _label(drawn: np.ndarray, text: str, left: int, top: int, scale: float, colour: tuple[int, int, int]) -> None:
    """Black text on a coloured ground over a box, moved into the picture where it would leave it."""
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    line = height + below + 4
    left = max(0, min(left, drawn.shape[1] - width - 4))
    top = max(line, top)
    cv2.rectangle(drawn, (left, top - line), (left + width + 4, top), colour, -1)
    cv2.putText(drawn, text, (left + 2, top - below), cv2.FONT_HERSHEY_SIMPLEX, scale, (0, 0, 0), 1, cv2.LINE_AA)


def _drawable(name: str) -> str:
    """A name in the letters that OpenCV can draw."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip()


def _area(face: Any) -> float:
    return float((face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))


def _groups(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
