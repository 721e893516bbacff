"""Making training sets in InsightFace's RecordIO layout, from folders or from other record files, and looking at them.

A set is a folder with ``train.rec``, ``train.idx``, ``property`` and, where landmarks are known, ``ldmk_5points.csv``.
Its images are ordinary JPEG files, which have no channel order of their own: every program reads the right colours.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..files import atomic_folder, read_text
from .face_dataset import LANDMARK_FILE
from .image_codec import decode_image, encode_jpeg
from .landmark_csv import known_keypoints, read_landmark_csv, write_landmark_csv
from .picture_files import list_people
from .record_checks import check_index, find_contradictions
from .record_format import RecordError
from .record_writer import write_face_records, write_shuffled_records
from .recordio import RecordReader

logger = logging.getLogger(__name__)

_AT_ONCE = 64  # images that a worker hands over together
_QUANTISATION = b"\xff\xdb"  # the marker of a JPEG's quantisation tables


class Packed(NamedTuple):
    """What was written.

    Attributes:
        images: how many.
        identities: how many.
        left_out: images that could not be read, or had no identity.
        landmarks: whether there is a landmark file.
        unchanged: images whose JPEG file was taken over byte for byte; the others were encoded anew.
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
    """Pack a folder of people's folders of images, numbered in sorted order, and its ``ldmk_5points.csv``.

    A JPEG of the right size is taken over as it is; everything else is resized and encoded as JPEG. Images that cannot
    be read are left out with a warning each, their landmarks too.

    Args:
        folder: has one sub-folder of images a person.
        out: a new folder.
        size: side of the packed images, pixels.
        quality: of images that are encoded, 1 to 100.
        num_workers: processes that read and encode; 0: this one.

    Raises:
        ValueError: there are no images, the landmark file does not fit them, or ``out`` is not empty.
    """
    people = list_people(folder)
    if not people:
        raise ValueError(f"FOLDER must have one sub-folder of images a person, got {folder} without images")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be in 1 to 100, got {quality}")
    paths = [path for files in people.values() for path in files]
    labels = np.repeat(np.arange(len(people)), [len(files) for files in people.values()])
    images = _Items(len(paths), functools.partial(_encode_file, paths, size, quality))
    landmarks = _landmarks_of(Path(folder), len(paths), np.arange(len(paths)))
    return _write(Path(out), images, labels, landmarks, size, num_workers)


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
        ValueError: the source or its landmark file is damaged, or ``out`` is not empty.
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
    images = _Items(len(keys), functools.partial(_copy_record, reader, keys))
    size = _first_size(reader, keys)
    landmarks = _landmarks_of(reader.path.parent, len(labels), order)
    write = write_face_records if shuffle is None else write_shuffled_records
    packed = _write(Path(out), images, labels[order], landmarks, size, num_workers, write)
    return packed._replace(left_out=len(labels) - packed.images)


def _first_size(reader: RecordReader, keys: np.ndarray) -> int:
    """Height of the first image that can be read."""
    for key in map(int, keys):
        try:
            return reader.read_image(key)[1].shape[0]
        except RecordError as error:
            first = error
    raise RecordError(f"{reader.path} has no image that can be read; the last: {first}")


def inspect_records(path: str | Path, check: int | None = 1000, num_workers: int = 0) -> dict[str, Any]:
    """Look at a record file and what belongs to it.

    Args:
        path: a ``.rec`` file or a folder with ``train.rec``.
        check: how many images to decode, evenly spread; None: all.
        num_workers: processes that decode; 0: this one.

    Returns:
        Facts by name, for people to read; ``bad`` has the faults of all unreadable images that were met,
        ``contradictions`` what does not agree.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the index or a record's head is damaged.
    """
    reader = RecordReader(path)
    keys, labels = reader.image_keys, reader.labels()
    counts = np.unique(labels, return_counts=True)[1] if len(labels) else np.zeros(1, np.int64)
    whole = bool(len(labels)) and labels.min() == 0 and labels.max() + 1 == len(counts)
    properties = reader.path.with_name("property")
    shown = np.unique(np.linspace(0, len(keys) - 1, min(check or len(keys), len(keys))).round().astype(int))
    looks = _Items(len(shown), functools.partial(_look_at_record, reader, keys[shown]))
    results = list(_results(looks, num_workers, "images"))
    found = Counter(result for result in results if not isinstance(result, str))
    return {
        "file": str(reader.path),
        "index": "beside it" if reader.path.with_suffix(".idx").is_file() else "none; the file was scanned",
        "layout": "InsightFace, with record 0 and identity records" if _has_header(reader) else "images only (im2rec)",
        "images": len(keys),
        "identities": len(counts) if len(labels) else 0,
        "images an identity": f"{counts.min()} to {counts.max()}, median {np.median(counts):g}",
        "labels": ("0 to the last without gaps" if whole else "with gaps or negative; `rec repack` renumbers them")
        + ("" if (np.diff(labels) >= 0).all() else "; not in order"),
        "property file": _property(properties) if properties.is_file() else "none",
        "landmarks": _landmark_state(reader.path.with_name(LANDMARK_FILE), len(keys)),
        "decoded": len(shown),
        "formats": {_describe(look): count for look, count in found.most_common(8)},
        "contradictions": find_contradictions(reader, labels),
        "bad": [result for result in results if isinstance(result, str)],
    }


