"""Weights and ONNX files from the Hugging Face Hub: the few files that are needed, and never code."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

logger = logging.getLogger(__name__)

PREFIX = "hf:"
FORM = "hf:OWNER/NAME[/PATH][@REVISION]"
_SOURCE = re.compile(r"hf:(?P<name>[\w.-]+/[\w.-]+)(?P<path>(/[\w.-]+)*)/?(@(?P<revision>[\w./-]+))?")
# The files that describe the network, and the weights; a repository also holds code, caches and a second copy of the
# weights.
_DESCRIPTION = ("README.md", "config.json", "model.yaml", "pretrained_model/model.yaml")
_SAFETENSORS = ("model.safetensors", "pretrained_model/model.safetensors")
_PICKLED = ("model.pt", "pretrained_model/model.pt")
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


class Snapshot(NamedTuple):
    """What was downloaded."""

    path: Path  # folder or file that the source refers to
    source: str  # with the commit
    root: Path  # of the repository


def is_hub_source(source: str | Path) -> bool:
    """Whether a source names a repository of the Hub."""
    return str(source).startswith(PREFIX)


def local_source(source: str | Path, cache: str | Path | None = None, offline: bool = False) -> Path:
    """The folder or file that a source means: a path is itself, of the Hub what is needed is downloaded.

    Args:
        source, cache, offline: see :func:`fetch_snapshot`, which also says what is raised.
    """
    return fetch_snapshot(source, cache, offline).path if is_hub_source(source) else Path(source).expanduser()


def fetch_snapshot(source: str | Path, cache: str | Path | None = None, offline: bool = False) -> Snapshot:
    """Download the needed files of a repository, or find them in the cache.

    Args:
        source: "hf:owner/name", "hf:owner/name/folder" or "hf:owner/name/folder/file.pt" (weights or ONNX), each also
            with "@revision": a branch, a tag or a commit. A folder's weights are its model.safetensors or model.pt, or
            the only file there that can be weights.
        cache: folder; None: ``huggingface_hub``'s own (``HF_HOME``).
        offline: use only the cache.

    Raises:
        ValueError: not of that form, or the folder holds several weights files.
        FileNotFoundError: it holds none.
        ImportError: ``huggingface_hub`` is not installed.
        RuntimeError: it could not be downloaded; the message says why.
    """
    source = str(source)
    match = _SOURCE.fullmatch(source)
    inside = PurePosixPath(match["path"].lstrip("/")) if match else PurePosixPath("..")
    if match is None or ".." in inside.parts:
        raise ValueError(f"source must be {FORM}, got {source!r}")
    try:
        from huggingface_hub import HfApi, constants, snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{source} needs huggingface_hub, which is not installed; pip install 'insightface-kprpe[hf]'"
        ) from error
    offline = offline or constants.HF_HUB_OFFLINE
    options = {"revision": match["revision"], "cache_dir": cache, "local_files_only": offline}

    def download(names: Iterable[str]) -> Path:
        return Path(snapshot_download(match["name"], allow_patterns=list(names), **options))

    try:
        if inside.suffix in (*WEIGHTS_SUFFIXES, ".onnx"):
            root = download(["README.md", *_beside(inside)])
        else:
            described = ["README.md", *(str(inside / name) for name in _DESCRIPTION)]
            root = download([*described, *(str(inside / name) for name in _SAFETENSORS)])
            if not any((root / inside / name).is_file() for name in _SAFETENSORS):
                root = download([*described, *(str(inside / name) for name in _PICKLED)])
            if not any((root / inside / name).is_file() for name in (*_SAFETENSORS, *_PICKLED)):
                files = (
                    [path.relative_to(root).as_posix() for path in root.rglob("*")]
                    if offline
                    else HfApi().list_repo_files(match["name"], revision=match["revision"])
                )
                inside = only_weights(files, inside, source)
                root = download(["README.md", *described, *_beside(inside)])
    except (AmbiguousWeightsError, NoWeightsError):
        raise
    except Exception as error:  # of huggingface_hub, requests or httpx, by its version
        if offline:
            raise RuntimeError(
                f"{source} is not in the cache, and --offline or HF_HUB_OFFLINE forbids the download; "
                "run once without them"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"{source} could not be downloaded from huggingface.co ({reason}); check the name, the revision and the "
            "connection"
        ) from error
    logger.info("%s: %s", source, root / inside)
    if inside.suffix in (*WEIGHTS_SUFFIXES, ".onnx") and not (root / inside).is_file():
        raise RuntimeError(f"{source}: the repository has no {inside}; check the path and the revision")
    path = f"/{inside}" if inside.parts else ""
    return Snapshot(root / inside, f"{PREFIX}{match['name']}{path}@{root.name}", root)


class AmbiguousWeightsError(ValueError):
    """A folder holds several weights files, or only ONNX files; the message lists the choices."""


class NoWeightsError(FileNotFoundError):
    """A folder holds neither weights nor ONNX files."""


def _beside(file: PurePosixPath) -> list[str]:
    """A weights or ONNX file, and what may belong to it."""
    names = ["config.json", "model.yaml", "README.md", f"{file.name}.data", f"{file.name}_data", f"{file.stem}.yaml"]
    return [str(file), *(str(file.parent / name) for name in names)]


def only_weights(files: Iterable[str], folder: PurePosixPath, source: str) -> PurePosixPath:
    """The one file in a folder that can hold weights.

    Args:
        files: of the repository, by their paths in it.
        folder: in which to look.
        source: for the message.

    Raises:
        AmbiguousWeightsError: there are several, or only ONNX files.
        NoWeightsError: there is nothing of the kind.
    """
    here = sorted(PurePosixPath(file) for file in files)
    here = [file for file in here if folder in file.parents and not file.name.startswith(".")]
    found = [file for file in here if file.suffix in WEIGHTS_SUFFIXES]
    direct = [file for file in found if file.parent == folder]
    # The same weights are often there in both formats.
    safe = {file.with_suffix("") for file in found if file.suffix == ".safetensors"}
    best = [file for file in direct or found if file.suffix == ".safetensors" or file.with_suffix("") not in safe]
    if len(best) == 1:
        return best[0]
    others = best or [file for file in here if file.suffix == ".onnx"]
    if not others:
        raise NoWeightsError(f"{source} holds no weights ({', '.join(WEIGHTS_SUFFIXES)}) and no ONNX files")
    kind = f"{len(best)} weights files" if best else "only ONNX files, which evaluate, embed and pack accept"
    names = ", ".join(map(str, others[:5])) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    raise AmbiguousWeightsError(f"{source} holds {kind}: {names}; specify which one to use")
