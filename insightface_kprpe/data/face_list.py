"""The list of all faces that were found in photos, cut out or not: ``faces.csv``.

One row a face, and one for a photo without any. Columns:

======================  ================================================================================================
photo                   its path below the source, with slashes
bytes, time             size of the photo's file, and its last change in nanoseconds: what was looked at
crop                    path of the crop below the list's folder; empty where the face was not cut out
left_out                why it was not
with_border             1 where the detector found the face with a black border around the photo
score                   of the detector, in [0, 1]
x1 y1 x2 y2             its box, in pixels of the photo
px_0 ... px_9           its landmarks, in pixels of the photo: x and y of the left eye, and so on in the usual order
ldmk_0 ... ldmk_9       the same in [0, 1] of the crop
======================  ================================================================================================
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from ..files import read_text

FACE_LIST = "faces.csv"
_TEXTS = ("photo", "bytes", "time", "crop", "left_out", "with_border")
_NUMBERS = ("score", "x1", "y1", "x2", "y2", *(f"px_{i}" for i in range(10)), *(f"ldmk_{i}" for i in range(10)))
_COLUMNS = (*_TEXTS, *_NUMBERS)


class ListedFace(NamedTuple):
    """A row of the list.

    Attributes:
        photo: path below the source.
        stamp: size of the photo's file in bytes, and its last change in nanoseconds.
        crop: path below the list's folder; "" where the face was not cut out.
        left_out: why it was not; "" where it was.
        with_border: found with a border around the photo.
        score: in [0, 1]; NaN where there is no face, as in all that follows.
        box: (4,) x1, y1, x2, y2 in pixels of the photo.
        landmarks_px: (5, 2) in pixels of the photo.
        keypoints: (5, 2) in [0, 1] of the crop; NaN where there is no crop.
    """

    photo: str
    stamp: tuple[int, int]
    crop: str = ""
    left_out: str = ""
    with_border: bool = False
    score: float = float("nan")
    box: np.ndarray = np.full(4, np.nan)
    landmarks_px: np.ndarray = np.full((5, 2), np.nan)
    keypoints: np.ndarray = np.full((5, 2), np.nan)


def format_faces(faces: Iterable[ListedFace], header: bool = True) -> str:
    """The text of a list, or of a part of one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(_COLUMNS)
    for face in faces:
        numbers = [face.score, *face.box, *face.landmarks_px.reshape(-1), *face.keypoints.reshape(-1)]
        texts = [face.photo, *face.stamp, face.crop, " ".join(face.left_out.split()), int(face.with_border)]
        digits = (3,) * 15 + (6,) * 10
        digits = (6, *digits[1:])
        cells = ["" if np.isnan(n) else f"{n:.{places}f}" for n, places in zip(numbers, digits, strict=True)]
        writer.writerow([*texts, *cells])
    return text.getvalue()


def read_faces(path: str | Path) -> list[ListedFace]:
    """Read a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list; the line is named.
    """
    return parse_faces(read_text(path, "list of faces"), path)


def parse_faces(text: str, path: str | Path) -> list[ListedFace]:
    """The faces of a list's text; ``path`` is named in errors, see :func:`read_faces`."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    faces = []
    try:
        if (columns := tuple(next(lines, ()))) != _COLUMNS:
            raise ValueError(f"columns must be {','.join(_COLUMNS)}, got {','.join(columns):.120}")
        for cells in lines:
            faces.append(_face(cells))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: line {max(lines.line_num, 1)}: {error}") from error
    return faces


def faces_by_photo(faces: Iterable[ListedFace]) -> dict[str, list[ListedFace]]:
    """The rows of each photo, in their order."""
    by_photo = defaultdict(list)
    for face in faces:
        by_photo[face.photo].append(face)
    return dict(by_photo)


def _face(cells: list[str]) -> ListedFace:
    if len(cells) != len(_COLUMNS):
        raise ValueError(f"must have {len(_COLUMNS)} columns, got {len(cells)}")
    photo, size, time, crop, left_out, with_border = cells[: len(_TEXTS)]
    numbers = np.array([float(cell) if cell else np.nan for cell in cells[len(_TEXTS) :]])
    if np.isinf(numbers).any() or with_border not in ("0", "1") or bool(crop) == bool(left_out):
        raise ValueError("must have finite numbers, 0 or 1 for with_border, and either a crop or why it was left out")
    if not np.isnan(numbers[0]) and (np.isnan(numbers[1:15]).any() or not 0 <= numbers[0] <= 1):
        raise ValueError(f"a face must have a score in [0, 1], a box and landmarks, got score {numbers[0]:g}")
    box, landmarks_px, keypoints = numbers[1:5], numbers[5:15].reshape(5, 2), numbers[15:].reshape(5, 2)
    if ".." in PurePosixPath(crop).parts or crop.startswith("/") or "\\" in crop:
        raise ValueError(f"a crop must lie below the list's folder, got {crop!r:.80}")
    if crop and np.isnan(numbers).any():
        raise ValueError("a crop must have score, box, landmarks and keypoints")
    stamp = int(size), int(time)
    return ListedFace(photo, stamp, crop, left_out, with_border == "1", numbers[0], box, landmarks_px, keypoints)
