"""Weights from the Hugging Face Hub: the few files that are needed, and never code."""

from __future__ import annotations

import logging
import re
from pathlib import Path

logger = logging.getLogger(__name__)

PREFIX = "hf:"
_SOURCE = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# What says which network it is, and the weights; a repository holds code, caches and a second copy of the weights too.
_DESCRIPTION = ["README.md", "config.json", "model.yaml", "pretrained_model/model.yaml"]
_SAFETENSORS = ["model.safetensors", "pretrained_model/model.safetensors"]
_PICKLED = ["model.pt", "pretrained_model/model.pt"]


def is_hub_source(source: str | Path) -> bool:
    """Whether a source names a repository of the Hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def fetch_snapshot(source: str, cache: str | Path | None = None, offline: bool = False) -> tuple[Path, str]:
    """Download what is needed of a repository, or find it in the cache.

    Args:
        source: "hf:owner/name" or "hf:owner/name@revision" (a branch, a tag or a commit).
        cache: folder; None: ``huggingface_hub``'s own (``HF_HOME``).
        offline: use the cache alone.

    Returns:
        The snapshot's folder, and the source with the commit that it is of.

    Raises:
        ValueError: not of that form.
        ImportError: ``huggingface_hub`` is not installed.
        RuntimeError: it cannot be had; the message says why.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"source must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {source!r}")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{source} needs huggingface_hub, which is not installed; pip install 'insightface-kprpe[hf]'"
        ) from error
    offline = offline or constants.HF_HUB_OFFLINE
    options = {"revision": match["revision"], "cache_dir": cache, "local_files_only": offline}
    try:
        folder = Path(snapshot_download(match["name"], allow_patterns=_DESCRIPTION + _SAFETENSORS, **options))
        if not any((folder / name).is_file() for name in _SAFETENSORS):
            folder = Path(snapshot_download(match["name"], allow_patterns=_DESCRIPTION + _PICKLED, **options))
    except Exception as error:  # of huggingface_hub, requests or httpx, by its version
        if offline:
            raise RuntimeError(
                f"{source} is not in the cache, and nothing is downloaded, as --offline or HF_HUB_OFFLINE asks; "
                "run once without them"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"{source} could not be had from huggingface.co ({reason}); check the name, the revision and the connection"
        ) from error
    logger.info("%s: %s", source, folder)
    return folder, f"{PREFIX}{match['name']}@{folder.name}"
