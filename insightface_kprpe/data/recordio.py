"""MXNet's RecordIO files, the format of InsightFace's training sets, without MXNet.

:mod:`.record_format` describes how records are stored. InsightFace adds meaning: record 0 has no image but the labels
``[N + 1, N + 1 + identities]``, images are records 1 to N, and after them one record per identity has the labels
``[first image, last image + 1]``. Files without a record 0 of this kind (written by im2rec) hold images only.
"""

from __future__ import annotations

import logging
import mmap
import os
import warnings
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..files import atomic_path, not_utf8, user_file
from ..npz import read_npz
from .image_codec import decode_image
from .record_format import (
    FIRST,
    HEADER,
    LAST,
    LENGTH_LIMIT,
    MAGIC,
    MAGIC_BYTES,
    MIDDLE,
    PART,
    WHOLE,
    RecordError,
    RecordHeader,
    decode_content,
    file_prefix,
)
from .record_writer import RecordWriter, write_face_records

__all__ = ["RecordError", "RecordHeader", "RecordReader", "RecordWriter", "write_face_records"]

logger = logging.getLogger(__name__)

_READ_AHEAD = 16 << 10  # bytes to ask the disk for at once: a 112x112 JPEG takes 4 to 10 KB
_LABELS_AT_ONCE = 1 << 20
_LABELS_KEPT_FROM = 1 << 20  # images, about 7 GB


