"""Making training sets in InsightFace's RecordIO layout, from folders or from other record files.

A set is a folder with ``train.rec``, ``train.idx``, ``property`` and, where landmarks are known, ``ldmk_5points.csv``.
Its images are ordinary JPEG files, which have no channel order of their own: every program reads the right colors.
"""

from __future__ import annotations

import functools
import json
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..documents import read_json_object
from ..files import atomic_folder
from ..fingerprint import fingerprint
from .face_dataset import LANDMARK_FILE
from .image_codec import decode_image, encode_jpeg, fit_crop
from .landmark_csv import read_landmark_csv, write_landmark_csv
from .picture_files import list_people
from .reading import Items, results
from .record_checks import check_index
from .record_format import RecordError
from .record_writer import write_face_records, write_shuffled_records
from .recordio import RecordReader

logger = logging.getLogger(__name__)

_MARK = ".made.json"  # what a set was made of
_NAMED = 5  # people without images that a warning names


class Packed(NamedTuple):
    """What was written.

    Attributes:
        images: how many.
        identities: how many.
        left_out: images that could not be read, or had no identity.
        landmarks: whether there is a landmark file.
        unchanged: images whose JPEG file was copied byte for byte; the others were encoded again.
    """

    images: int
    identities: int
    left_out: int
    landmarks: bool
    unchanged: int


def pack_drawn(folder: str | Path, faces: Iterable[tuple[np.ndarray, int, np.ndarray]], quality: int = 95) -> None:
    """Write faces that are in memory as a set with landmarks.

    Args:
        folder: for ``train.rec``, ``train.idx``, ``property`` and ``ldmk_5points.csv``; made where missing.
        faces: (H, W, 3) uint8 RGB image, label and (5, 2) keypoints in [0, 1] of each, in the order of their labels.
        quality: of the JPEG files, 1 to 100.
    """
    keypoints = []

    def samples() -> Iterator[tuple[bytes, int]]:
        for image, label, points in faces:
            keypoints.append(points)
            yield encode_jpeg(image, quality), label

    write_face_records(Path(folder) / "train", samples())
    write_landmark_csv(Path(folder) / LANDMARK_FILE, np.stack(keypoints))


def pack_folder(
    folder: str | Path, out: str | Path, *, size: int = 112, quality: int = 95, num_workers: int = 0
) -> Packed:
    """Pack a folder with one sub-folder of images per person, numbered in sorted order, and its ``ldmk_5points.csv``.

    A JPEG of the right size is copied unchanged; everything else is resized and encoded as JPEG. Images that cannot
    be read are left out with a warning each, their landmarks too.

    Args:
        folder: has one sub-folder of images per person.
        out: a new folder.
        size: side of the packed images, pixels.
        quality: of images that are encoded, 1 to 100.
        num_workers: processes that read and encode; 0: this one.

    Raises:
        ValueError: there are no images, the landmark file does not fit them, or ``out`` holds something else.
    """
    people = list_people(folder)
    if not people:
        raise ValueError(f"FOLDER must have one sub-folder of images per person, got {folder} without images")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1 to 100, got {quality}")
    paths = [path for files in people.values() for path in files]
    labels = np.repeat(np.arange(len(people)), [len(files) for files in people.values()])
    images = Items(len(paths), lambda index: encode_crop(paths[index], size, quality))
    landmarks = _landmarks_of(Path(folder), len(paths), np.arange(len(paths)))
    identity = _identity(Path(folder), paths, "pack", size, quality)
    name_of = list(people).__getitem__
    return _write(Path(out), images, labels, landmarks, size, num_workers, identity=identity, name_of=name_of)


def repack(source: str | Path, out: str | Path, *, shuffle: int | None = None, num_workers: int = 0) -> Packed:
    """Bring a record file of any kind (im2rec's, shuffled, without index) into InsightFace's layout, or shuffle it.

    Images are copied byte for byte, in the order of their labels, which are renumbered from 0 without gaps. Images that
    cannot be read, or whose label is negative, are left out, and so are their rows of ``ldmk_5points.csv``.

    Args:
        source: a ``.rec`` file or a folder with ``train.rec``.
        out: a new folder.
        shuffle: seed of a random order, without record 0 and identity records: for readers that go through the file
            from end to end, as arcface_torch's DALI option does. None: by label.
        num_workers: processes that read and check the images; 0: this one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source or its landmark file is damaged, or ``out`` holds something else.
    """
    reader = RecordReader(source)
    check_index(reader)
    labels = reader.labels()
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(order)
    if not len(order):
        raise ValueError(f"{reader.path} must have images with labels from 0, got none")
    if len(order) < len(labels):
        logger.warning("%d images have a negative label and are left out", len(labels) - len(order))
    keys = reader.image_keys[order]
    images = Items(len(keys), functools.partial(_copy_record, reader, keys))
    size = _first_size(reader, keys)
    landmarks = _landmarks_of(reader.path.parent, len(labels), order)
    write = write_face_records if shuffle is None else write_shuffled_records
    identity = _identity(reader.path.parent, [reader.path, reader.path.with_suffix(".idx")], "repack", shuffle)
    packed = _write(Path(out), images, labels[order], landmarks, size, num_workers, write, identity=identity)
    return packed._replace(left_out=len(labels) - packed.images)


