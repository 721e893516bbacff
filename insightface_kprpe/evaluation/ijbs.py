"""IJB-S: identification of people in surveillance video, closed set and open set, from plain CSV files.

The official protocol comes with pickled tables, which can run code when they are loaded and are therefore not read
here. Convert them once, on a machine where you trust them, to these files (UTF-8, comma-separated, one header line
each)::

    images.csv                          one line per image: a frame's face, or a still
        path,media,subject,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5,score
    surveillance_to_single/             one folder for each of the PROTOCOLS to run
        probe.csv                       one line for each media of each template
            template,subject,media
        gallery_G1.csv                  the same; one file per gallery, gallery_NAME.csv
        gallery_G2.csv

- ``path``: image file, relative to ``images.csv``.
- ``media``: whole number of the clip (one subject in one stretch of a video) or of the still. An image has one media;
  a template consists of whole medias, and a media may be in templates of any protocol, so that its images are embedded
  once. Images are weighted within their media, medias within their template (``fusion.pool_templates``).
- ``subject``: whole number of the person. A template's must match that of its images.
- ``x1`` ... ``y5``: left eye, right eye, nose, left and right mouth corner as seen in the image, pixels of the image.
- ``score``: of the face detector, 0 or more; 1 if there is none.

IJB-S has two galleries of different people, so that the probes of the one are the unknown people of the other; numbers
are given for each and as their mean. If a gallery holds all people, there is no open set, only ranks.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..files import user_file
from .fusion import pool_templates
from .ijb import identification_rates
from .metrics import to_numpy
from .search import Matches, search

PROTOCOLS = (
    "surveillance_to_single",
    "surveillance_to_booking",
    "multi_view",
    "surveillance_to_surveillance",
    "uav",
)
IMAGE_COLUMNS = ("path", "media", "subject", *(f"{axis}{n}" for n in range(1, 6) for axis in "xy"), "score")
LIST_COLUMNS = ("template", "subject", "media")
# Images pooled at once: 64 MB of 512 float32 numbers each.
IMAGES_AT_ONCE = 1 << 15


class TemplateList(NamedTuple):
    """Templates of a probe list or gallery, one row for each media of each."""

    templates: np.ndarray  # (R,) int64
    subjects: np.ndarray  # (R,) int64
    medias: np.ndarray  # (R,) int64


class Protocol(NamedTuple):
    """One of ``PROTOCOLS``."""

    probe: TemplateList
    galleries: dict[str, TemplateList]


class IJBSSet(NamedTuple):
    """Images and protocols."""

    paths: list[str]  # N image files, relative to the folder that was read
    landmarks_px: np.ndarray  # (N, 5, 2) float32, pixels of the image
    detector_scores: np.ndarray  # (N,) float32
    medias: np.ndarray  # (N,) int64
    subjects: np.ndarray  # (N,) int64
    protocols: dict[str, Protocol]


def identification(
    embeddings: np.ndarray,
    medias: np.ndarray,
    protocol: Protocol,
    weights: np.ndarray | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    fpirs: Sequence[float] = (0.01, 0.1),
) -> dict[str, dict[str, float]]:
    """1:N identification of probe templates in each gallery.

    Args:
        embeddings, medias, protocol, weights: as for ``search_protocol``.
        ranks: for rank-k, over the probes whose subject is in the gallery.
        fpirs: false positive identification rates.

    Returns:
        For each gallery, and for ``mean`` over them: fractions ``rank_1`` and so on, and ``tpir_at_fpir_0.01`` and so
        on unless some gallery holds the subjects of all probes.

    Raises:
        ValueError: as for ``search_protocol``, or a gallery holds no probe's subject.
    """
    matches = search_protocol(embeddings, medias, protocol, weights)
    is_open = all((found.rank == 0).any() for found in matches.values())
    return identification_rates(matches, ranks, fpirs if is_open else ())


def search_protocol(
    embeddings: np.ndarray, medias: np.ndarray, protocol: Protocol, weights: np.ndarray | None = None
) -> dict[str, Matches]:
    """Search the probe templates in each gallery.

    Args:
        embeddings: (N, D) float as the backbone gives them; may be a memory map, read a few rows at a time.
        medias: (N,) int, media of each image.
        protocol: who is searched where.
        weights: (N,) float from ``fusion``, multiplies each unit embedding. None uses raw embeddings, i.e. weights by
            their norm (Eq. 16).

    Returns:
        What was found, by gallery.

    Raises:
        ValueError: shapes do not fit, values are not finite, or a template has a media without images.
    """
    embeddings, medias = to_numpy(embeddings), to_numpy(medias)
    weights = None if weights is None else to_numpy(weights)
    if medias.shape != (len(embeddings),) or (weights is not None and np.shape(weights) != medias.shape):
        got = f"{medias.shape} and {None if weights is None else np.shape(weights)}"
        raise ValueError(f"medias and weights must be ({len(embeddings)},), one per embedding, got {got}")
    images = _Images(medias)
    probe, probe_subjects = _pool(embeddings, images, protocol.probe, "probe", weights)
    matches = {}
    for name, rows in protocol.galleries.items():
        gallery, subjects = _pool(embeddings, images, rows, f"gallery {name}", weights)
        matches[name] = search(probe, gallery, probe_subjects, subjects)
    return matches


class _Images:
    """Which images each media has."""

    def __init__(self, medias: np.ndarray) -> None:
        self.order = np.argsort(medias, kind="stable")
        self.medias, self.starts, self.counts = np.unique(medias[self.order], return_index=True, return_counts=True)

    def of(self, medias: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position of the first image of each of these medias in ``order``, and how many follow."""
        place = np.minimum(np.searchsorted(self.medias, medias), len(self.medias) - 1)
        unknown = np.unique(medias[self.medias[place] != medias])
        if len(unknown):
            shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise ValueError(f"{name} names medias that have no images ({len(unknown)}): {shown}")
        return self.starts[place], self.counts[place]


