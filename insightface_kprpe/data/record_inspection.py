"""Describes a record file for humans: counts, sizes, quality, landmarks, faults."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..files import read_text
from .face_dataset import LANDMARK_FILE
from .landmark_csv import known_keypoints, read_landmark_csv
from .reading import Items, results
from .record_checks import find_contradictions
from .recordio import RecordReader

_QUANTIZATION = b"\xff\xdb"  # the marker of a JPEG's quantization tables


def inspect_records(path: str | Path, check: int | None = 1000, num_workers: int = 0) -> dict[str, Any]:
    """Inspect a record file and what belongs to it.

    Args:
        path: a ``.rec`` file or a folder with ``train.rec``.
        check: how many images to decode, evenly spread; None: all.
        num_workers: processes that decode; 0: this one.

    Returns:
        Facts by name, as text; ``bad`` has the faults of all unreadable images found,
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
    looks = Items(len(shown), functools.partial(_look_at_record, reader, keys[shown]))
    looked = list(results(looks, num_workers, "images"))
    found = Counter(result for result in looked if not isinstance(result, str))
    return {
        "file": str(reader.path),
        "index": "next to it" if reader.path.with_suffix(".idx").is_file() else "none; the file was scanned",
        "layout": "InsightFace, with record 0 and identity records" if _has_header(reader) else "images only (im2rec)",
        "images": len(keys),
        "identities": len(counts) if len(labels) else 0,
        "images per identity": f"{counts.min()} to {counts.max()}, median {np.median(counts):g}",
        "labels": ("0 to the last without gaps" if whole else "with gaps or negative; `rec repack` renumbers them")
        + ("" if (np.diff(labels) >= 0).all() else "; not in order"),
        "property file": _property(properties) if properties.is_file() else "none",
        "landmarks": landmark_state(reader.path.with_name(LANDMARK_FILE), len(keys)),
        "decoded": len(shown),
        "formats": {describe_look(look): count for look, count in found.most_common(8)},
        "contradictions": find_contradictions(reader, labels),
        "bad": [result for result in looked if isinstance(result, str)],
    }


def _look_at_record(reader: RecordReader, keys: np.ndarray, index: int) -> tuple[int, int, int]:
    """Height, width and JPEG quality (0 where it is no JPEG)."""
    key = int(keys[index])
    height, width = reader.read_image(key)[1].shape[:2]
    return height, width, jpeg_quality(reader[key][1])


def describe_look(look: tuple[int, int, int]) -> str:
    """Height, width and JPEG quality (0: no JPEG) in words."""
    height, width, quality = look
    return f"{width}x{height} " + (f"JPEG of quality about {quality}" if quality else "not JPEG")


def jpeg_quality(data: bytes) -> int:
    """The quality on libjpeg's scale whose table for brightness is nearest to a JPEG's; 0 for other files."""
    weight = _table_weight(data)
    return 0 if weight is None else int(np.abs(_table_weights() - weight).argmin()) + 1


def _table_weight(data: bytes) -> int | None:
    """The sum of a JPEG's first quantization table."""
    at = data.find(_QUANTIZATION) + 4 if data.startswith(b"\xff\xd8") else 3
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


def landmark_state(path: Path, count: int) -> str:
    """What a landmark file for ``count`` images is worth, in words."""
    if not path.is_file():
        return f"none ({LANDMARK_FILE}); `insightface-kprpe landmarks` writes it"
    try:
        keypoints, scores = read_landmark_csv(path, count)
    except ValueError as error:
        return f"damaged: {error}"
    unknown = int((~known_keypoints(keypoints)).sum())
    note = f", {unknown} of them not landmarks of a face" if unknown else ""
    return f"{count} rows{note}" + ("" if scores is None else f" with scores, mean {scores.mean():.3f}")