def _landmarks_of(folder: Path, count: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Keypoints and scores from the landmark file of ``count`` images, if there is one, in another order."""
    if not (folder / LANDMARK_FILE).is_file():
        return None
    keypoints, scores = read_landmark_csv(folder / LANDMARK_FILE, count)
    return keypoints[order], None if scores is None else scores[order]


def _write(
    out: Path,
    images: Items,
    labels: np.ndarray,
    landmarks: tuple[np.ndarray, np.ndarray | None] | None,
    size: int,
    num_workers: int,
    write: Callable[..., int] = write_face_records,
    *,
    identity: str,
    name_of: Callable[[int], str] = str,
) -> Packed:
    """Write a set and read it back; an existing one made from the same images is left unchanged.

    Args:
        out: a new folder.
        images: whose items are (payload, whether it is unchanged), or what is wrong.
        labels: (N,) of the images; they are renumbered in the order in which they appear.
        landmarks: keypoints and perhaps scores of the images, where they are known.
        size: side of the images, pixels.
        num_workers: see :func:`_results`.
        write: of :mod:`.record_writer`.
        identity: tells what the set is made of, and how.
        name_of: label -> name of the person.
    """
    if (done := _made_before(out, identity)) is not None:
        logger.warning("%s already exists, made of the same images", out)
        return done
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a new folder, got {out}, which exists; remove it or choose another")
    kept: list[int] = []
    totals = Counter()
    numbers: dict[int, int] = {}

    def samples() -> Iterator[tuple[bytes, int]]:
        for i, result in enumerate(results(images, num_workers, "packing")):
            if isinstance(result, str):
                logger.warning("left out: %s", result)
                continue
            payload, unchanged = result
            kept.append(i)
            totals["unchanged"] += unchanged
            totals["crc"] = zlib.crc32(payload, totals["crc"])
            yield payload, numbers.setdefault(int(labels[i]), len(numbers))

    with atomic_folder(out) as folder:
        count = write(folder / "train", samples(), (size, size))
        identities = _verify(folder, count, totals["crc"])
        if landmarks is not None:
            keypoints, scores = landmarks
            write_landmark_csv(folder / LANDMARK_FILE, keypoints[kept], None if scores is None else scores[kept])
        packed = Packed(count, identities, len(images) - count, landmarks is not None, totals["unchanged"])
        (folder / _MARK).write_text(json.dumps({"of": identity, "packed": packed._asdict()}))
    without = sorted(set(labels.tolist()) - set(numbers))
    if without:
        names = ", ".join(map(name_of, without[:_NAMED])) + (", ..." if len(without) > _NAMED else "")
        logger.warning("no image of %d people could be read: %s", len(without), names)
    return packed


def _made_before(out: Path, identity: str) -> Packed | None:
    """The result of an earlier call with the same input, which may have been killed before it returned."""
    try:
        mark = read_json_object(out / _MARK)
        return Packed(**mark["packed"]) if mark["of"] == identity and (out / "train.rec").is_file() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _identity(folder: Path, files: Iterable[Path], *how: object) -> str:
    """Identifies what a set is made of: names, sizes and times of its files and landmarks, and the options."""
    described = [repr(how)]
    for file in (*files, folder / LANDMARK_FILE):
        if file.exists():
            status = file.stat()
            described.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
    return fingerprint("\n".join(described))


def _verify(folder: Path, count: int, checksum: int) -> int:
    """Read a set back, compare all payloads' checksum, and return the number of identities."""
    reader = RecordReader(folder)
    found = 0
    for key in tqdm(reader.image_keys.tolist(), desc="verifying", unit="img", disable=None):
        found = zlib.crc32(reader[key][1], found)
    if len(reader.image_keys) != count or found != checksum:
        raise RuntimeError(f"{reader.path} does not read back as it was written; is the disk full or failing?")
    return int(reader.labels().max()) + 1


def encode_crop(path: Path, size: int, quality: int = 95) -> tuple[bytes, bool]:
    """A picture file as a JPEG of ``size`` x ``size`` pixels, and whether that is the file itself, byte for byte.

    Raises:
        ValueError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        image = decode_image(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if data.startswith(b"\xff\xd8") and image.shape[:2] == (size, size):
        return data, True
    return encode_jpeg(fit_crop(image, size), quality), False


def _first_size(reader: RecordReader, keys: np.ndarray) -> int:
    """Height of the first image that can be read."""
    for key in map(int, keys):
        try:
            return reader.read_image(key)[1].shape[0]
        except RecordError as error:
            first = error
    raise RecordError(f"{reader.path} has no readable image; the first error: {first}")


def _copy_record(reader: RecordReader, keys: np.ndarray, index: int) -> tuple[bytes, bool]:
    key = int(keys[index])
    reader.read_image(key)  # its error names the unreadable record
    return reader[key][1], True
