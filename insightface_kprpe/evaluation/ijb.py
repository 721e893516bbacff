"""IJB-B and IJB-C: template verification (1:1), template identification (1:N), and InsightFace's file layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .fusion import pool_templates
from .metrics import Matches, rank_k, tpir_at_fpir, tpr_at_fpr
from .search import search

FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SCORE_BLOCK_BYTES = 1 << 26
# One pair costs about as much time as this many entries of a matrix product over the same templates.
PRODUCT_ENTRIES_PER_PAIR = 64
# Template numbers within such a range are looked up in a table, others searched (ten times slower).
LOOKUP_SPAN = 1 << 24


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


def verification_scores(
    embeddings: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    p1: np.ndarray,
    p2: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Cosine of each pair of templates; arguments and errors are those of ``verification``.

    Returns:
        (pairs,) float64.
    """
    pooled, known = pool_templates(embeddings, templates, medias, weights)
    first, second = _positions(known, p1, "p1"), _positions(known, p2, "p2")
    if first.shape != second.shape or not len(first):
        raise ValueError(f"p1 and p2 must have one length above 0, got {len(first)} and {len(second)}")
    return _pair_scores(pooled, first, second)


def verification(
    embeddings: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    p1: np.ndarray,
    p2: np.ndarray,
    label: np.ndarray,
    weights: np.ndarray | None = None,
    fprs: Sequence[float] = FPRS,
) -> dict[str, float]:
    """1:1 verification of templates as InsightFace's IJB scripts measure it.

    Args:
        embeddings: (N, D) float as the backbone gives them (with flip test: the sum of both); may be a memory map.
        templates: (N,) int, template of each image.
        medias: (N,) int, media of each image.
        p1: (pairs,) int, first template of each pair.
        p2: (pairs,) int, second template.
        label: (pairs,) bool or 0/1, the same person.
        weights: (N,) float from ``fusion``, multiplies each unit embedding. None leaves embeddings as they are, so that
            they weigh by their length (Eq. 16).
        fprs: false positive rates, fractions.

    Returns:
        ``tpr_at_fpr_1e-06`` in percent and ``thresh_at_fpr_1e-06`` as a cosine, and so on for each rate, at the point
        of the ROC that InsightFace takes (``metrics.tpr_at_fpr`` with ``rule="insightface"``).

    Raises:
        ValueError: shapes do not fit, values are not finite, a pair names a template without images, or pairs are of
            one kind only.
    """
    scores = verification_scores(embeddings, templates, medias, p1, p2, weights)
    result = {}
    for point in tpr_at_fpr(scores, label, fprs, rule="insightface"):
        result[f"tpr_at_fpr_{point.target}"] = point.tpr
        result[f"thresh_at_fpr_{point.target}"] = point.threshold
    return result


def identification(
    embeddings: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    probe: Subjects,
    galleries: Mapping[str, Subjects],
    weights: np.ndarray | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    fpirs: Sequence[float] = (0.01, 0.1),
) -> dict[str, dict[str, float]]:
    """1:N identification of probe templates in each gallery, closed set and open set.

    Args:
        embeddings, templates, medias, weights: as for ``verification``.
        probe: templates to identify and who they are.
        galleries: name -> templates to search in and who they are. IJB has two galleries of different people, so that
            the probes of the one are the unknown people of the other.
        ranks: for rank-k, over the probes whose subject is in the gallery.
        fpirs: false positive identification rates, fractions.

    Returns:
        For each gallery, and for ``mean`` over them: ``rank_1`` and so on, ``tpir_at_fpir_0.01`` and so on, percent.

    Raises:
        ValueError: as for ``verification``, and where a gallery holds no probe's subject or all of them.
    """
    pooled, known = pool_templates(embeddings, templates, medias, weights)
    probe_embeddings = pooled[_positions(known, probe.templates, "probe")]
    matches = {}
    for name, gallery in galleries.items():
        gallery_embeddings = pooled[_positions(known, gallery.templates, f"gallery {name}")]
        matches[name] = search(probe_embeddings, gallery_embeddings, probe.subjects, gallery.subjects)
    return identification_rates(matches, ranks, fpirs)


def identification_rates(
    matches: Mapping[str, Matches], ranks: Sequence[int] = (1, 5, 10), fpirs: Sequence[float] = (0.01, 0.1)
) -> dict[str, dict[str, float]]:
    """The numbers of 1:N identification, for each gallery and as ``mean`` over them.

    Args:
        matches: gallery -> what ``search`` found there.
        ranks: for rank-k, over the probes whose subject is in the gallery.
        fpirs: false positive identification rates, fractions; none for closed sets, where all subjects are in.

    Returns:
        As ``identification``.

    Raises:
        ValueError: a gallery holds no probe's subject; or all of them, and there are ``fpirs``.
    """
    results = {}
    for name, found in matches.items():
        results[name] = {f"rank_{rank}": value for rank, value in rank_k(found, ranks).items()}
        points = tpir_at_fpir(found, fpirs) if fpirs else []
        results[name] |= {f"tpir_at_fpir_{point.target}": point.tpr for point in points}
    keys = next(iter(results.values()))
    return results | {"mean": {key: float(np.mean([result[key] for result in results.values()])) for key in keys}}


