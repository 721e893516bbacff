"""The landmark file next to a set of crops: ``ldmk_5points.csv``.

Columns are ``idx, ldmk_0, ..., ldmk_9`` and, where the landmarks were predicted, ``score``. ``idx`` is the index of the
image in its set, from 0; ``ldmk_0, ldmk_1`` are x and y of the left eye, in [0, 1] of the crop, and so on, in the usual
order of the five points.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import numpy as np

from ..files import atomic_path, not_utf8, user_file
from ..geometry import CANONICAL_KEYPOINTS, KEYPOINT_LIMIT, MIRROR_ORDER, SCORE_THRESHOLD, known_landmarks

logger = logging.getLogger(__name__)

_COLUMNS = ["idx", *(f"ldmk_{i}" for i in range(10))]
_SCORE = "score"
_ROWS_AT_ONCE = 1 << 16
_KNOWN_AT_ONCE = 1 << 20
_LONGEST_LINE = 1 << 12  # bytes of the first line that are looked at


def read_landmark_csv(path: str | os.PathLike, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the landmarks of a set.

    Args:
        path: the file; its rows may be in any order.
        count: number of images in the set.

    Returns:
        Keypoints (count, 5, 2) float32, xy in [0, 1] of the crop, and scores (count,) float32 in [0, 1] or None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: columns are wrong, a row is malformed, not finite or in pixels, or there is not one row per image.
    """
    path = user_file(path, "landmark file")
    columns = [name.strip() for name in _first_line(path).split(",")]
    if columns not in (_COLUMNS, [*_COLUMNS, _SCORE]):
        expected = f"{','.join(_COLUMNS)} and perhaps {_SCORE}"
        raise ValueError(f"{path}: line 1: columns must be {expected}, got {','.join(columns):.120}")
    rows = _read_rows(path, columns)
    _check_indices(path, rows["idx"], count)
    _check_values(path, rows)
    keypoints = np.empty((count, 5, 2), np.float32)
    keypoints[rows["idx"]] = rows["xy"].reshape(-1, 5, 2)
    if _SCORE not in columns:
        return keypoints, None
    scores = np.empty(count, np.float32)
    scores[rows["idx"]] = rows["score"]
    return keypoints, scores


