"""IJB-B and IJB-C: template verification (1:1) and template identification (1:N)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .fusion import pool_templates
from .ijb_meta import IJBMeta, Subjects, read_meta, read_subjects
from .metrics import to_numpy, tpr_at_fpr
from .pair_scores import pair_scores, positions
from .search import Matches, count_for_far, rank_k, search, tpir_at_far, tpir_at_fpir

__all__ = [
    "FPRS",
    "IJBMeta",
    "Subjects",
    "identification",
    "identification_rates",
    "nist_identification",
    "read_meta",
    "read_subjects",
    "verification",
    "verification_scores",
]

FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def verification_scores(
    embeddings: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    p1: np.ndarray,
    p2: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Cosine of each pair of templates; arguments and errors are those of ``verification``.

    Scores that are mathematically equal, such as those of duplicate images, are equal here: they are rounded to
    ``metrics.SCORE_DECIMALS``. In InsightFace's scripts some of them differ in the last bits, depending on the order of
    summation, which affects their rates.

    Returns:
        (pairs,) float64.
    """
    pooled, known = pool_templates(embeddings, templates, medias, weights)
    first, second = positions(known, p1, "p1"), positions(known, p2, "p2")
    if first.shape != second.shape or not len(first):
        raise ValueError(f"p1 and p2 must have the same length above 0, got {len(first)} and {len(second)}")
    return pair_scores(pooled, first, second)


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
        weights: (N,) float from ``fusion``, multiplies each unit embedding. None uses raw embeddings, i.e. weights by
            their norm (Eq. 16).
        fprs: false positive rates.

    Returns:
        ``tpr_at_fpr_1e-06``, a fraction, and ``thresh_at_fpr_1e-06``, a cosine, and so on for each rate, at the point
        of the ROC that InsightFace takes (``metrics.tpr_at_fpr`` with ``rule="insightface"``). If that point accepts
        nobody, the threshold is infinite and the TPR 0.

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
    fars: Sequence[float] = (0.01, 0.1),
) -> dict[str, float]:
    """1:N identification as InsightFace's ``ijb_1n.py`` and AdaFace's helper measure it: in one merged gallery.

    Args:
        embeddings, templates, medias, weights: as for ``verification``.
        probe: templates to identify and who they are. A probe whose subject no gallery holds is left out.
        galleries: name -> templates to search in and who they are; they are merged.
        ranks: for rank-k.
        fars: false alarms per probe, see ``search.tpir_at_far``.

    Returns:
        Fractions ``rank_1`` and so on, ``tpir_at_far_0.01`` and so on, and the cosines ``thresh_at_far_0.01`` above
        which a template is accepted.

    Raises:
        ValueError: as for ``verification``, or no probe's subject is in a gallery.
    """
    pooled = pool_templates(embeddings, templates, medias, weights)
    joined = {"joined": Subjects(*(np.concatenate(columns) for columns in zip(*galleries.values(), strict=True)))}
    known = np.isin(probe.subjects, joined["joined"].subjects)
    probe = Subjects(*(to_numpy(column)[known] for column in probe))
    (matches,) = _search(pooled, probe, joined, count_for_far(len(known), max(fars, default=0))).values()
    rates = {f"rank_{rank}": value for rank, value in rank_k(matches, ranks).items()}
    points = tpir_at_far(matches, fars)
    rates |= {f"tpir_at_far_{point.target}": point.tpr for point in points}
    return rates | {f"thresh_at_far_{point.target}": point.threshold for point in points}


def nist_identification(
    embeddings: np.ndarray,
    templates: np.ndarray,
    medias: np.ndarray,
    probe: Subjects,
    galleries: Mapping[str, Subjects],
    weights: np.ndarray | None = None,
    ranks: Sequence[int] = (1, 5, 10),
    fpirs: Sequence[float] = (0.01, 0.1),
) -> dict[str, dict[str, float]]:
    """1:N identification as NIST defined it for IJB: in each gallery, closed set and open set.

    Args:
        embeddings, templates, medias, weights: as for ``verification``.
        probe: templates to identify and who they are.
        galleries: name -> templates to search in and who they are. IJB has two galleries of different people, so that
            the probes of the one are the unknown people of the other.
        ranks: for rank-k, over the probes whose subject is in the gallery.
        fpirs: false positive identification rates.

    Returns:
        For each gallery, and for ``mean`` over them: fractions ``rank_1`` and so on, ``tpir_at_fpir_0.01`` and so on.

    Raises:
        ValueError: as for ``verification``, or a gallery holds no probe's subject, or all of them.
    """
    pooled = pool_templates(embeddings, templates, medias, weights)
    return identification_rates(_search(pooled, probe, galleries), ranks, fpirs)


def _search(
    pooled: tuple[np.ndarray, np.ndarray], probe: Subjects, galleries: Mapping[str, Subjects], highest: int = 0
) -> dict[str, Matches]:
    """Search the probes in each gallery; ``pooled`` is what ``pool_templates`` returns."""
    embeddings, known = pooled
    wanted = embeddings[positions(known, probe.templates, "probe")]
    return {
        name: search(
            wanted,
            embeddings[positions(known, gallery.templates, f"gallery {name}")],
            probe.subjects,
            gallery.subjects,
            highest,
        )
        for name, gallery in galleries.items()
    }


def identification_rates(
    matches: Mapping[str, Matches], ranks: Sequence[int] = (1, 5, 10), fpirs: Sequence[float] = (0.01, 0.1)
) -> dict[str, dict[str, float]]:
    """The numbers of 1:N identification, for each gallery and as ``mean`` over them.

    Args:
        matches: gallery -> what ``search`` found there.
        ranks: for rank-k, over the probes whose subject is in the gallery.
        fpirs: false positive identification rates; none for closed sets, where all subjects are in.

    Returns:
        As ``nist_identification``.

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
