"""Face crops with labels and keypoints, from RecordIO, from a folder of images, or drawn.

Every item is ``(image (3, 112, 112) uint8 RGB tensor, label int, keypoints (5, 2) float32 tensor in [0, 1])``; all
arithmetic on pixels waits until a batch is on its device.
"""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from ..geometry import CANONICAL_KEYPOINTS
from .image_codec import fit_crop
from .landmark_csv import read_keypoints
from .picture_files import list_people, read_image_file
from .record_checks import check_records
from .recordio import RecordReader
from .synthetic import SyntheticFaces

logger = logging.getLogger(__name__)

LANDMARK_FILE = "ldmk_5points.csv"


class FaceDataset(Dataset):
    """A source of faces as tensors.

    Args:
        source: has ``labels`` (N,) int64, ``has_landmarks``, ``source[i] -> (image (H, W, 3) uint8 RGB, keypoints
            (5, 2) or None)``, and ``record_key(i)``, which identifies the image to a person.
        size: side of the crops, pixels; other sizes are resized.
    """

    def __init__(self, source, size: int = 112) -> None:
        self.source = source
        self.size = size
        self.labels: np.ndarray = source.labels
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0

    def warn_without_landmarks(self) -> None:
        """Warn if every face has the template's keypoints, for networks that use keypoints."""
        if not self.source.has_landmarks:
            logger.warning(
                "%s not found: every face gets the canonical template as its keypoints, which is right for aligned "
                "crops only and leaves KPRPE nothing to learn from. `insightface-kprpe landmarks %s --weights DFA` "
                "writes it; or train a network that predicts them itself (*_kprpe_dfa)",
                self.source.folder / LANDMARK_FILE,
                self.source.folder,
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        image, keypoints = self.source[index]
        image = fit_crop(image, self.size)
        if keypoints is None:
            keypoints = CANONICAL_KEYPOINTS
        planes = np.empty((3, self.size, self.size), np.uint8)
        cv2.split(image, list(planes))  # twice as fast as NumPy's transposed copy
        return torch.from_numpy(planes), int(self.labels[index]), torch.tensor(keypoints, dtype=torch.float32)

    def record_key(self, index: int) -> int | str:
        """The source's name for an image: the key of its record, or the path of its file."""
        return self.source.record_key(index)


class RecordFaces:
    """``train.rec`` of InsightFace's layout and, next to it, ``ldmk_5points.csv``."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.reader = Path(folder), RecordReader(folder)
        self.keys = self.reader.image_keys
        self.labels = self.reader.labels()
        check_records(self.reader, self.labels)
        self.keypoints = _landmarks_beside(self.folder, len(self.keys))
        self.has_landmarks = self.keypoints is not None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        _, image = self.reader.read_image(int(self.keys[index]))
        return image, None if self.keypoints is None else self.keypoints[index]

    def record_key(self, index: int) -> int:
        return int(self.keys[index])


class FolderFaces:
    """A folder with one sub-folder of images per person; people and images are numbered in sorted order."""

    def __init__(self, folder: str | Path) -> None:
        people = list_people(folder)
        if not people:
            raise ValueError(
                f"rec must be a folder with one sub-folder of images per person, got {folder} without images"
            )
        self.paths = [path for files in people.values() for path in files]
        self.labels = np.repeat(np.arange(len(people), dtype=np.int64), [len(files) for files in people.values()])
        self.folder = Path(folder)
        self.keypoints = _landmarks_beside(self.folder, len(self.paths))
        self.has_landmarks = self.keypoints is not None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        return read_image_file(self.paths[index]), None if self.keypoints is None else self.keypoints[index]

    def record_key(self, index: int) -> str:
        return str(self.paths[index])


class DrawnFaces:
    """Synthetic people; see :mod:`insightface_kprpe.data.synthetic`."""

    has_landmarks = True

    def __init__(self, num_classes: int, num_image: int, seed: int) -> None:
        self.faces = SyntheticFaces(num_classes, max(1, num_image // num_classes), seed=seed)
        self.labels = self.faces.labels

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, _, keypoints = self.faces[index]
        return image, keypoints

    def record_key(self, index: int) -> int:
        return index


def open_faces(rec: str | Path, num_classes: int = 0, num_image: int = 0, seed: int = 0) -> FaceDataset:
    """Open the data that ``rec`` names.

    Args:
        rec: folder with train.rec, folder of people's folders, or "synthetic".
        num_classes: people to draw (synthetic only; 0 means 100).
        num_image: images to draw in total (synthetic only; 0 means 30 per person).
        seed: of the drawn people.

    Raises:
        ValueError: ``rec`` is none of these, or its files are damaged.
    """
    if str(rec) == "synthetic":
        num_classes = num_classes or 100
        return FaceDataset(DrawnFaces(num_classes, num_image or 30 * num_classes, seed))
    folder = Path(rec)
    if (folder / "train.rec").is_file():
        return FaceDataset(RecordFaces(folder))
    if folder.is_dir():
        return FaceDataset(FolderFaces(folder))
    raise ValueError(f'rec must be a folder with train.rec, a folder of people or "synthetic"; {rec} does not exist')


def _landmarks_beside(folder: Path, count: int) -> np.ndarray | None:
    path = folder / LANDMARK_FILE
    return read_keypoints(path, count)[0] if path.exists() else None


def to_network_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 RGB -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