def read_keypoints(path: str | os.PathLike, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the landmarks of a set for use, with the template where there are none.

    There are none where a score is below ``SCORE_THRESHOLD``, or, with a warning, where the numbers are not those of a
    face (:func:`~insightface_kprpe.geometry.known_landmarks`).

    Args:
        path: see :func:`read_landmark_csv`, which also says what is raised.
        count: number of images in the set.

    Returns:
        (count, 5, 2) float32, xy in [0, 1] of the crop, and (count,) bool, where the template is used.
    """
    keypoints, scores = read_landmark_csv(path, count)
    absent = ~known_keypoints(keypoints)
    if absent.any():
        exchanged = known_keypoints(keypoints[absent][:, list(MIRROR_ORDER)]).sum()
        logger.warning(
            "%s: %d of %d rows are not landmarks of a face (first: idx %d); the canonical template is used instead%s",
            path,
            absent.sum(),
            count,
            absent.argmax(),
            f"; are left and right, as seen in the image, swapped in {exchanged} of them?" if exchanged else "",
        )
    if scores is not None:
        absent |= scores < SCORE_THRESHOLD
    keypoints[absent] = CANONICAL_KEYPOINTS
    return keypoints, absent


def known_keypoints(keypoints: np.ndarray) -> np.ndarray:
    """(N,) bool, where (N, 5, 2) keypoints are a face's; a few million at a time, as sets are large."""
    parts = (keypoints[start : start + _KNOWN_AT_ONCE] for start in range(0, len(keypoints), _KNOWN_AT_ONCE))
    return np.concatenate([np.empty(0, bool), *map(known_landmarks, parts)])


def write_landmark_csv(path: str | os.PathLike, keypoints: np.ndarray, scores: np.ndarray | None = None) -> None:
    """Write the landmarks of a set; an existing file is replaced only by a whole one.

    Args:
        path: usually ``ldmk_5points.csv`` next to the images.
        keypoints: (N, 5, 2) float, xy in [0, 1] of the crop.
        scores: (N,) float in [0, 1].

    Raises:
        ValueError: shapes differ from these, or a value is not finite or in pixels.
    """
    path, keypoints = Path(path), np.asarray(keypoints)
    count = len(keypoints)
    if keypoints.shape != (count, 5, 2) or (scores is not None and np.shape(scores) != (count,)):
        got = f"{keypoints.shape} and {None if scores is None else np.shape(scores)}"
        raise ValueError(f"keypoints must be (N, 5, 2) and scores (N,), got {got}")
    rows = np.empty(count, _row_type(scores is not None))
    rows["idx"], rows["xy"] = np.arange(count), keypoints.reshape(count, 10)
    if scores is not None:
        rows["score"] = scores
    _check_values(path, rows)
    columns = _COLUMNS if scores is None else [*_COLUMNS, _SCORE]
    template = "%d" + ",%.6f" * (len(columns) - 1) + "\n"
    with atomic_path(path) as temporary, open(temporary, "w", encoding="ascii", newline="\n") as file:
        file.write(",".join(columns) + "\n")
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            for index, xy, *score in rows[start : start + _ROWS_AT_ONCE].tolist():
                file.write(template % (index, *xy, *score))


def _row_type(scored: bool) -> np.dtype:
    fields = [("idx", np.int64), ("xy", np.float32, (10,))]
    return np.dtype([*fields, ("score", np.float32)] if scored else fields)


def _read_rows(path: Path, columns: list[str]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there are no rows is reported with their count
            warnings.simplefilter("error", DeprecationWarning)  # older NumPy would cut off fractions of idx
            kind = _row_type(_SCORE in columns)
            return np.loadtxt(path, kind, delimiter=",", skiprows=1, comments=None, ndmin=1, encoding="latin-1")
    except ValueError as error:
        raise ValueError(_row_fault(path, len(columns)) or f"{path}: not a landmark file: {error}") from error


def _first_line(path: Path) -> str:
    with open(path, "rb") as file:
        line = file.readline(_LONGEST_LINE)
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, line, error.start) from error


def _row_fault(path: Path, columns: int) -> str | None:
    """Describe the first line that is not an index and numbers."""
    with open(path, encoding="latin-1") as file:
        next(file)
        for number, line in enumerate(file, 2):
            index, *values = line.rstrip().split(",")
            try:
                int(index), [float(value) for value in values]
                complete = len(values) == columns - 1
            except ValueError:
                complete = False
            if not complete and line.strip():
                return f"{path}: line {number}: expected idx and {columns - 1} numbers, got {line.rstrip()[:120]!r}"
    return None


def _check_indices(path: Path, indices: np.ndarray, count: int) -> None:
    for row in np.flatnonzero((indices < 0) | (indices >= count))[:1]:
        where = f"{path}: line {row + 2}"
        raise ValueError(f"{where}: idx must be in 0..{count - 1}, the image's index in its set, got {indices[row]}")
    times = np.bincount(indices, minlength=count)
    for index in np.flatnonzero(times > 1)[:1]:
        lines = [int(row) + 2 for row in np.flatnonzero(indices == index)]
        raise ValueError(f"{path}: line {lines[1]}: idx {index} is already in line {lines[0]}")
    if len(indices) < count:
        missing = int(np.argmin(times))
        raise ValueError(f"{path}: must have rows for {count} images, got {len(indices)}; idx {missing} is missing")


def _check_values(path: Path, rows: np.ndarray) -> None:
    # Test for what is right, not for what is wrong, as comparisons with NaN are false.
    right = (np.abs(rows["xy"]) <= KEYPOINT_LIMIT).all(1)
    for row in np.flatnonzero(~right)[:1]:
        numbers = " ".join(f"{number:g}" for number in rows["xy"][row])
        raise ValueError(
            f"{path}: line {row + 2}: landmarks must be finite and in [0, 1] of the crop, or slightly outside, got "
            f"{numbers}; divide pixels by the crop's size"
        )
    if _SCORE in rows.dtype.names:
        right = (rows[_SCORE] >= 0) & (rows[_SCORE] <= 1)
        for row in np.flatnonzero(~right)[:1]:
            raise ValueError(f"{path}: line {row + 2}: score must be in [0, 1], got {rows[_SCORE][row]:g}")