class RecordReader:
    """A RecordIO file as a mapping from key to record.

    Reading goes through a read-only memory map and an index in NumPy arrays. No file position is shared, so one reader
    serves any number of threads and forked processes; pickling it (spawned workers) maps the file again. Every record
    is checked as it is read.

    Args:
        rec_or_prefix: ``dir/train.rec``, ``dir/train``, or a folder holding ``train.rec``. If the ``.idx`` is missing,
            the file is scanned, and its records get the keys 0, 1, 2, ... in order.

    Attributes:
        path: the ``.rec`` file.
        keys: (M,) int64, keys of all records in ascending order.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: the index or record 0 is damaged, or they do not belong to the file.
    """

    def __init__(self, rec_or_prefix: str | os.PathLike) -> None:
        prefix = file_prefix(rec_or_prefix)
        self.path, index_path = Path(f"{prefix}.rec"), Path(f"{prefix}.idx")
        user_file(self.path, "record file", "give a .rec file, its prefix, or a folder with train.rec")
        self._data = _map(self.path)
        if index_path.exists():
            self.keys, self._offsets = _read_index(index_path, self.path, len(self._data))
        else:
            logger.warning("%s not found: scanning %s for its records", index_path, self.path)
            self._offsets = self._scan()
            self.keys = np.arange(len(self._offsets), dtype=np.int64)
        self._images = self._find_images()
        _advise_random(self._data)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_data"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._data = _map(self.path)
        _advise_random(self._data)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[int]:
        return map(int, self.keys)

    def __getitem__(self, key: int) -> tuple[RecordHeader, bytes]:
        """One record as header and payload.

        Raises:
            KeyError: the index does not have the key.
            RecordError: the record is damaged.
        """
        offset = self._offset(key)
        if hasattr(self._data, "madvise"):
            self._data.madvise(mmap.MADV_WILLNEED, offset & -mmap.PAGESIZE, _READ_AHEAD)
        spans, _ = self._parts(key, offset)
        try:
            return decode_content(MAGIC_BYTES.join([self._data[start:stop] for start, stop in spans]))
        except ValueError as error:
            raise self._error(key, offset, str(error)) from error

    @property
    def image_keys(self) -> np.ndarray:
        """(N,) int64, the keys of the records that hold images, in ascending order."""
        return self.keys[self._images]

    def read_image(self, key: int) -> tuple[int, np.ndarray]:
        """Read and decode one image.

        Returns:
            Its label (the first one, where it has several) and the (H, W, 3) uint8 RGB image.

        Raises:
            KeyError: the index does not have the key.
            RecordError: the record is damaged, its payload is not a complete image, or its label no identity number.
        """
        header, payload = self[key]
        label = _first_label(header)
        try:
            if not _is_identity(label):
                raise ValueError(f"label {label} is not an identity number")
            return int(label), decode_image(payload)
        except ValueError as error:
            raise self._error(key, self._offset(key), str(error)) from error

    @property
    def identities(self) -> int | None:
        """The number of people according to record 0; None if there is no such record, or it does not say."""
        if not self._images.start:
            return None
        bounds = self[0][0].label
        return int(bounds[1] - bounds[0]) if len(bounds) == 2 and np.isfinite(bounds).all() else None

    def ids(self, keys: np.ndarray) -> np.ndarray:
        """(N,) int64, the ids that the records of (N,) keys claim; -1 where a record is damaged."""
        heads = self._offsets[np.searchsorted(self.keys, keys)] // 4
        words = np.frombuffer(self._data, "<u4", len(self._data) // 4)
        low, high = (words.take(heads + i, mode="clip").astype(np.int64) for i in (4, 5))
        return np.where((words.take(heads) == MAGIC) & (high < 1 << 31), high << 32 | low, -1)

    def first_ids(self, count: int) -> list[int]:
        """The ids that the first records, in file order, claim."""
        ids, offset = [], 0
        while offset < len(self._data) and len(ids) < count:
            try:
                spans, offset = self._parts(len(ids), offset)
            except RecordError:
                break
            content = self._data[slice(*spans[0])]
            if len(content) < HEADER.size:
                break
            ids.append(HEADER.unpack_from(content)[2])
        return ids

    def labels(self) -> np.ndarray:
        """Labels of all images, from their headers alone.

        That reads the whole file once: the labels of a large one are then cached next to it, as ``train.labels.npz``.

        Returns:
            (N,) int64 in the order of ``image_keys``.

        Raises:
            RecordError: a record is damaged, or its label is not an identity number.
        """
        keys, offsets = self.image_keys, self._offsets[self._images]
        if len(keys) >= _LABELS_KEPT_FROM and (kept := self._kept_labels()) is not None:
            return kept
        labels = np.empty(len(keys), np.float32)
        # A separate map: read-ahead helps in file order, but must be off for records in random order.
        words = np.frombuffer(_map(self.path), "<u4", len(self._data) // 4)
        for start in range(0, len(keys), _LABELS_AT_ONCE):
            part = slice(start, start + _LABELS_AT_ONCE)
            labels[part], certain = _labels_at(words, offsets[part] // 4)
            for i in start + np.flatnonzero(~certain):
                labels[i] = _first_label(self[keys[i]][0])
        for i in np.flatnonzero(~_is_identity(labels))[:1]:
            raise self._error(keys[i], offsets[i], f"label {labels[i]} is not an identity number")
        if len(keys) >= _LABELS_KEPT_FROM and int(os.environ.get("RANK", 0)) == 0:
            self._keep_labels(labels.astype(np.int32))
        return labels.astype(np.int64)

    def _kept_labels(self) -> np.ndarray | None:
        """(N,) int64 labels that an earlier reader left next to this very file, if it did."""
        try:
            kept = read_npz(self.path.with_suffix(".labels.npz"), ("labels", "of"))
        except (OSError, ValueError):
            return None
        fits = np.array_equal(kept["of"], self._identity()) and kept["labels"].shape == self.image_keys.shape
        return kept["labels"].astype(np.int64) if fits else None

    def _keep_labels(self, labels: np.ndarray) -> None:
        try:
            with atomic_path(self.path.with_suffix(".labels.npz")) as temporary, open(temporary, "wb") as file:
                np.savez(file, labels=labels, of=self._identity())
        except OSError as error:
            logger.info("could not cache the labels next to %s: %s", self.path, error)

    def _identity(self) -> np.ndarray:
        """Distinguishes this file from another, or an older one, of the same name: size and modification time."""
        status = self.path.stat()
        return np.array([status.st_size, status.st_mtime_ns])

    def _offset(self, key: int) -> int:
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key:
            raise KeyError(f"{self.path} has no record {key}")
        return int(self._offsets[at])

    def _error(self, key: int, offset: int, why: str) -> RecordError:
        return RecordError(f"{self.path}: record {key} at byte {offset}: {why}")

    def _parts(self, key: int, offset: int) -> tuple[list[tuple[int, int]], int]:
        """Where the parts of a record start and stop, and where the next record starts."""
        size, spans, kind = len(self._data), [], None
        while kind not in (WHOLE, LAST):
            start = offset + PART.size
            if start > size:
                raise self._error(key, offset, f"the file ends in the middle of the record ({size} bytes)")
            magic, word = PART.unpack_from(self._data, offset)
            if magic != MAGIC:
                raise self._error(key, offset, f"0x{magic:08x} found where a part must start with 0x{MAGIC:08x}")
            kind, stop = word >> 29, start + word % LENGTH_LIMIT
            if kind not in ((MIDDLE, LAST) if spans else (WHOLE, FIRST)):
                raise self._error(key, offset, f"part {len(spans)} of a record cannot be of kind {kind}")
            if stop > size:
                raise self._error(key, offset, f"the file ends {stop - size} bytes before the record does")
            spans.append((start, stop))
            offset = stop + -stop % 4
        if offset < size and self._data[offset : offset + 4] != MAGIC_BYTES:
            start = spans[0][0] - PART.size
            raise self._error(key, start, f"its length points to byte {offset}, where no record starts")
        return spans, offset

    def _scan(self) -> np.ndarray:
        """Offsets of all records in the file, found by walking from each to the next."""
        offsets, offset = array("q"), 0
        while offset < len(self._data):
            offsets.append(offset)
            _, offset = self._parts(len(offsets) - 1, offset)
        return np.array(offsets, dtype=np.int64)

    def _find_images(self) -> slice:
        """Which of the sorted keys are images."""
        if self.keys[0] != 0:
            return slice(0, len(self))
        header, payload = self[0]
        if header.flag != 2 or payload:
            return slice(0, len(self))
        bound = header.label[0]
        if not 1 <= bound < 2**40:
            raise self._error(0, self._offset(0), f"no identity record can have the key {bound}")
        end = _first_identity(bound, self._has_payload)
        stop = int(np.searchsorted(self.keys, end))
        if stop != end:
            why = f"it announces {end - 1} images, the index has {stop - 1}; delete a damaged .idx to do without"
            raise self._error(0, self._offset(0), why)
        if self._has_payload(end):
            why = (
                f"it announces {end - 1} images, but record {end} holds one more; the file was not assembled correctly"
            )
            raise self._error(0, self._offset(0), why)
        return slice(1, stop)

    def _has_payload(self, key: int) -> bool:
        try:
            return bool(self[key][1])
        except KeyError:
            return False


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise RecordError(f"{path}: the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _advise_random(data: mmap.mmap) -> None:
    """Turn off read-ahead, which for records in random order reads a hundred times more from disk than is used."""
    if hasattr(data, "madvise"):
        data.madvise(mmap.MADV_RANDOM)


def _read_index(path: Path, rec_path: Path, rec_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted keys and their byte offsets from a ``.idx`` file."""
    user_file(path, "index")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of an empty file, or fractions: older NumPy would cut them off
            table = np.loadtxt(path, dtype=np.int64, delimiter="\t", comments=None, ndmin=2, encoding="utf-8-sig")
        if table.shape[1] != 2:
            raise ValueError("lines without two columns")
    except (ValueError, UserWarning) as error:
        raise RecordError(_index_fault(path) or f"{path}: not an index of records: {error}") from error
    keys, offsets = table.T.copy()
    for row in np.flatnonzero((keys < 0) | (offsets < 0) | (offsets % 4 != 0) | (offsets + PART.size > rec_size))[:1]:
        raise RecordError(
            f"{path}: line {row + 1}: record {keys[row]} at byte {offsets[row]} cannot be in {rec_path} of {rec_size} "
            "bytes (records start at multiples of 4); the .rec is truncated, or the .idx belongs to another file"
        )
    if not (keys[1:] > keys[:-1]).all():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
        for row in np.flatnonzero(keys[1:] == keys[:-1])[:1]:
            raise RecordError(f"{path}: record {keys[row]} is listed twice, at bytes {offsets[row : row + 2].tolist()}")
    return keys, offsets


def _index_fault(path: Path) -> str | None:
    """Describe the first line of an index that is not two numbers, or its encoding."""
    number = 0
    with open(path, "rb") as file:
        start = file.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        return str(not_utf8(path, start, 0))
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields = line.rstrip().split("\t")
            if len(fields) != 2 or not all(field.isdecimal() for field in fields):
                return f"{path}: line {number}: expected key, tab, byte offset; got {line.rstrip()[:60]!r}"
    return None if number else f"{path}: the index is empty; delete it to have the .rec scanned"


def _first_label(header: RecordHeader) -> np.float32:
    return np.float32(header.label[0] if header.flag else header.label)


def _labels_at(words: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First labels of records.

    Args:
        words: (S,) uint32, a whole .rec file.
        heads: (N,) int64, at which word each record starts.

    Returns:
        (N,) float32 labels, and (N,) bool where they are certain: elsewhere the record is stored in parts or damaged.
    """
    magic, word, flag = (words.take(heads + i, mode="clip") for i in range(3))
    # After the part's head (2 words) and the flag stands the single label; an array of them follows the header (6).
    labels = words.view("<f4").take(heads + np.where(flag > 0, 8, 3), mode="clip")
    shortest = HEADER.size + 4 * flag.astype(np.int64)
    inside = heads * 4 + PART.size + word <= len(words) * 4
    return labels, (magic == MAGIC) & (word >> 29 == WHOLE) & (word >= shortest) & inside


def _is_identity(labels: np.ndarray) -> np.ndarray:
    """Where float32 labels are integers (negative ones too: some sets mark faces without an identity by -1)."""
    return (np.abs(labels) < 2**31) & (labels == np.trunc(labels))


def _first_identity(bound: np.float32, has_payload: Callable[[int], bool]) -> int:
    """The key after the last image, where record 0 says ``bound``.

    In sets of more than 2**24 images, a float32 cannot represent the number exactly. Of all keys that round to
    ``bound``, the first whose record has no payload is the one meant.
    """
    slack = int(np.spacing(np.float32(bound))) // 2
    candidates = range(int(bound) - slack, int(bound) + slack + 1)
    return next((key for key in candidates if not has_payload(key)), candidates[-1])
