"""Writing RecordIO files, and training sets in InsightFace's layout."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ..files import atomic_path, write_atomically
from .record_format import RecordHeader, encode_record, file_prefix

_LABEL_LIMIT = 1 << 24  # float32, the type of all labels, has every integer up to here


class RecordWriter:
    """Writes ``prefix.rec`` and ``prefix.idx``, byte for byte as MXNet does.

    Both are written under temporary names and appear on ``close()``. Use it as a context manager, so that an exception
    discards them.

    Args:
        prefix: path without suffix; ``dir/train.rec`` and a folder (for ``train`` in it) work too.
    """

    def __init__(self, prefix: str | os.PathLike) -> None:
        prefix = file_prefix(prefix)
        self._index_path = Path(f"{prefix}.idx")
        self._last_key, self._size = -1, 0
        # Exited in reverse order: files are closed first, then the records are published, and then their index.
        self._exit = ExitStack()
        index = self._exit.enter_context(atomic_path(self._index_path))
        records = self._exit.enter_context(atomic_path(f"{prefix}.rec"))
        self._index = self._exit.enter_context(index.open("w", encoding="ascii", newline="\n"))
        self._records = self._exit.enter_context(records.open("wb"))

    def write(self, key: int, header: RecordHeader, payload: bytes) -> None:
        """Append a record.

        Args:
            key: not negative, and greater than the key before.
            header: label(s) and ids.
            payload: any bytes, usually a compressed image.

        Raises:
            ValueError: the key is not greater, the labels are empty, or the record is too long (512 MiB).
        """
        if key <= self._last_key:
            raise ValueError(f"key must be greater than the one before ({self._last_key}), got {key}")
        record = encode_record(header, payload)
        self._index.write(f"{key}\t{self._size}\n")
        self._records.write(record)
        self._last_key, self._size = key, self._size + len(record)

    def close(self) -> None:
        """Publish what was written."""
        if self._records.closed:
            return
        for file in (self._records, self._index):
            file.flush()
            os.fsync(file.fileno())
        # An index of older records must never be next to the new ones; readers can do without one.
        self._index_path.unlink(missing_ok=True)
        self._exit.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exception) -> None:
        if exception[0] is None:
            self.close()
        else:
            self._exit.__exit__(*exception)

    def _replace_first(self, header: RecordHeader) -> None:
        """Write the first record again, which must have been written without payload and with as many labels."""
        self._records.seek(0)
        self._records.write(encode_record(header, b""))
        self._records.seek(0, os.SEEK_END)


def write_face_records(
    prefix: str | os.PathLike, samples: Iterable[tuple[bytes, int]], size: tuple[int, int] = (112, 112)
) -> int:
    """Write a training set in InsightFace's layout: ``prefix.rec``, ``prefix.idx`` and ``property`` next to them.

    Args:
        prefix: usually ``dir/train``.
        samples: compressed image and label of each face; all faces of an identity consecutively, identities in
            ascending order from 0 without gaps.
        size: height and width of the images in pixels, for the ``property`` file.

    Returns:
        The number of images.

    Raises:
        ValueError: there are no samples, an image is empty, or the labels are not in this order; nothing is written
            then.
    """
    first_keys: list[int] = []  # of each identity
    end = 1
    with RecordWriter(prefix) as writer:
        writer.write(0, RecordHeader(np.zeros(2)), b"")  # placeholder until the numbers are known
        for payload, label in samples:
            if label == len(first_keys) < _LABEL_LIMIT:
                first_keys.append(end)
            elif not first_keys or label != len(first_keys) - 1:
                raise ValueError(
                    f"labels must start at 0, increase in steps of 1 and stay below {_LABEL_LIMIT}; sample {end - 1} "
                    "has "
                    f"{label} after {len(first_keys) - 1}"
                )
            if not payload:
                raise ValueError(f"sample {end - 1} must be a compressed image, got no bytes")
            writer.write(end, RecordHeader(label, end), payload)
            end += 1
        if not first_keys:
            raise ValueError("samples must have at least one image, got none")
        for key, bounds in enumerate(zip(first_keys, [*first_keys[1:], end], strict=True), end):
            writer.write(key, RecordHeader(np.array(bounds), key), b"")
        writer._replace_first(RecordHeader(np.array([end, end + len(first_keys)])))
    _write_property(prefix, len(first_keys), size)
    return end - 1


def write_shuffled_records(
    prefix: str | os.PathLike, samples: Iterable[tuple[bytes, int]], size: tuple[int, int] = (112, 112)
) -> int:
    """Write images in any order: records 0, 1, ... with one label each, and nothing next to them but ``property``.

    Args:
        prefix, size: as for :func:`write_face_records`.
        samples: compressed image and label of each face.

    Returns:
        The number of images.

    Raises:
        ValueError: there are no samples; nothing is written then.
    """
    count = identities = 0
    with RecordWriter(prefix) as writer:
        for payload, label in samples:
            writer.write(count, RecordHeader(label, count), payload)
            count, identities = count + 1, max(identities, label + 1)
        if not count:
            raise ValueError("samples must have at least one image, got none")
    _write_property(prefix, identities, size)
    return count


def _write_property(prefix: str | os.PathLike, identities: int, size: tuple[int, int]) -> None:
    write_atomically(file_prefix(prefix).with_name("property"), f"{identities},{size[0]},{size[1]}".encode())
