"""The protocol files of IJB-B and IJB-C in the layout of InsightFace's scripts: ``meta/`` next to ``loose_crop/``."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.picture_files import nfc
from ..files import read_text, user_file


class Subjects(NamedTuple):
    """Who the templates of a probe list or gallery are."""

    templates: np.ndarray  # (T,) int
    subjects: np.ndarray  # (T,) int


class IJBMeta(NamedTuple):
    """The protocol files of one IJB set."""

    names: list[str]  # N file names in loose_crop
    landmarks_px: np.ndarray  # (N, 5, 2) float32, pixels of the loose crop
    detector_scores: np.ndarray  # (N,) float32
    templates: np.ndarray  # (N,) int32
    medias: np.ndarray  # (N,) int32
    p1: np.ndarray  # (pairs,) int32, first template of each pair
    p2: np.ndarray  # (pairs,) int32, second template
    label: np.ndarray  # (pairs,) bool, the same person


class SubjectLists(NamedTuple):
    """The lists of 1:N.

    Attributes:
        probe: who is searched for; None if there is nothing to measure.
        galleries: name -> who is searched in.
        absent: what is missing for 1:N; empty if nothing is.
    """

    probe: Subjects | None
    galleries: dict[str, Subjects]
    absent: str = ""


def read_meta(folder: str | Path, target: str = "IJBC") -> IJBMeta:
    """Read the 1:1 protocol of IJB-B or IJB-C from InsightFace's ``meta`` files.

    Args:
        folder: the folder that holds ``meta`` and ``loose_crop`` (``--image-path`` of InsightFace's scripts).
        target: ``IJBC`` or ``IJBB``; the file names begin with it in lower case.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or malformed (file and line are named), or two files do not list the same
            images.
    """
    prefix = str(Path(folder) / "meta" / target.lower())
    media_path, image_path = Path(f"{prefix}_face_tid_mid.txt"), Path(f"{prefix}_name_5pts_score.txt")
    names, numbers = _read_table(image_path, 11, np.float32)
    media_names, ids = _read_table(media_path, 2, np.int32)
    if names != media_names:
        at = next((n for n, (a, b) in enumerate(zip(names, media_names, strict=False)) if a != b), None)
        where = f"{len(names)} and {len(media_names)} lines" if at is None else f"line {at + 1} differs"
        raise ValueError(f"{image_path} and {media_path} must list the same images in the same order: {where}")
    pair_path = Path(f"{prefix}_template_pair_label.txt")
    p1, p2, label = (np.ascontiguousarray(column) for column in _load(user_file(pair_path), None, 3, np.int32).T)
    if not ((label == 0) | (label == 1)).all():
        raise ValueError(f"{pair_path}: the third column must be 0 or 1; is the file cut off?")
    landmarks_px = numbers[:, :10].reshape(-1, 5, 2)
    return IJBMeta(names, landmarks_px, numbers[:, 10], ids[:, 0], ids[:, 1], p1, p2, label.astype(bool))


def read_subject_lists(folder: str | Path, target: str = "IJBC") -> SubjectLists:
    """Read the 1:N protocol, if its files are in ``meta``: ``ijbc_1N_probe_mixed.csv`` and ``ijbc_1N_gallery_*.csv``.

    Args:
        folder, target: as for ``read_meta``.

    Raises:
        ValueError: a file is malformed.
    """
    meta, prefix = Path(folder) / "meta", f"{target.lower()}_1N_"
    probe_path = meta / f"{prefix}probe_mixed.csv"
    paths = {path.stem.removeprefix(f"{prefix}gallery_"): path for path in sorted(meta.glob(f"{prefix}gallery_*.csv"))}
    if not paths and not probe_path.is_file():
        return SubjectLists(None, {}, f"no {probe_path.name} and {prefix}gallery_*.csv in {meta}")
    if not paths or not probe_path.is_file():
        return SubjectLists(None, {}, f"no {probe_path.name if paths else f'{prefix}gallery_*.csv'} in {meta}")
    return SubjectLists(read_subjects(probe_path), {name: read_subjects(path) for name, path in paths.items()})


def read_subjects(path: str | Path) -> Subjects:
    """Read a 1:N list, such as ``ijbc_1N_gallery_G1.csv`` or ``ijbc_1N_probe_mixed.csv``.

    The first two columns are template and subject, below a header line; lines of one template (one for each image) are
    merged.

    Raises:
        ValueError: a line is malformed, or a template has two subjects.
    """
    path = Path(path)
    lines = read_text(path).splitlines()[1:]
    rows = _load(path, "\n".join(",".join(line.split(",")[:2]) for line in lines), 2, np.int64, ",", first_line=2)
    rows = np.unique(rows, axis=0)
    twice = rows[1:, 0][rows[1:, 0] == rows[:-1, 0]]
    if len(twice):
        raise ValueError(f"{path}: template {twice[0]} has more than one subject")
    return Subjects(rows[:, 0], rows[:, 1])


def _read_table(path: Path, columns: int, dtype: type) -> tuple[list[str], np.ndarray]:
    """Lines of a file name, in composed Unicode, and then ``columns`` numbers."""
    parts = [line.split(maxsplit=1) for line in read_text(path).splitlines()]
    numbers = "\n".join(part[1] if len(part) == 2 else "x" if part else "" for part in parts)
    table = _load(path, numbers, columns, dtype)
    return [nfc(part[0]) for part in parts if part], table


def _load(
    path: Path, text: str | None, columns: int, dtype: type, delimiter: str | None = None, first_line: int = 1
) -> np.ndarray:
    """``np.loadtxt`` of finite numbers, whose errors name file and line.

    Args:
        path: the file.
        text: the numbers of it; None: the file as it is, which may have millions of lines.
        columns, dtype, delimiter: of the table.
        first_line: of ``text`` in the file.
    """
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there are no lines
        source = path if text is None else io.StringIO(text)
        table = np.loadtxt(source, dtype, comments=None, delimiter=delimiter, ndmin=2, encoding="utf-8-sig")
        if table.shape[1] == columns and len(table) and np.isfinite(table).all():
            return table
    text = read_text(path) if text is None else text
    line, got = _first_fault(text.splitlines(), columns, dtype, delimiter)
    raise ValueError(
        f"{path}: line {line + first_line}: must have {columns} numbers, got {got!r}; is the file cut off?"
    )


def _first_fault(lines: Iterable[str], columns: int, dtype: type, delimiter: str | None) -> tuple[int, str]:
    """Position and beginning of the first line that is not a row of the table; the end if there are no rows."""
    place = -1
    for place, line in enumerate(lines):
        try:
            row = [dtype(float(cell)) if dtype is np.float32 else dtype(int(cell)) for cell in line.split(delimiter)]
            if line.strip() and (len(row) != columns or not np.isfinite(row).all()):
                return place, line[:60]
        except (ValueError, OverflowError):
            return place, line[:60]
    return place + 1, ""
