"""Where the parts of a pack come from: detectors, aligners and other models, each by a path or a name."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch.nn as nn

from ..backbones import Backbone
from ..dfa import DFA
from ..hub import fetch_snapshot, is_hub_source, local_source
from ..packs.layout import (
    ALIGNER,
    DETECTION,
    DETECTOR_OUTPUTS,
    INSIGHTFACE_PACK,
    MANIFEST,
    PackError,
    onnx_files,
    read_manifest,
)
from ..packs.metadata import DFA_DETECTOR, load_onnx, metadata_of
from ..packs.routing import stock_route
from ..weights.architecture import read_architecture
from ..weights.description import Description
from ..weights.sources import load_published

INSIGHTFACE_LICENCE = "non-commercial research (InsightFace model zoo)"
# What a pack can include from another: everything that InsightFace supports besides what is built here.
EXTRA_TASKS = ("genderage", "landmark_2d_106", "landmark_3d_68")


class FoundFile(NamedTuple):
    """An ONNX file and what is known of it."""

    path: Path
    source: str
    licence: str


class LoadedNetwork(NamedTuple):
    """A network to export, and the metadata of its files."""

    net: nn.Module
    facts: dict[str, str]
    licence: str


def find_detector(
    detector: str | Path, root: str | Path = "~/.insightface", offline: bool = False, licence: str | None = None
) -> FoundFile:
    """The detector file that a path, or the name of an InsightFace pack, refers to.

    Args:
        detector: an ONNX file, also on the Hub ("hf:owner/name/path.onnx"); a folder with one; or the name of a pack,
            which InsightFace's own downloader fetches where it is not installed.
        root: InsightFace's root folder.
        offline: do not let InsightFace download a pack.
        licence: of the detector; None: what its file, its pack or its name says.

    Raises:
        PackError: there is none.
        RuntimeError: InsightFace could not fetch the pack.
    """
    path = local_source(detector, offline=offline)
    if path.is_file():
        return FoundFile(path, path.name, licence or _licence(path, "unknown"))
    folder = _pack_folder(detector, root, offline, "detector")
    if (folder / MANIFEST).is_file():
        known = read_manifest(folder)["files"].get(DETECTION, {}).get("licence", "unknown")
        return FoundFile(folder / DETECTION, f"{folder.name}/{DETECTION}", licence or known)
    for candidate in sorted(onnx_files(folder, deep=True), key=lambda file: file.stat().st_size):  # detectors are small
        # An aligner has a detector's layout, and finds one face in a crop.
        if candidate.parent.name == Path(ALIGNER).parent.name:
            continue
        model = load_onnx(candidate)
        if metadata_of(model).get("detector") != DFA_DETECTOR and len(model.graph.output) in DETECTOR_OUTPUTS:
            return _in_pack(candidate, folder, licence)
    raise PackError(f"{folder} has no face detector with landmarks (an ONNX file with {DETECTOR_OUTPUTS} outputs)")


def find_extras(
    tasks: Collection[str], pack: str | Path, root: str | Path = "~/.insightface", offline: bool = False
) -> dict[str, FoundFile]:
    """Models of other tasks in an InsightFace pack.

    Args:
        tasks: of :data:`EXTRA_TASKS`.
        pack: name of an InsightFace pack, downloaded if it is not installed, or a folder.
        root: InsightFace's root folder.
        offline: do not let InsightFace download a pack.

    Returns:
        Their files, by file name.

    Raises:
        PackError: there is no such task, or the pack has no model for one.
        RuntimeError: InsightFace could not fetch the pack.
    """
    if unknown := [task for task in tasks if task not in EXTRA_TASKS]:
        raise PackError(f"extra tasks must be of {', '.join(EXTRA_TASKS)}, got {unknown[0]!r}")
    folder = _pack_folder(pack, root, offline, "extra_pack")
    routes = {path: stock_route(path).task for path in onnx_files(folder)} if tasks else {}
    found = {}
    for task in tasks:
        path = next((path for path, routed in routes.items() if routed == task), None)
        if path is None:
            there = ", ".join(sorted({str(routed) for routed in routes.values()} - {"None"})) or "none"
            raise PackError(f"{folder} has no model for {task}; it has models for {there}")
        found[path.name] = _in_pack(path, folder)
    return found


def open_recognition(
    recognition: Backbone | str | Path,
    network: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
    licence: str | None = None,
) -> LoadedNetwork | FoundFile:
    """The recognition network of a pack, or the file that it was exported to.

    Args:
        recognition: a network, an ONNX file, or what :func:`~insightface_kprpe.weights.sources.load_published` loads.
        network: name of the backbone, if the weights do not determine it.
        cache: where downloads from the Hub are kept.
        offline: download nothing.
        licence: of the weights; None: what their source says.

    Raises:
        FileNotFoundError, ImportError, RuntimeError, ValueError: see ``load_published``.
        PackError: it is another kind of network.
    """
    if isinstance(recognition, nn.Module):
        return LoadedNetwork(recognition, {"architecture": _describe(recognition)}, licence or "unknown")
    if is_hub_source(recognition) and str(recognition).partition("@")[0].endswith(".onnx"):
        path, source, _ = fetch_snapshot(recognition, cache, offline)
        return FoundFile(path, source, licence or _licence(path, "unknown"))
    if Path(recognition).suffix == ".onnx":
        path = Path(recognition).expanduser()
        return FoundFile(path, path.name, licence or _licence(path, "unknown"))
    net, description = load_published(recognition, network, cache, offline, licence)
    if description.task != "recognition":
        raise PackError(f"recognition must be a recognition network, {recognition} is a {description.architecture}")
    return LoadedNetwork(net, _facts(description) | {"architecture": description.architecture}, description.licence)


def open_aligner(
    aligner: str | Path, cache: str | Path | None = None, offline: bool = False
) -> LoadedNetwork | FoundFile:
    """The aligner of a pack, or a file that it was exported to.

    Args:
        aligner: an ONNX file that :func:`~.detector_export.export_detector` wrote, or what
            :func:`~insightface_kprpe.weights.sources.load_published` loads.
        cache: where downloads from the Hub are kept.
        offline: download nothing.

    Raises:
        FileNotFoundError, ImportError, RuntimeError, ValueError: see ``load_published``.
        PackError: it is not a DFA.
    """
    if str(aligner).partition("@")[0].endswith(".onnx"):
        path = local_source(aligner, cache, offline)
        if metadata_of(load_onnx(path)).get("detector") != DFA_DETECTOR:
            raise PackError(
                f"aligner must be a DFA exported as a detector, {path} is not; create it with export_detector"
            )
        return FoundFile(path, path.name, _licence(path, "unknown"))
    net, description = load_published(aligner, cache=cache, offline=offline)
    if not isinstance(net, DFA):
        raise PackError(f"aligner must be a DFA, {aligner} is a {description.architecture}")
    return LoadedNetwork(net, _facts(description), description.licence)


def _describe(net: nn.Module) -> str:
    try:
        return read_architecture(net.state_dict()).describe()
    except ValueError:
        return type(net).__name__


def _facts(description: Description) -> dict[str, str]:
    return {"source": description.source, "weights_sha256": description.sha256}


def _licence(path: Path, default: str) -> str:
    """The license in a file's metadata."""
    known = metadata_of(load_onnx(path)).get("licence", "unknown")
    return default if known == "unknown" else known


