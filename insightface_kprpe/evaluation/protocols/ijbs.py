"""IJB-S."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...fingerprint import fingerprint
from ...inference.embedding import EmbedOptions, embed_faces
from ...inference.images import AlignedFiles
from ...inference.models import Embedder
from .. import ijbs
from ..result import Result
from .common import CMC_RANKS, common_settings, reports
from .templates import ALIGNED, gallery_results, readable, weights_of


def run_ijbs(embed: Embedder, folder: str | Path, fusions: Sequence[str], options: EmbedOptions) -> list[Result]:
    """IJB-S from the plain files that :mod:`.ijbs` describes; every frame is embedded once for all protocols.

    Args:
        embed, fusions, options: as for ``run_ijb``.
        folder: holds ``images.csv`` and a folder for each protocol.

    Returns:
        For each protocol and fusion one result for each gallery and their mean; none on other ranks.
    """
    folder, data = Path(folder), ijbs.read_ijbs(folder)
    crops = AlignedFiles([folder / path for path in data.paths], data.landmarks_px)
    source = fingerprint("\n".join(data.paths), data.landmarks_px)
    found = embed_faces(embed, crops, crops.keypoints, options, name="ijbs", source=source, files=crops.paths)
    if not reports(options):
        return []
    kept, embeddings = found.readable, readable(found)
    medias = data.medias if kept.all() else data.medias[kept]
    settings = {
        **common_settings(embed, options, found, "the set's landmarks, in the aligned crop", data.paths),
        "alignment": ALIGNED,
    }
    results = []
    for fusion in fusions:
        weights, how = weights_of(fusion, found, crops.keypoints, data.detector_scores)
        for name, protocol in data.protocols.items():
            lists = protocol if kept.all() else _without_lost_medias(protocol, medias)
            rates = ijbs.identification(embeddings, medias, lists, weights, range(1, CMC_RANKS + 1))
            sizes = {key: len(np.unique(rows.templates)) for key, rows in lists.galleries.items()}
            title = f"IJB-S {name.replace('_', ' ')}"
            blank = Result(embed.name, title, {}, settings | {"fusion": how}, fusion)
            results += gallery_results(blank, rates, sizes, len(np.unique(lists.probe.templates)))
    return results


def _without_lost_medias(protocol: ijbs.Protocol, medias: np.ndarray) -> ijbs.Protocol:
    """The rows of medias that still have an image."""

    def kept(rows: ijbs.TemplateList) -> ijbs.TemplateList:
        return ijbs.TemplateList(*(column[np.isin(rows.medias, medias)] for column in rows))

    return ijbs.Protocol(kept(protocol.probe), {name: kept(rows) for name, rows in protocol.galleries.items()})
