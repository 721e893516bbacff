"""TinyFace."""

from __future__ import annotations

from pathlib import Path

from ...data.picture_files import nfc
from ...fingerprint import fingerprint
from ...inference.embedding import EmbedOptions, embed_faces
from ...inference.images import WholeFiles
from ...inference.models import Embedder
from .. import tinyface
from ..curves import cmc_points
from ..result import Result
from ..search import rank_k, search
from .common import CMC_RANKS, common_settings, reports


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
    source = fingerprint("\n".join(nfc(str(path.relative_to(folder))) for path in paths))
    found = embed_faces(embed, WholeFiles(paths), None, options, name="tinyface", source=source, files=paths)
    if not reports(options):
        return []
    split, kept = len(data.probe_paths), found.readable
    probe, gallery = found.embeddings[:split][kept[:split]], found.embeddings[split:][kept[split:]]
    matches = search(probe, gallery, data.probe_ids[kept[:split]], data.gallery_ids[kept[split:]])
    metrics = {f"rank_{rank}": value for rank, value in rank_k(matches, (1, 5, 20)).items()}
    settings = {
        **common_settings(embed, options, found, "the canonical template", names),
        "alignment": "none: native crops, resized to 112 x 112 (bicubic)",
        "probes": f"{len(probe)}, {int((matches.rank > 0).sum())} of them with a mate",
        "gallery": len(gallery),
        "distractors": int((data.gallery_ids[kept[split:]] == tinyface.DISTRACTOR_ID).sum()),
    }
    return [Result(embed.name, "TinyFace", metrics, settings, cmc=cmc_points(matches, CMC_RANKS))]