def _pool(
    embeddings: np.ndarray, images: _Images, rows: TemplateList, name: str, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(T, D) float32 unit embeddings of the templates of a list, and their (T,) subjects."""
    order = np.argsort(rows.templates, kind="stable")
    templates, first = np.unique(rows.templates[order], return_index=True)
    starts, counts = images.of(rows.medias[order], name)
    pooled = np.empty((len(templates), embeddings.shape[1]), dtype=np.float32)
    images_before = np.append(0, counts.cumsum())[np.append(first, len(order))]  # (T + 1,)
    begin = 0
    while begin < len(templates):  # as many templates as fit, at least one
        end = max(begin + 1, int(np.searchsorted(images_before, images_before[begin] + IMAGES_AT_ONCE, "right")) - 1)
        part = slice(first[begin], first[end] if end < len(first) else None)
        of_row = np.repeat(np.arange(len(order))[part], counts[part])
        within = np.arange(len(of_row)) - np.repeat(counts[part].cumsum() - counts[part], counts[part])
        chosen = images.order[starts[of_row] + within]
        of_template, of_media = rows.templates[order[of_row]], rows.medias[order[of_row]]
        block = np.asarray(embeddings[chosen])
        for row in np.flatnonzero(~np.isfinite(block).all(1))[:1]:
            raise ValueError(f"embeddings must be finite, got NaN or Inf for image {chosen[row]} ({name})")
        block_weights = None if weights is None else weights[chosen]
        pooled[begin:end], _ = pool_templates(block, of_template, of_media, block_weights)
        begin = end
    return pooled, rows.subjects[order[first]]


def read_ijbs(folder: str | Path) -> IJBSSet:
    """Read the images and the protocols of a folder in the format that this module describes.

    Args:
        folder: holds ``images.csv`` and a folder for each protocol.

    Raises:
        FileNotFoundError: a file is missing, or there is no protocol.
        ValueError: a line is malformed (file and line are named), a template has two subjects, a subject is not that of
            the images, or a media has no images.
    """
    folder = Path(folder)
    paths, numbers, ids = _read_images(folder / "images.csv")
    medias, subjects = ids.T
    subject_of_media = _one_subject(folder / "images.csv", medias, subjects, "media")
    protocols = {}
    for name in PROTOCOLS:
        if not (folder / name).is_dir():
            continue
        files = {file.stem.removeprefix("gallery_"): file for file in sorted((folder / name).glob("gallery_*.csv"))}
        if not files:
            raise FileNotFoundError(f"{folder / name} must hold gallery_NAME.csv, e.g. gallery_G1.csv, got none")
        probe = _read_list(folder / name / "probe.csv", subject_of_media)
        protocols[name] = Protocol(probe, {key: _read_list(file, subject_of_media) for key, file in files.items()})
        for key, rows in protocols[name].galleries.items():
            if not np.isin(probe.subjects, rows.subjects).any():
                raise ValueError(f"{files[key]} holds no subject of {folder / name / 'probe.csv'}")
    if not protocols:
        raise FileNotFoundError(
            f"{folder} must hold a folder for at least one protocol of {', '.join(PROTOCOLS)}; got none"
        )
    return IJBSSet(paths, numbers[:, :10].reshape(-1, 5, 2), numbers[:, 10], medias, subjects, protocols)


def _read_images(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Paths, (N, 11) float32 landmarks and score, (N, 2) int64 media and subject."""
    paths, numbers, ids = [], array("f"), array("q")
    for line, row in _rows(path, IMAGE_COLUMNS):
        try:
            ids.extend((int(row[1]), int(row[2])))
            values = array("f", map(float, row[3:]))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: line {line}: {error}") from error
        if not row[0] or not all(map(math.isfinite, values)) or values[10] < 0:
            raise ValueError(f"{path}: line {line}: expected a path, finite landmarks and a score of 0 or more")
        paths.append(row[0])
        numbers.extend(values)
    return paths, np.array(numbers).reshape(-1, 11), np.array(ids).reshape(-1, 2)


def _read_list(path: Path, subject_of_media: dict[int, int]) -> TemplateList:
    ids = array("q")
    for line, row in _rows(path, LIST_COLUMNS):
        try:
            template, subject, media = map(int, row)
            ids.extend((template, subject, media))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: line {line}: {error}") from error
        if media not in subject_of_media:
            raise ValueError(f"{path}: line {line}: media {media} has no images in images.csv")
        if subject_of_media[media] != subject:
            raise ValueError(
                f"{path}: line {line}: media {media} shows subject {subject_of_media[media]} in images.csv, "
                f"got {subject}"
            )
    rows = np.array(ids).reshape(-1, 3)
    _one_subject(path, rows[:, 0], rows[:, 1], "template")
    same_rows = np.unique(rows, axis=0)
    return TemplateList(*same_rows.T.copy())


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line below the header, which must name these columns."""
    with user_file(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            head = [name.strip() for name in next(reader, [])]
            if head != list(columns):
                raise ValueError(f"line 1: columns must be {','.join(columns)}, got {','.join(head):.120}")
            for row in tqdm(reader, desc=f"reading {path.name}", unit=" lines", leave=False, disable=None):
                if len(row) != len(columns):
                    raise ValueError(
                        f"line {reader.line_num}: expected {len(columns)} columns, got {len(row)}; is the file cut off?"
                    )
                yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: after line {reader.line_num}: not UTF-8; save the file as UTF-8") from error
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: {error}") from error
    if reader.line_num <= 1:
        raise ValueError(f"{path} must have lines below the header, got none; is the file cut off?")


def _one_subject(path: Path, ids: np.ndarray, subjects: np.ndarray, kind: str) -> dict[int, int]:
    """Subject of each media or template; an id whose lines disagree is an error that names the line."""
    known, first, place = np.unique(ids, return_index=True, return_inverse=True)
    for row in np.flatnonzero(subjects != subjects[first][place])[:1]:
        line, earlier = row + 2, first[place[row]] + 2
        raise ValueError(
            f"{path}: line {line}: {kind} {ids[row]} has subject {subjects[row]}, but {subjects[earlier - 2]} in line "
            f"{earlier}"
        )
    return dict(zip(known.tolist(), subjects[first].tolist(), strict=True))
