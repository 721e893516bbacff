"""Making InsightFace's ``.bin`` verification sets from pictures, and looking at them."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .face_dataset import LANDMARK_FILE
from .image_codec import CROP_SIZE
from .image_header import image_size
from .landmark_csv import write_landmark_csv
from .pair_lists import PAIRS_FILE, PairList, draw_pair_list, find_pictures, read_pair_list
from .picture_files import list_people
from .reading import Items, results
from .record_inspection import describe_look, jpeg_quality, landmark_state
from .record_tools import encode_crop
from .verification_bin import VerificationSet, read_verification_bin, write_verification_bin
from .verification_pairs import check_kinds, keypoints_of_files

logger = logging.getLogger(__name__)

_SHOWN = 3  # files that a message names


class MadeSet(NamedTuple):
    """What was written.

    Attributes:
        pairs: how many.
        same: of one person.
        left_out: pairs of which a picture is missing or cannot be read.
        people: whose pictures they are; by their folders.
        landmarks: the landmark file, if there are landmarks.
        template: images whose landmarks are not known, where the template's stand in.
    """

    pairs: int
    same: int
    left_out: int
    people: int
    landmarks: Path | None
    template: int


def make_verification_bin(
    folder: str | Path,
    out: str | Path,
    pairs: str | Path | int | None = None,
    *,
    missing: str = "fail",
    seed: int = 0,
    num_workers: int = 0,
) -> MadeSet:
    """Write the pairs of a folder's pictures as a ``.bin`` file, and beside it their landmarks, where they are known.

    Pictures of another size than 112x112 are resized whole; align them first. A JPEG of that size stays as it is, byte
    for byte.

    Args:
        folder: of the pictures, or above ``images``; with ``ldmk_5points.csv``, its landmarks go along.
        out: a new ``.bin`` file.
        pairs: a list (:func:`~.pair_lists.read_pair_list`); or a number of pairs to draw, half of them of one person,
            in ten folds that share nobody; the folder then has a sub-folder a person. None: its ``pairs.txt``.
        missing: what to do about a picture that is missing or damaged: "fail", or "skip" its pairs.
        seed: of the drawn pairs.
        num_workers: processes that read pictures; 0: this one.

    Raises:
        FileNotFoundError: there is no such folder or list.
        ValueError: the list or the landmarks are damaged, a picture is missing, pairs are of one kind or fewer than
            the folds, or ``out`` exists.
    """
    folder, out = Path(folder), Path(out)
    landmark_file = out.with_name(f"{out.stem}_{LANDMARK_FILE}")
    if missing not in ("fail", "skip"):
        raise ValueError(f"missing must be 'fail' or 'skip', got {missing!r}")
    if out.suffix != ".bin":
        raise ValueError(f"out must end in .bin, got {out}")
    for file in (out, landmark_file):
        if file.exists():
            raise ValueError(f"{file} already exists; remove it, or choose another file")
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of pictures not found: {folder}")
    listed, paths = _listed(folder, pairs, seed)
    check_kinds(np.array(listed.is_same), listed.folds)
    found = keypoints_of_files(folder, paths)
    unique = list(dict.fromkeys(paths))
    items = Items(len(unique), lambda index: encode_crop(unique[index], CROP_SIZE)[0])
    contents = dict(zip(unique, results(items, num_workers, "reading"), strict=True))
    whole = np.array([isinstance(contents[path], bytes) for path in paths]).reshape(-1, 2).all(1)
    _check_missing(contents, whole, missing, folder)
    _warn_of_other_shapes(unique)
    kept = np.repeat(whole, 2)
    chosen = [path for path, keep in zip(paths, kept, strict=True) if keep]
    is_same = np.array(listed.is_same)[whole]
    check_kinds(is_same, listed.folds)
    if found is not None:
        keypoints, absent, scores = (None if values is None else values[kept] for values in found)
        write_landmark_csv(landmark_file, keypoints, scores)
    write_verification_bin(out, [contents[path] for path in chosen], is_same.tolist())
    template = 0 if found is None else int(absent.sum())
    people = len({path.parent for path in chosen})
    written = None if found is None else landmark_file
    return MadeSet(len(is_same), int(is_same.sum()), int((~whole).sum()), people, written, template)


def _listed(folder: Path, pairs: str | Path | int | None, seed: int) -> tuple[PairList, list[Path]]:
    """The pairs, and the files of their pictures."""
    if isinstance(pairs, int):
        people = {name: [str(path) for path in paths] for name, paths in list_people(folder).items()}
        if not people:
            raise ValueError(f"to draw pairs, {folder} must have a sub-folder of pictures for each person")
        drawn = draw_pair_list(people, pairs, seed)
        return drawn, [Path(path) for path in drawn.pictures]
    file = folder / PAIRS_FILE if pairs is None else Path(pairs)
    if pairs is None and not file.is_file():
        raise FileNotFoundError(f"{file} not found; name a list of pairs, or how many pairs to draw")
    listed = read_pair_list(file)
    return listed, find_pictures(folder, listed.pictures)


def _check_missing(contents: dict[Path, bytes | str], whole: np.ndarray, missing: str, folder: Path) -> None:
    faults = [fault for fault in contents.values() if isinstance(fault, str)]
    if not faults:
        return
    shown = "; ".join(faults[:_SHOWN]) + ("; ..." if len(faults) > _SHOWN else "")
    told = f"{len(faults)} of {len(contents)} pictures cannot be read, of {int((~whole).sum())} pairs: {shown}"
    if missing == "fail":
        raise ValueError(f"{folder}: {told}; such pairs can be left out (missing: skip)")
    logger.warning("%s: left out: %s", folder, told)


def _warn_of_other_shapes(paths: list[Path]) -> None:
    squeezed = []
    for path in paths:
        size = image_size(path.read_bytes()) if path.is_file() else None
        if size is not None and size[0] != size[1]:
            squeezed.append(path)
    if squeezed:
        shown = ", ".join(map(str, squeezed[:_SHOWN]))
        logger.warning("%d of %d pictures are no squares and were squeezed into ones (%s); are they crops? "
                       "insightface-kprpe align makes crops", len(squeezed), len(paths), shown)  # fmt: skip


def inspect_verification_bin(path: str | Path, folds: int = 10) -> dict[str, Any]:
    """Look at a ``.bin`` set and its landmark file; every image is decoded.

    Args:
        path: the file.
        folds: over which accuracy is measured.

    Returns:
        Facts by name, for people to read; ``bad`` has the faults of all unreadable images, ``contradictions`` what
        cannot be right.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no verification set.
    """
    path = Path(path)
    pairs = read_verification_bin(path)
    looks, bad = Counter(), []
    for index, data in enumerate(pairs.images):
        try:
            height, width = pairs.image(index).shape[:2]
        except ValueError as error:
            bad.append(str(error))
            continue
        looks[height, width, jpeg_quality(data)] += 1
    same, count = int(pairs.is_same.sum()), len(pairs.is_same)
    landmark_file = path.with_name(f"{path.stem}_{LANDMARK_FILE}")
    landmarks = landmark_state(landmark_file, len(pairs.images))
    contradictions = [*_contradictions(pairs, folds)]
    others = {look[:2] for look in looks} - {(CROP_SIZE, CROP_SIZE)}
    if others:
        contradictions.append(f"images must be {CROP_SIZE}x{CROP_SIZE}, there are {_sizes(others)}")
    if landmarks.startswith("damaged"):
        contradictions.append(f"landmarks {landmarks}")
    return {
        "file": str(path),
        "pairs": f"{count}: {same} of one person, {count - same} of two",
        "images": len(pairs.images),
        "different images": len(set(_digests(pairs))),
        "folds": _folds(pairs.is_same, folds),
        "landmarks": landmarks,
        "formats": {describe_look(look): number for look, number in looks.most_common(8)},
        "bad": bad,
        "contradictions": contradictions,
    }


def _folds(is_same: np.ndarray, folds: int) -> str:
    if len(is_same) < folds:
        return f"fewer pairs than {folds} folds"
    sizes, same = zip(*((len(part), int(part.sum())) for part in np.array_split(is_same, folds)), strict=True)
    mixed = sum(0 < some < size for some, size in zip(same, sizes, strict=True))
    note = "" if mixed == folds else f"; only {mixed} of them have pairs of both kinds, so their spread says little"
    return f"{folds} of {min(sizes)} to {max(sizes)} pairs{note}"


def _sizes(shapes: set[tuple[int, int]]) -> str:
    return ", ".join(f"{width}x{height}" for height, width in sorted(shapes)[:_SHOWN])


def _digests(pairs: VerificationSet) -> list[bytes]:
    return [hashlib.sha256(image).digest() for image in pairs.images]


def _contradictions(pairs: VerificationSet, folds: int) -> list[str]:
    digests = _digests(pairs)
    first, second = digests[0::2], digests[1::2]
    found = []
    try:
        check_kinds(pairs.is_same, folds)
    except ValueError as error:
        found.append(str(error))
    itself = [number for number in range(len(first)) if first[number] == second[number]]
    if itself:
        found.append(f"{len(itself)} pairs are of an image with itself (first: pair {itself[0]})")
    seen: dict[tuple[bytes, bytes], int] = {}
    twice, against = [], []
    for number, pair in enumerate(zip(first, second, strict=True)):
        earlier = seen.setdefault(tuple(sorted(pair)), number)
        if earlier != number:
            (twice if pairs.is_same[earlier] == pairs.is_same[number] else against).append((earlier, number))
    if twice:
        found.append(f"{len(twice)} pairs are there twice (first: pairs {twice[0][0]} and {twice[0][1]})")
    if against:
        found.append(f"{len(against)} pairs have two answers (first: pairs {against[0][0]} and {against[0][1]})")
    return found
