"""Pairs of crops for verification: InsightFace's ``.bin`` sets and drawn ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..fingerprint import fingerprint
from ..geometry import CANONICAL_KEYPOINTS
from .face_dataset import LANDMARK_FILE
from .landmark_csv import read_keypoints
from .synthetic import verification_pairs
from .verification_bin import read_verification_bin

logger = logging.getLogger(__name__)

# People that no training set draws: the drawn ones are numbered from 0.
FIRST_UNSEEN_IDENTITY = 1_000_000


@dataclass(frozen=True)
class VerificationPairs:
    """Pairs of crops: images 2i and 2i + 1 are pair i.

    Attributes:
        name: what reports call the set.
        images: 2P crops (112, 112, 3) uint8 RGB, indexable.
        keypoints: (2P, 5, 2) float32 in [0, 1] of the crops.
        is_same: (P,) bool.
        keypoint_source: where the keypoints come from, for reports.
        source: text that distinguishes this set from others of the same name.
    """

    name: str
    images: Sequence[np.ndarray]
    keypoints: np.ndarray
    is_same: np.ndarray
    keypoint_source: str = "given"
    source: str = ""


class _Decoded(Sequence):
    """The images of a ``.bin`` set, decoded one by one when asked for."""

    def __init__(self, source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source.image(index)


def open_verification(target: str, rec: str | Path = ".") -> VerificationPairs:
    """Open a verification set.

    Args:
        target: path of a ``.bin`` file, the name of one in the folder ``rec``, "synthetic" or "synthetic_unaligned".
            Landmarks are read from ``<name>_ldmk_5points.csv`` next to the file.
        rec: the folder of named sets.

    Raises:
        ValueError: there is no such set, or it is damaged.
    """
    if target in ("synthetic", "synthetic_unaligned"):
        aligned = target == "synthetic"
        images, is_same, keypoints = verification_pairs(
            num_identities=60, pairs=600, seed=0, first_identity=FIRST_UNSEEN_IDENTITY, aligned=aligned
        )
        return VerificationPairs(target, images, keypoints, is_same, "as drawn", target)
    path = verification_file(target, rec)
    if not path.is_file():
        raise ValueError(
            f'val_targets must name .bin files (in rec, or by path) or "synthetic", got {target}: no {path}'
        )
    pairs = read_verification_bin(path)
    landmarks = path.with_name(f"{path.stem}_{LANDMARK_FILE}")
    if landmarks.exists():
        keypoints, absent = read_keypoints(landmarks, len(pairs.images))
        note = f", the canonical template for {absent.sum()} of {len(absent)}" if absent.any() else ""
        keypoint_source = f"{landmarks.name}{note}"
    else:
        logger.warning(
            "%s not found: the canonical template is used as every face's keypoints, unless the network finds them; "
            "create the file with `insightface-kprpe landmarks %s --weights DFA`",
            landmarks,
            path,
        )
        keypoints = np.broadcast_to(CANONICAL_KEYPOINTS, (len(pairs.images), 5, 2))
        keypoint_source = "the canonical template"
    source = fingerprint(*pairs.images)
    return VerificationPairs(path.stem, _Decoded(pairs), keypoints, pairs.is_same, keypoint_source, source)


def verification_file(target: str, rec: str | Path = ".") -> Path:
    """The ``.bin`` file that a name or path stands for; see :func:`open_verification`."""
    return Path(target) if target.endswith(".bin") else Path(rec) / f"{target}.bin"


def check_pairs(pairs: VerificationPairs, folds: int = 10, size: int = 112) -> None:
    """Check a whole set, so that verification cannot fail later because of its content.

    Args:
        pairs: the set; every image is decoded.
        folds: of the verification.
        size: side that the images must have, pixels.

    Raises:
        ValueError: there are fewer pairs than folds, pairs of one kind only, or an image that is damaged or of another
            size.
    """
    check_kinds(pairs.is_same, folds)
    for number in range(len(pairs.images)):
        shape = pairs.images[number].shape
        if shape != (size, size, 3):
            raise ValueError(f"image {number} must be {size} x {size} pixels, got {shape[1]} x {shape[0]}")


def check_kinds(is_same: np.ndarray, folds: int = 10) -> None:
    """:func:`check_pairs` for the (P,) answers only, without looking at the images."""
    count, same = len(is_same), int(np.count_nonzero(is_same))
    if count < folds:
        raise ValueError(f"it must hold at least {folds} pairs, one per fold, got {count}")
    if same in (0, count):
        kind = "the same person" if same else "different people"
        raise ValueError(f"it must hold pairs of the same person and of different people, got {count} of {kind} only")