def _positions(known: np.ndarray, wanted: np.ndarray, name: str) -> np.ndarray:
    """Where each wanted template stands among the known ones (ascending), in the smallest type that holds it."""
    wanted = np.asarray(wanted)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
        raise ValueError(f"{name} must be a list of template numbers, got {wanted.dtype} of shape {wanted.shape}")
    smallest = np.min_scalar_type(len(known))
    offset = wanted.astype(np.int64) - int(known[0])
    span = int(known[-1]) - int(known[0]) + 1
    if span <= LOOKUP_SPAN:
        table = np.full(span + 1, len(known), dtype=smallest)  # the last entry stands for everything outside
        table[known - known[0]] = np.arange(len(known))
        offset[(offset < 0) | (offset >= span)] = span
        position = table[offset]
        unknown = position == len(known)
    else:
        position = np.minimum(np.searchsorted(known, wanted), len(known) - 1).astype(smallest)
        unknown = known[position] != wanted
    if unknown.any():
        missing = np.unique(wanted[unknown])
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{name} names templates that have no images ({len(missing)}): {shown}")
    return position


def _pair_scores(pooled: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dot products of pairs of rows, read from blocks of the matrix of all rows with all rows.

    Templates of the side with fewer different ones come first and each pair is turned so that its earlier template
    gives the row. Where galleries meet probes only the galleries' rows are computed; otherwise half the matrix is.
    The arguments are overwritten.
    """
    used = [np.bincount(side, minlength=len(pooled)) > 0 for side in (first, second)]
    lead, other = sorted(used, key=np.count_nonzero)
    order = np.concatenate([np.flatnonzero(lead), np.flatnonzero(other & ~lead)])
    pooled[: len(order)] = pooled[order]
    pooled = pooled[: len(order)]
    rank = np.empty(len(lead), dtype=first.dtype)
    rank[order] = np.arange(len(order))
    rank.take(first, out=first)
    rank.take(second, out=second)
    turned = np.flatnonzero(first > second)
    first[turned], second[turned] = second[turned], first[turned]

    step = min(len(pooled), max(64, SCORE_BLOCK_BYTES // (8 * len(pooled)), len(pooled) >> 15))
    starts = np.arange(0, len(pooled), step)
    block = (first // step).astype(np.uint16)  # few bits: sorted by radix, in linear time
    pairs = np.argsort(block, kind="stable")
    ends = np.searchsorted(block, np.arange(len(starts)), side="right", sorter=pairs)
    pairs = pairs.astype(np.min_scalar_type(len(pairs)))  # half the memory
    buffer = np.empty(step * len(pooled))  # one for all blocks: fresh memory would cost more time than the product
    scores = np.empty(len(first))
    for start, begin, end in zip(starts, np.append(0, ends), ends, strict=False):
        chosen = pairs[begin:end]
        if not len(chosen):
            continue
        rows, columns = first[chosen].astype(np.intp) - start, second[chosen].astype(np.intp) - start
        height, width = int(rows.max()) + 1, len(pooled) - start
        if height * width <= PRODUCT_ENTRIES_PER_PAIR * len(chosen):
            product = buffer[: height * width].reshape(height, width)
            np.matmul(pooled[start : start + height], pooled[start:].T, out=product)
            scores[chosen] = buffer.take(rows * width + columns)
        else:
            for part in range(0, len(chosen), 8192):
                take = slice(part, part + 8192)
                a, b = pooled[start + rows[take]], pooled[start + columns[take]]
                scores[chosen[take]] = np.einsum("pd,pd->p", a, b)
    return scores


def read_meta(folder: str | Path, target: str = "IJBC") -> IJBMeta:
    """Read the 1:1 protocol of IJB-B or IJB-C from InsightFace's ``meta`` files.

    Args:
        folder: the folder that holds ``meta`` and ``loose_crop`` (``--image-path`` of InsightFace's scripts).
        target: ``IJBC`` or ``IJBB``; the file names begin with it in lower case.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut off or malformed, or two files do not list the same images.
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
    pairs = _load(pair_path, pair_path, 3, np.int32)
    p1, p2, label = (np.ascontiguousarray(column) for column in pairs.T)
    if not ((label == 0) | (label == 1)).all():
        raise ValueError(f"{pair_path}: the third column must be 0 or 1; is the file cut off?")
    landmarks_px = numbers[:, :10].reshape(-1, 5, 2)
    return IJBMeta(names, landmarks_px, numbers[:, 10], ids[:, 0], ids[:, 1], p1, p2, label.astype(bool))


def read_subjects(path: str | Path) -> Subjects:
    """Read a 1:N list, such as ``ijbc_1N_gallery_G1.csv`` or ``ijbc_1N_probe_mixed.csv``.

    The first two columns are template and subject, below a header line; lines of one template (one for each image) are
    merged.

    Raises:
        ValueError: a line is malformed, or a template has two subjects.
    """
    path = Path(path)
    with path.open(encoding="utf-8") as file:
        next(file, None)
        rows = _load(path, (",".join(line.split(",")[:2]) for line in file), 2, np.int64, delimiter=",")
    rows = np.unique(rows, axis=0)
    twice = rows[1:, 0][rows[1:, 0] == rows[:-1, 0]]
    if len(twice):
        raise ValueError(f"{path}: template {twice[0]} has more than one subject")
    return Subjects(rows[:, 0], rows[:, 1])


def _read_table(path: Path, columns: int, dtype: type) -> tuple[list[str], np.ndarray]:
    """Lines of a file name and then ``columns`` numbers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    parts = [line.split(maxsplit=1) for line in lines if line.strip()]
    return [part[0] for part in parts], _load(path, (" ".join(part[1:]) for part in parts), columns, dtype)


def _load(
    path: Path, lines: Path | Iterable[str], columns: int, dtype: type, delimiter: str | None = None
) -> np.ndarray:
    """``np.loadtxt`` whose errors name the file."""
    try:
        table = np.loadtxt(lines, dtype=dtype, ndmin=2, delimiter=delimiter)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; is the file cut off?") from error
    if table.shape[1] != columns or not len(table):
        raise ValueError(f"{path} must have {columns} numbers in each line, got a table of {table.shape}")
    return table
