"""Pairs of crops for verification: InsightFace's ``.bin`` sets, folders with ``pairs.txt``, and drawn ones."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..fingerprint import fingerprint
from ..geometry import CANONICAL_KEYPOINTS
from .crops import open_crops
from .face_dataset import LANDMARK_FILE
from .image_codec import fit_crop
from .landmark_csv import read_keypoints, read_landmark_csv
from .pair_lists import FOLDS, PAIRS_FILE, find_pictures, read_pair_list
from .picture_files import read_image_file
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
        folds: of consecutive pairs, over which accuracy is measured.
    """

    name: str
    images: Sequence[np.ndarray]
    keypoints: np.ndarray
    is_same: np.ndarray
    keypoint_source: str = "given"
    source: str = ""
    folds: int = FOLDS


class _Files(Sequence):
    """Picture files as crops: whole, squeezed to the crops' size where they have another one."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return fit_crop(read_image_file(self.paths[index]))


class _Decoded(Sequence):
    """The images of a ``.bin`` set, decoded one by one when asked for."""

    def __init__(self, source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.source.image(index)


def open_verification(target: str, rec: str | Path | None = None) -> VerificationPairs:
    """Open a verification set.

    Args:
        target: path of a ``.bin`` file, the name of one in the folder ``rec``, "synthetic" or "synthetic_unaligned".
            Landmarks are read from ``<name>_ldmk_5points.csv`` beside the file. Or a folder of pictures with
            ``pairs.txt`` (:mod:`.pair_lists`) and perhaps ``ldmk_5points.csv``.
        rec: where named sets lie; None: here.

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
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise ValueError(
            f'val_targets must name .bin files (in rec, or by path), folders with {PAIRS_FILE}, or "synthetic", got '
            f"{target}: no {path}"
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


def verification_file(target: str, rec: str | Path | None = None) -> Path:
    """The ``.bin`` file, or the folder, that a name or path stands for; see :func:`open_verification`."""
    file = Path(target) if target.endswith(".bin") else Path(rec or ".") / f"{target}.bin"
    is_folder = (Path(target) / PAIRS_FILE).is_file()
    # A name is first of all that of a file in rec.
    return Path(target) if is_folder and not (rec is not None and file.is_file()) else file


def keypoints_of_files(folder: Path, paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None] | None:
    """Of some pictures of a folder, what its ``ldmk_5points.csv`` says.

    Args:
        folder: a set of crops, as :func:`~.crops.open_crops` numbers them.
        paths: of N of them; those that are none of the set have no landmarks.

    Returns:
        Keypoints (N, 5, 2) float32, (N,) bool, where the template stands in, and scores (N,) float32 or None, as the
        file has them; None where there is no such file.

    Raises:
        ValueError: the file is damaged, or does not fit the folder.
    """
    if not (folder / LANDMARK_FILE).is_file():
        return None
    crops = open_crops(folder)
    numbers = {path: number for number, path in enumerate(crops.paths)}
    rows = np.array([numbers.get(path, -1) for path in paths])
    keypoints, absent = read_keypoints(crops.landmark_file, crops.count)
    _, scores = read_landmark_csv(crops.landmark_file, crops.count)
    keypoints, absent = keypoints[rows], absent[rows] | (rows < 0)
    keypoints[rows < 0] = CANONICAL_KEYPOINTS
    return keypoints, absent, None if scores is None else np.where(rows < 0, np.float32(0), scores[rows])


def _open_folder(folder: Path) -> VerificationPairs:
    listed = read_pair_list(folder / PAIRS_FILE)
    paths = find_pictures(folder, listed.pictures)
    found = keypoints_of_files(folder, paths)
    if found is None:
        logger.warning(
            "%s not found: the canonical template stands in for every face's keypoints, unless the network finds them; "
            "`insightface-kprpe align` or `landmarks` writes it",
            folder / LANDMARK_FILE,
        )
        keypoints, source = np.broadcast_to(CANONICAL_KEYPOINTS, (len(paths), 5, 2)), "the canonical template"
    else:
        keypoints, absent, _ = found
        share = f", the canonical template for {absent.sum()} of {len(absent)}" if absent.any() else ""
        source = f"{LANDMARK_FILE}{share}"
    contents = {path: path.read_bytes() for path in set(paths) if path.is_file()}
    identity = fingerprint(*(contents.get(path, b"") for path in paths))
    is_same = np.array(listed.is_same)
    return VerificationPairs(folder.resolve().name, _Files(paths), keypoints, is_same, source, identity, listed.folds)


def check_pairs(pairs: VerificationPairs, size: int = 112) -> None:
    """Check a whole set, so that verification cannot fail later because of its content.

    Args:
        pairs: the set; every image is decoded.
        size: side that the images must have, pixels.

    Raises:
        ValueError: there are fewer pairs than folds, pairs of one kind only, or an image that is damaged or of another
            size.
    """
    check_kinds(pairs.is_same, pairs.folds)
    for number in range(len(pairs.images)):
        shape = pairs.images[number].shape
        if shape != (size, size, 3):
            raise ValueError(f"image {number} must be {size} x {size} pixels, got {shape[1]} x {shape[0]}")


def check_kinds(is_same: np.ndarray, folds: int = FOLDS) -> None:
    """:func:`check_pairs` for the (P,) answers only, without looking at the images."""
    count, same = len(is_same), int(np.count_nonzero(is_same))
    if count < folds:
        raise ValueError(f"it must hold at least {folds} pairs, one per fold, got {count}")
    if same in (0, count):
        kind = "the same person" if same else "different people"
        raise ValueError(f"it must hold pairs of the same person and of different people, got {count} of {kind} only")
