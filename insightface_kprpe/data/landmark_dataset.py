"""Faces with landmarks for DFA: WIDER FACE with RetinaFace's ``label.txt``, and any folder in that layout.

A label file names an image (``# 0--Parade/1.jpg``) and then has one line per face: the box ``x y w h``, five times
``x y flag``, and a blur value, in pixels; all -1 where a face has no landmarks. A line may end after the box. Images
lie in ``images/`` next to the label file, or in its own folder.
"""

from __future__ import annotations

import copy
import logging
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..files import read_text, user_file
from ..geometry import known_landmarks, warp_smoothly
from .image_header import image_size
from .picture_files import read_image_file

logger = logging.getLogger(__name__)

UNKNOWN = -1.0  # every coordinate of landmarks or of a box that does not exist
_FLAGS = (-1, 0, 1)
_HEAD = 1 << 16  # bytes of an image that usually tell its size
_BOX_ONLY, _WITH_LANDMARKS = 4, 4 + 5 * 3  # numbers on a line; a blur value may follow


class FaceSample(NamedTuple):
    """One face crop, or a batch of them (B in front of every shape).

    Attributes:
        image: (3, S, S) RGB, uint8 from the dataset, float in [-1, 1] after augmentation.
        keypoints: (5, 2) float32 xy in [0, 1] of the crop (outside it where cut off); all -1 where not labeled.
        bbox: (4,) float32 x1, y1, x2, y2 in [0, 1] of the crop; all -1 where the image shows no face.
    """

    image: torch.Tensor
    keypoints: torch.Tensor
    bbox: torch.Tensor


class FaceLabel(NamedTuple):
    """One line of a label file, in pixels of the image."""

    picture: Path
    box: np.ndarray  # (4,) x, y, width, height
    landmarks: np.ndarray  # (5, 2); all -1 where not labeled


def read_labels(file: str | Path) -> list[FaceLabel]:
    """Read a RetinaFace label file; faces whose box has no area, or no part in the image, are left out.

    Landmarks that coincide, or cannot be those of a face in the box, count as missing, with a warning. If an image is
    listed twice, the later entry replaces the earlier one, since they may contradict each other.

    Args:
        file: ``label.txt``, or its folder.

    Raises:
        FileNotFoundError: the file, or an image that it names, does not exist.
        ValueError: a line is malformed, a file is not an image, or there is no face at all; the message names file and
            line.
    """
    file = Path(file)
    file = user_file(file / "label.txt" if file.is_dir() else file, "label file")
    faces: dict[Path, list[FaceLabel]] = {}
    picture, counts = None, Counter()
    unknown, outside = [], []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        where = f"{file}, line {number}"
        if line.startswith("#"):
            picture = _find_picture(file.parent, line[1:].strip(), where)
            size = _picture_size(picture, where)
            counts["replaced"] += picture in faces
            faces[picture] = []
        elif line.strip():
            if picture is None:
                raise ValueError(f"{where}: a face before the first '# image' line{_widers_own(line)}")
            box, landmarks = _parse_face(line, where)
            if min(box[2:]) <= 0:
                counts["skipped"] += 1
            elif not _touches(box, size):
                outside.append(number)
            else:
                if (landmarks != UNKNOWN).any() and not _belongs(landmarks, box):
                    unknown.append(number)
                    landmarks = np.full((5, 2), UNKNOWN, np.float32)
                faces[picture].append(FaceLabel(picture, box, landmarks))
    labels = [label for of_picture in faces.values() for label in of_picture]
    if not labels:
        raise ValueError(f"no faces in {file}; expected '# image' lines followed by 'x y w h ...' lines")
    _report(file, len(labels), counts, unknown, outside)
    return labels


def _report(file: Path, remain: int, counts: Counter, unknown: list[int], outside: list[int]) -> None:
    if counts["skipped"]:
        logger.info("%s: left out %d faces without area, %d remain", file, counts["skipped"], remain)
    if counts["replaced"]:
        logger.warning("%s: %d images are listed more than once; their last labels are used", file, counts["replaced"])
    if outside:
        logger.warning("%s: left out %d boxes outside their image (first: line %d)", file, len(outside), outside[0])
    if unknown:
        logger.warning(
            "%s: %d faces have impossible landmarks (first: line %d); treated as faces without landmarks",
            file,
            len(unknown),
            unknown[0],
        )


def _find_picture(folder: Path, name: str, where: str) -> Path:
    for form in dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))):
        for candidate in (folder / "images" / form, folder / form):
            if candidate.is_file():
                return candidate
    raise FileNotFoundError(f"{where}: image {name!r} found neither in {folder / 'images'} nor in {folder}")


def _picture_size(picture: Path, where: str) -> tuple[int, int]:
    """Width and height according to the header of the file, before any rotation."""
    with open(picture, "rb") as file:
        size = image_size(file.read(_HEAD)) or image_size(picture.read_bytes())
    if size is None:
        raise ValueError(f"{where}: {picture} is not a readable image; restore the file or remove its labels")
    return size


