"""Reads a few faces for a figure, with landmarks from any source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.crops import Crops, open_crops
from ..data.face_dataset import LANDMARK_FILE
from ..data.landmark_csv import read_landmark_csv
from ..data.landmark_dataset import LandmarkDataset
from ..data.synthetic import SyntheticFaces
from ..dfa import load_dfa
from ..inference.predicted_landmarks import locate_in

DRAWN = "synthetic"
_DRAWN_PEOPLE = 64
_LABELED_SIZE = 160  # pixels of the crops around labeled boxes


class FigureFaces(NamedTuple):
    """Faces and where their points are.

    Attributes:
        names: for captions: the numbers of the faces in their set.
        images: (H, W, 3) uint8 RGB each.
        keypoints: (n, 5, 2) float32, xy in [0, 1] of the crops; None if unknown.
    """

    names: list[str]
    images: list[np.ndarray]
    keypoints: np.ndarray | None


def read_faces(source: str | Path, indices: Sequence[int], landmarks: str | Path | None = None) -> FigureFaces:
    """Read some faces of a set.

    Args:
        source: what ``open_crops`` opens; a folder with ``label.txt`` in RetinaFace's format; or "synthetic" for drawn
            faces in loose crops.
        indices: which ones, from 0.
        landmarks: where their points come from: a landmark file (.csv) of the set, or a DFA by weights file or output
            folder; None: the set's own (labels, or ``ldmk_5points.csv`` next to it).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the set has no such face, or is none.
    """
    crops, own = _open(source)
    if bad := [index for index in indices if not 0 <= index < crops.count]:
        raise ValueError(f"faces must be numbers from 0 to {crops.count - 1} of {source}, got {bad[0]}")
    indices = list(indices)
    if landmarks is None:
        keypoints = None if own is None else own[indices]
    elif Path(landmarks).suffix == ".csv":
        keypoints = read_landmark_csv(landmarks, crops.count)[0][indices]
    else:
        keypoints = locate_in(crops, indices, load_dfa(landmarks))
    return FigureFaces([str(index) for index in indices], [crops.read(index) for index in indices], keypoints)


def _open(source: str | Path) -> tuple[Crops, np.ndarray | None]:
    """A set, and its own landmarks."""
    if str(source) == DRAWN:
        drawn = SyntheticFaces(_DRAWN_PEOPLE, 1, aligned=False)
        points = np.stack([drawn[index][2] for index in range(len(drawn))])
        return Crops(len(drawn), lambda index: drawn[index][0], Path(LANDMARK_FILE)), points
    if (Path(source) / "label.txt").is_file():
        labeled = LandmarkDataset(source, _LABELED_SIZE, labeled_only=True)
        points = np.stack([labeled[index].keypoints.numpy() for index in range(len(labeled))])
        read = lambda index: labeled[index].image.permute(1, 2, 0).numpy()  # noqa: E731
        return Crops(len(labeled), read, Path(source) / LANDMARK_FILE), points
    crops = open_crops(source)
    own = read_landmark_csv(crops.landmark_file, crops.count)[0] if crops.landmark_file.is_file() else None
    return crops, own