def _in_pack(path: Path, folder: Path, licence: str | None = None) -> FoundFile:
    """A file from another pack."""
    by_name = INSIGHTFACE_LICENCE if INSIGHTFACE_PACK.fullmatch(folder.name) else "unknown"
    source = f"{folder.name}/{path.relative_to(folder).as_posix()}"
    return FoundFile(path, source, licence or _licence(path, by_name))


def _pack_folder(pack: str | Path, root: str | Path, offline: bool, role: str) -> Path:
    """The folder of an installed pack, of one that InsightFace downloads, or one given by its path."""
    path = Path(pack).expanduser()
    installed = Path(root).expanduser() / "models" / str(pack)
    if not path.is_dir() and not installed.is_dir():
        if len(path.parts) != 1 or path.suffix:
            other = "an ONNX file, an InsightFace pack's name, or dfa" if role == "detector" else "an InsightFace pack"
            raise PackError(f"{role} {pack} does not exist; give {other}")
        _download(str(pack), root, offline, role)
    return installed if installed.is_dir() else path


def _download(name: str, root: str | Path, offline: bool, role: str) -> None:
    """Let InsightFace download one of its packs."""
    from insightface.utils.storage import ensure_available

    if offline:
        raise PackError(f"{role}: pack {name} is not installed in {root}/models, and offline is set")
    try:
        (Path(root).expanduser() / "models").mkdir(parents=True, exist_ok=True)
        ensure_available("models", name, root=str(root))
    except Exception as error:  # requests, zipfile, or whatever else InsightFace uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"InsightFace could not download its pack {name} ({reason}); give a path instead") from error
