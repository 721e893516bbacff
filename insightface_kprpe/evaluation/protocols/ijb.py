"""IJB-B and IJB-C."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...data.verification_pairs import check_kinds
from ...fingerprint import fingerprint
from ...inference.embedding import Embeddings, EmbedOptions, embed_faces
from ...inference.images import AlignedFiles
from ...inference.models import Embedder
from .. import ijb
from ..curves import roc_points
from ..hardest import write_hardest_pairs
from ..ijb_meta import SubjectLists, read_subject_lists
from ..metrics import tpr_at_fpr
from ..pair_scores import positions
from ..result import Result
from .common import CMC_RANKS, common_settings, metrics_of, reports, unreached
from .templates import ALIGNED, gallery_results, ranked_result, readable, weights_of

logger = logging.getLogger(__name__)

INSIGHTFACE_1N = (
    "InsightFace's ijb_1n.py: all galleries merged; FAR: false alarms per probe; the threshold is the "
    "ceil(FAR x probes)-th highest score of different people; scores above it are accepted, at any rank"
)
NIST_1N = (
    "NIST's: each gallery on its own, probes of the other are unknown people; FPIR: fraction of these that raise an "
    "alarm; rank 1 and at or above the threshold; mean of the galleries"
)


class _Images(NamedTuple):
    """The readable images of a set, and the lists without entries that have no image left."""

    embeddings: np.ndarray  # (N, D)
    templates: np.ndarray  # (N,)
    medias: np.ndarray  # (N,)
    places: np.ndarray  # (N,) of the images in the set
    p1: np.ndarray  # (pairs,)
    p2: np.ndarray  # (pairs,)
    label: np.ndarray  # (pairs,) bool
    lists: SubjectLists
    pairs_left_out: int


def run_ijb(
    embed: Embedder,
    folder: str | Path,
    target: str,
    fusions: Sequence[str],
    options: EmbedOptions,
    sheets: Path | None = None,
) -> list[Result]:
    """IJB-B or IJB-C in InsightFace's layout: 1:1, and 1:N if its lists are in ``meta``.

    Args:
        embed: the model.
        folder: holds ``meta`` and ``loose_crop``.
        target: ``IJBB`` or ``IJBC``.
        fusions: of ``fusion.FUSION_METHODS``.
        options: how to embed. If images are skipped, so are templates without any left, and their pairs.
        sheets: folder for an image of the hardest pairs by the first fusion; one image stands for each template.

    Returns:
        For each fusion one result of 1:1, one of 1:N as InsightFace measures it, and those of 1:N as NIST does, for
        each gallery and their mean; none on other ranks.

    Raises:
        ValueError: a file is malformed, or an image cannot be read.
    """
    folder, meta = Path(folder), ijb.read_meta(folder, target)
    lists = read_subject_lists(folder, target)
    _check(meta, lists)
    if lists.absent:
        logger.warning("skipping 1:N: %s", lists.absent)
    crops = AlignedFiles([folder / "loose_crop" / name for name in meta.names], meta.landmarks_px)
    source = fingerprint("\n".join(meta.names), meta.landmarks_px)
    found = embed_faces(embed, crops, crops.keypoints, options, name=target.lower(), source=source, files=crops.paths)
    if not reports(options):
        return []
    images = _readable(found, meta, lists)
    settings = {
        **common_settings(embed, options, found, "the set's landmarks, in the aligned crop", meta.names),
        "alignment": ALIGNED,
    }
    name, results = f"IJB-{target[-1]}", []
    for fusion in fusions:
        weights, how = weights_of(fusion, found, crops.keypoints, meta.detector_scores)
        blank = Result(embed.name, name, {}, settings | {"fusion": how}, fusion)
        scores = ijb.verification_scores(
            images.embeddings, images.templates, images.medias, images.p1, images.p2, weights
        )
        if sheets is not None and fusion == fusions[0]:
            file = sheets / f"hardest_{embed.name}_{target.lower()}.png"
            write_hardest_pairs(file, crops, _stand_ins(images), scores, images.label)
        results.append(_verified(blank, scores, images))
        try:
            results += _identified(blank, weights, images)
        except ValueError as error:  # of lists emptied by skipped images; 1:1 remains
            logger.warning("%s, %s: 1:N could not be measured: %s", embed.name, fusion, error)
    return results


def _check(meta: ijb.IJBMeta, lists: SubjectLists) -> None:
    """Raise before hours of embedding what would be an error afterwards."""
    known = np.unique(meta.templates)
    for name, templates in (("p1", meta.p1), ("p2", meta.p2)):
        positions(known, templates, name)
    check_kinds(meta.label, 1)
    if lists.probe is None:
        return
    positions(known, lists.probe.templates, "probe")
    for name, gallery in lists.galleries.items():
        positions(known, gallery.templates, f"gallery {name}")
        if not np.isin(lists.probe.subjects, gallery.subjects).any():
            raise ValueError(f"gallery {name} holds none of the probes' subjects; are the lists from the same set?")


def _readable(found: Embeddings, meta: ijb.IJBMeta, lists: SubjectLists) -> _Images:
    kept = found.readable
    templates, medias = meta.templates[kept], meta.medias[kept]
    lost = np.setdiff1d(meta.templates, templates)
    # A pair with a template that the set never had is still an error.
    known = ~(np.isin(meta.p1, lost) | np.isin(meta.p2, lost)) if len(lost) else slice(None)
    p1, p2, label = (column[known] for column in (meta.p1, meta.p2, meta.label))
    if len(lost) and lists.probe is not None:
        probe, *galleries = (
            ijb.Subjects(*(column[~np.isin(rows.templates, lost)] for column in rows))
            for rows in (lists.probe, *lists.galleries.values())
        )
        lists = SubjectLists(probe, dict(zip(lists.galleries, galleries, strict=True)))
    left_out = len(meta.label) - len(label)
    return _Images(readable(found), templates, medias, np.flatnonzero(kept), p1, p2, label, lists, left_out)


def _verified(blank: Result, scores: np.ndarray, images: _Images) -> Result:
    """1:1."""
    points = tpr_at_fpr(scores, images.label, ijb.FPRS, rule="insightface")
    settings = {
        **blank.settings,
        "pairs": f"{len(images.label)}, {int(images.label.sum())} of them of the same person",
        "templates": len(np.unique(images.templates)),
        "threshold rule": "the point of the ROC nearest to the FPR, as in InsightFace's IJB scripts",
        **unreached(points),
    }
    if images.pairs_left_out:
        settings["pairs left out"] = f"{images.pairs_left_out}: a template has no image left"
    if images.lists.absent:
        settings["1:N"] = f"not measured: {images.lists.absent}"
    curve = roc_points(scores, images.label)
    return Result(blank.model, f"{blank.protocol} 1:1", metrics_of(points), settings, blank.variant, roc=curve)


def _identified(blank: Result, weights: np.ndarray, images: _Images) -> list[Result]:
    """1:N in both versions; none without lists."""
    if images.lists.probe is None:
        return []
    probe, galleries = images.lists.probe, images.lists.galleries
    arguments: dict[str, Any] = {"weights": weights, "ranks": range(1, CMC_RANKS + 1)}
    pooled = images.embeddings, images.templates, images.medias, probe, galleries
    sizes = {key: len(gallery.templates) for key, gallery in galleries.items()}
    mates = int(np.isin(probe.subjects, np.concatenate([gallery.subjects for gallery in galleries.values()])).sum())

    def form(name: str, rule: str) -> Result:
        settings = {**blank.settings, "1:N rule": rule}
        return Result(blank.model, f"{blank.protocol} 1:N, {name}", {}, settings, blank.variant)

    counts = {"probes": mates, "gallery": sum(sizes.values())}
    joined = ranked_result(form("InsightFace", INSIGHTFACE_1N), ijb.identification(*pooled, **arguments), counts)
    # If a gallery holds everybody, there is no unknown person, and no open set.
    is_open = all(not np.isin(probe.subjects, gallery.subjects).all() for gallery in galleries.values())
    nist = ijb.nist_identification(*pooled, **arguments, **({} if is_open else {"fpirs": ()}))
    return [joined, *gallery_results(form("NIST", NIST_1N), nist, sizes, len(probe.templates))]


def _stand_ins(images: _Images) -> np.ndarray:
    """(pairs, 2) the first image of both templates of each pair."""
    known, first = np.unique(images.templates, return_index=True)
    return images.places[first][np.searchsorted(known, np.stack([images.p1, images.p2], 1))]
