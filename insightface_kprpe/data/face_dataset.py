"""Face crops with labels and keypoints, from RecordIO, from a folder of images, or drawn.

Every item is ``(image (3, 112, 112) uint8 RGB tensor, label int, keypoints (5, 2) float32 tensor in [0, 1])``; all
arithmetic on pixels waits until a batch is on its device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..geometry import CANONICAL_KEYPOINTS
from .image_codec import decode_image
from .landmark_csv import read_keypoints
from .recordio import RecordReader
from .synthetic import SyntheticFaces

logger = logging.getLogger(__name__)

LANDMARK_FILE = "ldmk_5points.csv"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


class FaceDataset(Dataset):
    """A source of faces as tensors.

    Args:
        source: has ``labels`` (N,) int64 and ``source[i] -> (image (H, W, 3) uint8 RGB, keypoints (5, 2) or None)``.
        size: side of the crops, pixels; other sizes are resized.
    """

    def __init__(self, source, size: int = 112) -> None:
        self.source = source
        self.size = size
        self.labels: np.ndarray = source.labels
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        image, keypoints = self.source[index]
        if image.shape[:2] != (self.size, self.size):
            image = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA)
        if keypoints is None:
            keypoints = CANONICAL_KEYPOINTS
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return image, int(self.labels[index]), torch.tensor(keypoints, dtype=torch.float32)


class RecordFaces:
    """``train.rec`` of InsightFace's layout and, beside it, ``ldmk_5points.csv``."""

    def __init__(self, folder: str | Path) -> None:
        self.reader = RecordReader(folder)
        self.keys = self.reader.image_keys
        self.labels = self.reader.labels()
        self.keypoints = _landmarks_beside(Path(folder), len(self.keys))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        _, image = self.reader.read_image(int(self.keys[index]))
        return image, None if self.keypoints is None else self.keypoints[index]


class FolderFaces:
    """A folder with one sub-folder of images a person; people and images are numbered in sorted order."""

    def __init__(self, folder: str | Path) -> None:
        people = list_people(folder)
        if not people:
            raise ValueError(
                f"rec must be a folder with one sub-folder of images a person, got {folder} without images"
            )
        self.paths = [path for files in people for path in files]
        self.labels = np.repeat(np.arange(len(people), dtype=np.int64), [len(files) for files in people])
        self.keypoints = _landmarks_beside(Path(folder), len(self.paths))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        return read_image_file(self.paths[index]), None if self.keypoints is None else self.keypoints[index]


class DrawnFaces:
    """Synthetic people; see :mod:`insightface_kprpe.data.synthetic`."""

    def __init__(self, num_classes: int, num_image: int, seed: int) -> None:
        self.faces = SyntheticFaces(num_classes, max(1, num_image // num_classes), seed=seed)
        self.labels = self.faces.labels

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        image, _, keypoints = self.faces[index]
        return image, keypoints


def open_faces(rec: str | Path, num_classes: int = 0, num_image: int = 0, seed: int = 0) -> FaceDataset:
    """Open whatever ``rec`` names.

    Args:
        rec: folder with train.rec, folder of people's folders, or "synthetic".
        num_classes: people to draw (synthetic only; 0 means 100).
        num_image: images to draw in all (synthetic only; 0 means 30 a person).
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
    if path.is_file():
        return read_keypoints(path, count)
    logger.warning(
        "%s not found: every face gets the canonical template as its keypoints, which is right for aligned crops only "
        "and leaves KPRPE nothing to learn from. `insightface-kprpe landmarks %s --weights DFA` writes it; or "
        "train a network that finds them itself (*_kprpe_dfa)",
        path,
        folder,
    )
    return None


def list_people(folder: str | Path) -> list[list[Path]]:
    """Images of each sub-folder that has some, both in sorted order: how a folder of people is numbered."""
    people = [
        sorted(file for file in person.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        for person in sorted(Path(folder).iterdir())
        if person.is_dir()
    ]
    return [files for files in people if files]


def read_image_file(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB; what is wrong with a file that is no image is said with its name, as a ValueError."""
    try:
        return decode_image(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove or replace it") from error


class EpochSampler(Sampler[list[int]]):
    """Batches of one rank: every epoch another permutation, the same on all ranks, cut into shares of equal size.

    A step's images do not depend on how many ranks share them: rank r of W takes the r-th part of every block of
    ``W * batch_size``. The tail that does not fill a block is left out of this epoch.

    Args:
        length: number of images.
        batch_size: images a rank and batch.
        rank: of this process.
        world_size: number of ranks.
        seed: of the permutations.

    Raises:
        ValueError: there are fewer images than one block.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        self.length, self.batch_size, self.rank, self.world_size, self.seed = length, batch_size, rank, world_size, seed
        self.batches = length // (batch_size * world_size)
        if not self.batches:
            raise ValueError(
                f"batch_size must let {length} images fill a batch on each rank, got {batch_size} on {world_size} ranks"
            )
        self.set_position(0, 0)

    def set_position(self, epoch: int, first_batch: int) -> None:
        """Where the next iteration starts: epoch number, and how many of its batches are done already."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        blocks = order[: self.batches * self.world_size * self.batch_size]
        mine = blocks.reshape(self.batches, self.world_size, self.batch_size)[:, self.rank]
        for batch in mine[self.first_batch :]:
            yield batch.tolist()

    def __len__(self) -> int:
        return self.batches - self.first_batch


def to_network_input(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 RGB -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
