"""Faces with landmarks for DFA: WIDER FACE with RetinaFace's ``label.txt``, and any folder in that layout.

A label file names a picture (``# 0--Parade/1.jpg``) and then has one line per face: the box ``x y w h``, five times
``x y flag``, and a blur value, in pixels; all -1 where a face has no landmarks. A line may end after the box. Pictures
lie in ``images/`` beside the label file, or beside it.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from ..geometry import warp_smoothly

logger = logging.getLogger(__name__)

UNKNOWN = -1.0  # every coordinate of landmarks or of a box that does not exist
_BOX_ONLY, _WITH_LANDMARKS = 4, 4 + 5 * 3  # numbers on a line; a blur value may follow


class FaceSample(NamedTuple):
    """One face crop, or a batch of them (B in front of every shape).

    Attributes:
        image: (3, S, S) RGB, uint8 from the dataset, float in [-1, 1] after augmentation.
        keypoints: (5, 2) float32 xy in [0, 1] of the crop (outside it where cut off); all -1 where not labelled.
        bbox: (4,) float32 x1, y1, x2, y2 in [0, 1] of the crop; all -1 where the image shows no face.
    """

    image: torch.Tensor
    keypoints: torch.Tensor
    bbox: torch.Tensor


class FaceLabel(NamedTuple):
    """One line of a label file, in pixels of the picture."""

    picture: Path
    box: np.ndarray  # (4,) x, y, width, height
    landmarks: np.ndarray  # (5, 2); all -1 where not labelled


def read_labels(file: str | Path) -> list[FaceLabel]:
    """Read a RetinaFace label file; faces whose box has no area, of which WIDER FACE has a few, are left out.

    Where a picture is named twice, the later entry replaces the earlier one: they contradict each other, and a file
    that was written again has the later picture.

    Args:
        file: ``label.txt``, or its folder.

    Raises:
        FileNotFoundError: the file, or a picture that it names, does not exist.
        ValueError: a line is malformed, or there is no face at all; the message names file and line.
    """
    file = Path(file)
    file = file / "label.txt" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"label file not found: {file}")
    faces: dict[Path, list[FaceLabel]] = {}
    picture, skipped, replaced = None, 0, 0
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if line.startswith("#"):
                picture = _find_picture(file.parent, line[1:].strip(), where)
                replaced += picture in faces
                faces[picture] = []
            elif line.strip():
                if picture is None:
                    raise ValueError(f"{where}: a face before the first '# picture' line")
                box, landmarks = _parse_face(line, where)
                if min(box[2:]) > 0:
                    faces[picture].append(FaceLabel(picture, box, landmarks))
                else:
                    skipped += 1
    labels = [label for of_picture in faces.values() for label in of_picture]
    if not labels:
        raise ValueError(f"{file} holds no face; expected '# picture' lines followed by 'x y w h ...' lines")
    if skipped:
        logger.info("%s: %d faces without area left out, %d remain", file, skipped, len(labels))
    if replaced:
        logger.warning("%s: %d pictures are named more than once; their last labels count", file, replaced)
    return labels


def _find_picture(folder: Path, name: str, where: str) -> Path:
    for candidate in (folder / "images" / name, folder / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"{where}: picture {name!r} found neither in {folder / 'images'} nor in {folder}")


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
    landmarks = values[4:19].reshape(5, 3)[:, :2]
    return values[:4], unknown if (landmarks == UNKNOWN).all(1).any() else landmarks


class LandmarkDataset(Dataset):
    """Square crops around the labelled faces, black outside the picture.

    Args:
        source: the label file, or its folder.
        size: side of the crops in pixels.
        padding: what to add around the box on every side, as a fraction of its longer side.
        rotation: turn the crop's content by so many degrees, clockwise as seen.
        shift: move the crop by these fractions of its side, right and down.
        labelled_only: leave out faces without landmarks, as for evaluation.

    Raises:
        FileNotFoundError: see ``read_labels``.
        ValueError: see ``read_labels``; or no face has landmarks and ``labelled_only`` is set.
    """

    def __init__(
        self,
        source: str | Path,
        size: int = 160,
        padding: float = 0.1,
        rotation: float = 0.0,
        shift: tuple[float, float] = (0.0, 0.0),
        labelled_only: bool = False,
    ) -> None:
        self.labels = read_labels(source)
        self.size, self.padding, self.rotation, self.shift = size, padding, rotation, shift
        if labelled_only:
            self.labels = [label for label in self.labels if (label.landmarks != UNKNOWN).any()]
            if not self.labels:
                raise ValueError(f"{source}: no face has landmarks; this label file can only train box and score")

    def recropped(self, rotation: float = 0.0, shift: tuple[float, float] = (0.0, 0.0)) -> LandmarkDataset:
        """The same faces, cut out of their pictures with another rotation and shift."""
        variant = copy.copy(self)
        variant.rotation, variant.shift = rotation, shift
        return variant

    def __len__(self) -> int:
        return len(self.labels)

    def record_key(self, index: int) -> str:
        """The picture that a face is cut out of."""
        return str(self.labels[index].picture)

    def __getitem__(self, index: int) -> FaceSample:
        label = self.labels[index]
        picture = cv2.imread(str(label.picture))
        if picture is None:
            raise ValueError(f"{label.picture} could not be read as an image; restore the file or remove its labels")
        matrix = self._crop_matrix(label.box)
        crop = warp_smoothly(picture, matrix, self.size)
        linear, offset = matrix[:, :2], matrix[:, 2]
        keypoints = label.landmarks
        if (keypoints != UNKNOWN).any():
            keypoints = (keypoints @ linear.T + offset) / self.size
        half = label.box[2:] / 2
        centre = linear @ (label.box[:2] + half) + offset
        half = np.hypot(linear[:, 0] * half[0], linear[:, 1] * half[1])  # box around the ellipse inside the box
        bbox = np.concatenate([centre - half, centre + half]) / self.size
        return FaceSample(
            torch.from_numpy(np.ascontiguousarray(crop[:, :, ::-1].transpose(2, 0, 1))),
            torch.from_numpy(keypoints.astype(np.float32)),
            torch.from_numpy(bbox.astype(np.float32)),
        )

    def _crop_matrix(self, box: np.ndarray) -> np.ndarray:
        """(2, 3) from pixels of the picture to pixels of the crop."""
        side = box[2:].max() * (1 + 2 * self.padding)
        centre = box[:2] + box[2:] / 2 + np.array(self.shift) * side
        sine, cosine = np.sin(np.radians(self.rotation)), np.cos(np.radians(self.rotation))
        linear = np.array([[cosine, -sine], [sine, cosine]]) * (self.size / side)
        return np.column_stack([linear, self.size / 2 - linear @ centre])