class _Items(Dataset):
    """``read(0)`` to ``read(count - 1)``; a ValueError or OSError becomes its text."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except (ValueError, OSError) as error:
            return str(error)


def _results(items: _Items, num_workers: int, label: str) -> Iterator[Any]:
    """All items in order, read ahead by worker processes, under a progress bar."""
    loader = DataLoader(items, _AT_ONCE, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(items), desc=label, unit="img", disable=None) as progress:
        for batch in loader:
            progress.update(len(batch))
            yield from batch


def _landmarks_of(folder: Path, count: int, order: np.ndarray) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Keypoints and scores from the landmark file of ``count`` images, if there is one, in another order."""
    if not (folder / LANDMARK_FILE).is_file():
        return None
    keypoints, scores = read_landmark_csv(folder / LANDMARK_FILE, count)
    return keypoints[order], None if scores is None else scores[order]


def _write(
    out: Path,
    images: _Items,
    labels: np.ndarray,
    landmarks: tuple[np.ndarray, np.ndarray | None] | None,
    size: int,
    num_workers: int,
    write: Callable[..., int] = write_face_records,
) -> Packed:
    """Write a set and read it back.

    Args:
        out: a new folder.
        images: whose items are (payload, whether it is unchanged), or what is wrong.
        labels: (N,) of the images; they are renumbered in the order in which they appear.
        landmarks: keypoints and perhaps scores of the images, where they are known.
        size: side of the images, pixels.
        num_workers: see :func:`_results`.
        write: of :mod:`.record_writer`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT must be a new folder, got {out}, which exists; remove it or name another")
    kept: list[int] = []
    totals = Counter()

    def samples() -> Iterator[tuple[bytes, int]]:
        numbers: dict[int, int] = {}
        for i, result in enumerate(_results(images, num_workers, "packing")):
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
    return Packed(count, identities, len(images) - count, landmarks is not None, totals["unchanged"])


def _verify(folder: Path, count: int, checksum: int) -> int:
    """Read a set back, compare all payloads' checksum, and return the number of identities."""
    reader = RecordReader(folder)
    found = 0
    for key in tqdm(reader.image_keys.tolist(), desc="verifying", unit="img", disable=None):
        found = zlib.crc32(reader[key][1], found)
    if len(reader.image_keys) != count or found != checksum:
        raise RuntimeError(f"{reader.path} does not read back as it was written; is the disk full or failing?")
    return int(reader.labels().max()) + 1


def _encode_file(paths: list[Path], size: int, quality: int, index: int) -> tuple[bytes, bool]:
    path = paths[index]
    data = path.read_bytes()
    try:
        image = decode_image(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if data.startswith(b"\xff\xd8") and image.shape[:2] == (size, size):
        return data, True
    if image.shape[:2] != (size, size):
        image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return encode_jpeg(image, quality), False


def _copy_record(reader: RecordReader, keys: np.ndarray, index: int) -> tuple[bytes, bool]:
    key = int(keys[index])
    reader.read_image(key)  # names the record of an image that cannot be read
    return reader[key][1], True


def _look_at_record(reader: RecordReader, keys: np.ndarray, index: int) -> tuple[int, int, int]:
    """Height, width and JPEG quality (0 where it is no JPEG)."""
    key = int(keys[index])
    height, width = reader.read_image(key)[1].shape[:2]
    return height, width, jpeg_quality(reader[key][1])


def _describe(look: tuple[int, int, int]) -> str:
    height, width, quality = look
    return f"{width}x{height} " + (f"JPEG of quality about {quality}" if quality else "not JPEG")


def jpeg_quality(data: bytes) -> int:
    """The quality on libjpeg's scale whose table for brightness is nearest to a JPEG's; 0 for other files."""
    weight = _table_weight(data)
    return 0 if weight is None else int(np.abs(_table_weights() - weight).argmin()) + 1


def _table_weight(data: bytes) -> int | None:
    """The sum of a JPEG's first quantisation table."""
    at = data.find(_QUANTISATION) + 4 if data.startswith(b"\xff\xd8") else 3
    table = data[at + 1 : at + 65]
    return sum(table) if at >= 4 and len(table) == 64 else None


@functools.lru_cache(maxsize=1)
def _table_weights() -> np.ndarray:
    """(100,) sums of the tables that libjpeg writes for the qualities 1 to 100."""
    blank = np.zeros((8, 8, 3), np.uint8)
    files = (cv2.imencode(".jpg", blank, [cv2.IMWRITE_JPEG_QUALITY, quality])[1] for quality in range(1, 101))
    return np.array([_table_weight(file.tobytes()) for file in files])


def _property(file: Path) -> str:
    try:
        return read_text(file).strip()
    except ValueError as error:
        return f"damaged: {error}"


def _has_header(reader: RecordReader) -> bool:
    return len(reader.image_keys) < len(reader)


def _landmark_state(path: Path, count: int) -> str:
    if not path.is_file():
        return f"none ({LANDMARK_FILE}); `insightface-kprpe landmarks` writes it"
    try:
        keypoints, scores = read_landmark_csv(path, count)
    except ValueError as error:
        return f"damaged: {error}"
    unknown = int((~known_keypoints(keypoints)).sum())
    said = f", {unknown} of them no landmarks of a face" if unknown else ""
    return f"{count} rows{said}" + ("" if scores is None else f" with scores, mean {scores.mean():.3f}")
