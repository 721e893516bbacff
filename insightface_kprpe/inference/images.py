"""Crops read from files on demand: aligned by landmarks, or whole images."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..data.image_codec import CROP_SIZE, fit_crop
from ..data.landmark_csv import known_keypoints
from ..data.picture_files import read_image_file
from ..geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS, align_face, distinct_landmarks, similarity_transform

logger = logging.getLogger(__name__)


def as_it_lies(path: Path) -> Path:
    """The file of this name, even if accents are composed differently on disk (macOS) than in a list."""
    if not path.exists():
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if other.exists():
                return other
    return path


class AlignedFiles(Sequence):
    """Faces from image files, aligned to InsightFace's template, as ``norm_crop`` does.

    If the five points coincide, as unknown landmarks do, a face cannot be aligned: a warning counts such faces, and
    they are treated like unreadable images. Another counts faces whose points can be none's.

    Args:
        paths: of N images.
        landmarks_px: (N, 5, 2) float, pixels of each image.

    Attributes:
        keypoints: (N, 5, 2) float32 in [0, 1] of the crops: the aligned landmarks.
    """

    def __init__(self, paths: Sequence[Path], landmarks_px: np.ndarray) -> None:
        self.paths, self.landmarks_px = paths, landmarks_px
        points = torch.from_numpy(np.asarray(landmarks_px, dtype=np.float64))
        similarity = similarity_transform(points, torch.tensor(ARCFACE_TEMPLATE_112, dtype=torch.float64))
        moved = points @ similarity[..., :2].mT + similarity[:, None, :, 2]
        self.keypoints = (moved / CROP_SIZE).float().numpy()
        self.alignable = distinct_landmarks(landmarks_px)
        self.keypoints[~self.alignable] = CANONICAL_KEYPOINTS
        if not self.alignable.all():
            first, count = int(self.alignable.argmin()), int((~self.alignable).sum())
            logger.warning("%d of %d faces have no landmarks (first: %s)", count, len(paths), paths[first])
        odd = self.alignable & ~known_keypoints(np.asarray(landmarks_px))
        if odd.any():
            logger.warning(
                "%d of %d faces have landmarks that lie as no face's do (first: %s); they are aligned by them all the "
                "same, as the protocols' own scripts do",
                odd.sum(), len(paths), paths[int(odd.argmax())],
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not self.alignable[index]:
            raise ValueError(f"{self.paths[index]}: its landmarks coincide, so it cannot be aligned")
        return align_face(read_image_file(as_it_lies(self.paths[index])), self.landmarks_px[index], CROP_SIZE)[0]


class WholeFiles(Sequence):
    """Image files as crops; those of another size are resized, smaller ones smoothly (bicubic).

    Args:
        paths: of N images.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return fit_crop(read_image_file(as_it_lies(self.paths[index])))
