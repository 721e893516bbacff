"""The protocols from images to results: which crops to embed, how to fuse and score them, and what to say about it.

Models are what :func:`.models.open_model` returns, or a :class:`.models.TorchEmbedder`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.verification_pairs import VerificationPairs
from ..distributed import rank_and_world_size
from ..fingerprint import fingerprint
from ..inference.embedding import Embeddings, EmbedOptions, embed_faces
from ..inference.images import AlignedFiles, WholeFiles
from ..inference.models import Embedder
from . import ijb, ijbs, tinyface
from .channels import pair_cosines, warn_of_swapped_channels
from .curves import cmc_points, roc_points
from .fusion import FUSION_METHODS, fusion_weights
from .hardest import write_hardest_pairs
from .metrics import OperatingPoint, kfold_accuracy, rank_k, tpr_at_fpr
from .result import Result
from .search import search

PAIR_FPRS = (1e-4, 1e-3)
RANKS = (1, 5, 10)
CMC_RANKS = 20
ALIGNED = "InsightFace's template (112 x 112), by the landmarks of the set"
_FUSIONS = {
    "average": "unit embeddings alike",
    "norm": "embeddings by their length (Eq. 16)",
    "detector": "unit embeddings by the detector's score",
    "norm_detector": "embeddings by their length times the detector's score (InsightFace's default)",
    "landmark": "unit embeddings by the alignment and score (Eq. 17, 18) of the ",
}
_LISTED = 50  # missing images that a report names


def run_pairs(
    embed: Embedder, pairs: VerificationPairs, options: EmbedOptions, sheets: Path | None = None
) -> list[Result]:
    """Verification of a ``.bin`` set: accuracy over ten folds, and TPR at FPR over all pairs.

    A sample of the pairs is also embedded with red and blue swapped; where that is better, a warning says so.

    Args:
        embed: the model.
        pairs: what to verify. A pair of which an image cannot be read is left out, if the options permit it.
        options: how to embed.
        sheets: folder for a picture of the hardest pairs.

    Returns:
        One result; none on ranks other than the first, if they share the work.
    """
    found = embed_faces(embed, pairs.images, pairs.keypoints, options, name=pairs.name, source=pairs.source)
    if not _reports(options):
        return []
    whole = found.readable[0::2] & found.readable[1::2]
    first, second, is_same = found.embeddings[0::2][whole], found.embeddings[1::2][whole], pairs.is_same[whole]
    folds = kfold_accuracy(first, second, is_same)
    scores = pair_cosines(first, second)
    kept = np.flatnonzero(whole)
    warn_of_swapped_channels(embed, pairs, options, kept, scores)
    if sheets is not None:
        file = sheets / f"hardest_{embed.name}_{pairs.name}.png"
        write_hardest_pairs(file, pairs.images, np.stack([2 * kept, 2 * kept + 1], 1), scores, is_same)
    metrics = {"accuracy": folds.accuracy, "accuracy_std": folds.std, "cosine_threshold": folds.cosine_threshold}
    metrics |= _rates(tpr_at_fpr(scores, is_same, PAIR_FPRS))
    settings = {
        **_settings(embed, options, found, pairs.keypoint_source, [f"image {i}" for i in range(len(pairs.images))]),
        "alignment": "crops as they are in the set",
        "pairs": f"{len(is_same)}, {int(is_same.sum())} of them of one person",
        "threshold rule": "accuracy: best on the other nine folds; TPR: the highest whose FPR is at most the target",
    }
    return [Result(embed.name, pairs.name, metrics, settings, roc=roc_points(scores, is_same))]


def run_ijb(
    embed: Embedder,
    folder: str | Path,
    target: str,
    fusions: Sequence[str],
    options: EmbedOptions,
    sheets: Path | None = None,
) -> list[Result]:
    """IJB-B or IJB-C in InsightFace's layout: 1:1, and 1:N where its lists are in ``meta``.

    Args:
        embed: the model.
        folder: holds ``meta`` and ``loose_crop``.
        target: ``IJBB`` or ``IJBC``.
        fusions: of ``fusion.FUSION_METHODS``.
        options: how to embed. Where images are skipped, so are templates without any left, and their pairs.
        sheets: folder for a picture of the hardest pairs by the first fusion; one image stands for each template.

    Returns:
        For each fusion one result of 1:1, and one for each gallery and their mean; none on other ranks.

    Raises:
        ValueError: a file is malformed, or an image cannot be read.
    """
    folder, meta = Path(folder), ijb.read_meta(folder, target)
    crops = AlignedFiles([folder / "loose_crop" / name for name in meta.names], meta.landmarks_px)
    source = fingerprint("\n".join(meta.names), meta.landmarks_px)
    found = embed_faces(embed, crops, crops.keypoints, options, name=target.lower(), source=source)
    if not _reports(options):
        return []
    kept = found.readable
    templates, medias = meta.templates[kept], meta.medias[kept]
    p1, p2, label, left_out = meta.p1, meta.p2, meta.label, 0
    lost = np.setdiff1d(meta.templates, templates)
    if len(lost):  # a pair of a template that the set never had is an error nevertheless
        known = ~(np.isin(p1, lost) | np.isin(p2, lost))
        p1, p2, label, left_out = p1[known], p2[known], label[known], int((~known).sum())
    embeddings = found.embeddings if kept.all() else found.embeddings[kept]
    settings = {
        **_settings(embed, options, found, "the set's landmarks, in the aligned crop", meta.names),
        "alignment": ALIGNED,
    }
    verification = {
        "pairs": f"{len(label)}, {int(label.sum())} of them of one person",
        "templates": len(np.unique(templates)),
        "threshold rule": "the point of the ROC nearest to the FPR, as InsightFace's IJB scripts",
        **({"pairs left out": f"{left_out}, a template has no image left"} if left_out else {}),
    }
    name, probe, galleries = f"IJB-{target[-1]}", *_subject_lists(folder, target, lost)
    results = []
    for fusion in fusions:
        weights, how = _weights(fusion, found, crops.keypoints, meta.detector_scores)
        scores = ijb.verification_scores(embeddings, templates, medias, p1, p2, weights)
        if sheets is not None and fusion == fusions[0]:
            file = sheets / f"hardest_{embed.name}_{target.lower()}.png"
            write_hardest_pairs(file, crops, _stand_ins(templates, np.flatnonzero(kept), p1, p2), scores, label)
        metrics = _rates(tpr_at_fpr(scores, label, ijb.FPRS, rule="insightface"))
        common = settings | {"fusion": how}
        curve = roc_points(scores, label)
        results.append(Result(embed.name, f"{name} 1:1", metrics, common | verification, fusion, roc=curve))
        if galleries:
            ranks = range(1, CMC_RANKS + 1)
            rates = ijb.identification(embeddings, templates, medias, probe, galleries, weights, ranks)
            sizes = {key: len(gallery.templates) for key, gallery in galleries.items()}
            results += _identification(embed.name, f"{name} 1:N", rates, common, fusion, sizes, len(probe.templates))
    return results


def run_ijbs(embed: Embedder, folder: str | Path, fusions: Sequence[str], options: EmbedOptions) -> list[Result]:
    """IJB-S from the plain files that :mod:`.ijbs` describes; every frame is embedded once for all protocols.

    Args:
        embed, fusions, options: as for :func:`run_ijb`.
        folder: holds ``images.csv`` and a folder for each protocol.

    Returns:
        For each protocol and fusion one result for each gallery and their mean; none on other ranks.
    """
    folder, data = Path(folder), ijbs.read_ijbs(folder)
    crops = AlignedFiles([folder / path for path in data.paths], data.landmarks_px)
    source = fingerprint("\n".join(data.paths), data.landmarks_px)
    found = embed_faces(embed, crops, crops.keypoints, options, name="ijbs", source=source)
    if not _reports(options):
        return []
    kept = found.readable
    embeddings, medias = (found.embeddings, data.medias) if kept.all() else (found.embeddings[kept], data.medias[kept])
    settings = {
        **_settings(embed, options, found, "the set's landmarks, in the aligned crop", data.paths),
        "alignment": ALIGNED,
    }
    results = []
    for fusion in fusions:
        weights, how = _weights(fusion, found, crops.keypoints, data.detector_scores)
        for name, protocol in data.protocols.items():
            lists = protocol if kept.all() else _without_lost_medias(protocol, medias)
            rates = ijbs.identification(embeddings, medias, lists, weights, range(1, CMC_RANKS + 1))
            sizes = {key: len(np.unique(rows.templates)) for key, rows in lists.galleries.items()}
            probes = len(np.unique(lists.probe.templates))
            title = f"IJB-S {name.replace('_', ' ')}"
            results += _identification(embed.name, title, rates, settings | {"fusion": how}, fusion, sizes, probes)
    return results


def run_tinyface(embed: Embedder, folder: str | Path, options: EmbedOptions) -> list[Result]:
    """TinyFace: closed-set identification of native low-resolution faces among distractors.

    Args:
        embed: the model.
        folder: TinyFace's layout, see :func:`.tinyface.read_tinyface`.
        options: how to embed. Skipped images are neither probes nor in the gallery.

    Returns:
        One result; none on other ranks.
    """
    data = tinyface.read_tinyface(folder)
    paths = [*data.probe_paths, *data.gallery_paths]
    names = [str(path) for path in paths]
    found = embed_faces(embed, WholeFiles(paths), None, options, name="tinyface", source=fingerprint("\n".join(names)))
    if not _reports(options):
        return []
    split, kept = len(data.probe_paths), found.readable
    probe, gallery = found.embeddings[:split][kept[:split]], found.embeddings[split:][kept[split:]]
    matches = search(probe, gallery, data.probe_ids[kept[:split]], data.gallery_ids[kept[split:]])
    metrics = {f"rank_{rank}": value for rank, value in rank_k(matches, (1, 5, 20)).items()}
    settings = {
        **_settings(embed, options, found, "the canonical template", names),
        "alignment": "none: native crops, resized to 112 x 112 (bicubic)",
        "probes": f"{len(probe)}, {int((matches.rank > 0).sum())} of them with a mate",
        "gallery": len(gallery),
        "distractors": int((data.gallery_ids[kept[split:]] == tinyface.DISTRACTOR_ID).sum()),
    }
    return [Result(embed.name, "TinyFace", metrics, settings, cmc=cmc_points(matches, CMC_RANKS))]


def choose_fusions(name: str) -> tuple[str, ...]:
    """The methods that ``--fusion`` names: one, or "all".

    Raises:
        ValueError: there is no such method.
    """
    if name == "all":
        return FUSION_METHODS
    if name not in FUSION_METHODS:
        raise ValueError(f"fusion must be all or one of {', '.join(FUSION_METHODS)}, got {name!r}")
    return (name,)


def _stand_ins(templates: np.ndarray, images: np.ndarray, p1: np.ndarray, p2: np.ndarray) -> np.ndarray:
    """(pairs, 2) the first image of both templates of each pair."""
    known, first = np.unique(templates, return_index=True)
    return images[first][np.searchsorted(known, np.stack([p1, p2], 1))]


def _rates(points: Sequence[OperatingPoint]) -> dict[str, float]:
    return {
        f"{name}_at_fpr_{point.target}": value
        for point in points
        for name, value in (("tpr", point.tpr), ("thresh", point.threshold))
    }


def _reports(options: EmbedOptions) -> bool:
    return not options.share or rank_and_world_size()[0] == 0


def _settings(
    embed: Embedder, options: EmbedOptions, found: Embeddings, given: str, names: Sequence[str]
) -> dict[str, Any]:
    """What all protocols say about how they embedded."""
    if embed.finds_keypoints:
        keypoints = "found by the network itself"
    elif not embed.needs_keypoints:
        keypoints = "not used by this network"
    else:
        keypoints = f"{options.aligner_name}" if options.aligner is not None else given
    missing = [names[i] for i in np.flatnonzero(~found.readable)]
    listed = ", ".join(missing[:_LISTED]) + (f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else "")
    return {
        "model": embed.describe(),
        "flip": "sum of both embeddings" if options.flip else "off",
        "keypoints": keypoints,
        "images": len(names),
        "missing images": f"{len(missing)} left out: {listed}" if missing else "none",
    }


def _weights(
    fusion: str, found: Embeddings, keypoints: np.ndarray, detector_scores: np.ndarray
) -> tuple[np.ndarray, str]:
    """Weights of the readable images, and a phrase about them. Without an aligner its part falls to the detector."""
    kept, how, score = found.readable, _FUSIONS[fusion], detector_scores
    if fusion == "landmark":
        located = bool(np.isfinite(found.scores[kept]).all())
        keypoints, score = (found.keypoints, found.scores) if located else (keypoints, detector_scores)
        how += "aligner's landmarks" if located else "detector's landmarks"
    embeddings = found.embeddings if kept.all() else found.embeddings[kept]
    weights = fusion_weights(fusion, embeddings, keypoints[kept], score[kept], detector_scores[kept])
    return weights, f"{how}; per media, then per template"


def _subject_lists(folder: Path, target: str, lost: np.ndarray) -> tuple[ijb.Subjects | None, dict[str, ijb.Subjects]]:
    """Probes and galleries of 1:N by InsightFace's file names, without the ``lost`` templates.

    None and no gallery where there are no such files.
    """
    prefix = f"{target.lower()}_1N_"
    probe_path = folder / "meta" / f"{prefix}probe_mixed.csv"
    paths = {
        path.stem[len(f"{prefix}gallery_") :]: path for path in sorted(probe_path.parent.glob(f"{prefix}gallery_*"))
    }
    if not paths or not probe_path.is_file():
        return None, {}
    lists = [ijb.read_subjects(path) for path in (probe_path, *paths.values())]
    if len(lost):
        lists = [ijb.Subjects(*(column[~np.isin(rows.templates, lost)] for column in rows)) for rows in lists]
    return lists[0], dict(zip(paths, lists[1:], strict=True))


def _without_lost_medias(protocol: ijbs.Protocol, medias: np.ndarray) -> ijbs.Protocol:
    """The rows of medias that still have an image."""

    def kept(rows: ijbs.TemplateList) -> ijbs.TemplateList:
        return ijbs.TemplateList(*(column[np.isin(rows.medias, medias)] for column in rows))

    return ijbs.Protocol(kept(protocol.probe), {name: kept(rows) for name, rows in protocol.galleries.items()})


def _identification(
    model: str,
    protocol: str,
    rates: Mapping[str, Mapping[str, float]],
    settings: Mapping[str, Any],
    fusion: str,
    sizes: Mapping[str, int],
    probes: int,
) -> list[Result]:
    """The mean over galleries, with the CMC curve, and then each gallery."""
    results = []
    sizes = {**sizes, "mean": round(float(np.mean(list(sizes.values()))))}
    for name in ("mean", *(name for name in rates if name != "mean")):
        values = rates[name]
        cmc = np.array([values[f"rank_{rank}"] for rank in range(1, CMC_RANKS + 1)])
        metrics = {f"rank_{rank}": values[f"rank_{rank}"] for rank in RANKS}
        metrics |= {key: value for key, value in values.items() if not key.startswith("rank_")}
        own = {**settings, "probes": probes, "gallery": sizes[name], "open set": "rank 1 and above the threshold"}
        result = Result(model, protocol, metrics, own, fusion, cmc=cmc)
        results.append(result if name == "mean" else replace(result, variant=f"{fusion}, {name}", cmc=None))
    return results