def _widers_own(line: str) -> str:
    """A hint for users of WIDER FACE's own annotations, which begin with a path."""
    if not line.strip().lower().endswith((".jpg", ".png")):
        return ""
    return "; is it WIDER FACE's own wider_face_*_bbx_gt.txt, which has no landmarks? expected RetinaFace's label.txt"


def _parse_face(line: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Box (4,) and landmarks (5, 2) of one line."""
    try:
        values = np.array(line.split(), dtype=np.float32)
    except ValueError:
        values = np.array([np.nan])
    if len(values) not in (_BOX_ONLY, _WITH_LANDMARKS, _WITH_LANDMARKS + 1) or not np.isfinite(values).all():
        raise ValueError(
            f"{where}: a face is 4, 19 or 20 numbers (x y w h, five times x y flag, blur), got {line.strip()!r}"
        )
    unknown = np.full((5, 2), UNKNOWN, np.float32)
    if len(values) == _BOX_ONLY:
        return values, unknown
    points = values[4:19].reshape(5, 3)
    if not np.isin(points[:, 2], _FLAGS).all():
        raise ValueError(
            f"{where}: the flag after each point must be -1, 0 or 1; is a number missing in {line.strip()!r}?"
        )
    landmarks = points[:, :2]
    return values[:4], unknown if (landmarks == UNKNOWN).all(1).any() else landmarks


def _touches(box: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether a box overlaps an image, upright or rotated."""
    x, y, width, height = box
    right, bottom = x + width, y + height
    return any(x < w and y < h and right > 0 and bottom > 0 for w, h in (size, size[::-1]))


def _belongs(landmarks: np.ndarray, box: np.ndarray) -> bool:
    """Whether landmarks can belong to a face in this box: with their center inside it, or not far outside."""
    middle = np.abs(landmarks.mean(0) - (box[:2] + box[2:] / 2))
    return bool(known_landmarks(landmarks)) and bool((middle <= box[2:]).all())


class LandmarkDataset(Dataset):
    """Square crops around the labeled faces, black outside the image.

    Args:
        source: the label file, or its folder.
        size: side of the crops in pixels.
        padding: what to add around the box on every side, as a fraction of its longer side.
        rotation: rotate the crop's content by this many degrees, clockwise.
        shift: move the crop by these fractions of its side, right and down.
        labeled_only: leave out faces without landmarks, as for evaluation.

    Raises:
        FileNotFoundError: see ``read_labels``.
        ValueError: see ``read_labels``; or no face has landmarks and ``labeled_only`` is set.
    """

    def __init__(
        self,
        source: str | Path,
        size: int = 160,
        padding: float = 0.1,
        rotation: float = 0.0,
        shift: tuple[float, float] = (0.0, 0.0),
        labeled_only: bool = False,
    ) -> None:
        self.labels = read_labels(source)
        self.size, self.padding, self.rotation, self.shift = size, padding, rotation, shift
        if labeled_only:
            self.labels = [label for label in self.labels if (label.landmarks != UNKNOWN).any()]
            if not self.labels:
                raise ValueError(f"{source}: no face has landmarks; this label file can train only boxes and scores")

    def recropped(self, rotation: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> LandmarkDataset:
        """The same faces, cropped with another rotation and shift."""
        variant = copy.copy(self)
        variant.rotation, variant.shift = rotation, shift
        return variant

    def __len__(self) -> int:
        return len(self.labels)

    def record_key(self, index: int) -> str:
        """The image that a face is cropped from."""
        return str(self.labels[index].picture)

    def __getitem__(self, index: int) -> FaceSample:
        label = self.labels[index]
        picture = read_image_file(label.picture)
        matrix = self._crop_matrix(label.box)
        crop = warp_smoothly(picture, matrix, self.size)
        linear, offset = matrix[:, :2], matrix[:, 2]
        keypoints = label.landmarks
        if (keypoints != UNKNOWN).any():
            keypoints = (keypoints @ linear.T + offset) / self.size
        half = label.box[2:] / 2
        center = linear @ (label.box[:2] + half) + offset
        half = np.hypot(linear[:, 0] * half[0], linear[:, 1] * half[1])  # box around the ellipse inside the box
        bbox = np.concatenate([center - half, center + half]) / self.size
        return FaceSample(
            torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1))),
            torch.from_numpy(keypoints.astype(np.float32)),
            torch.from_numpy(bbox.astype(np.float32)),
        )

    def _crop_matrix(self, box: np.ndarray) -> np.ndarray:
        """(2, 3) from pixels of the image to pixels of the crop."""
        side = box[2:].max() * (1 + 2 * self.padding)
        center = box[:2] + box[2:] / 2 + np.array(self.shift) * side
        sine, cosine = np.sin(np.radians(self.rotation)), np.cos(np.radians(self.rotation))
        linear = np.array([[cosine, -sine], [sine, cosine]]) * (self.size / side)
        return np.column_stack([linear, self.size / 2 - linear @ center])
