"""From published weights to a pack in one step: the network, the aligner and the detector, each from where it is."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

import onnx

from ..data.verification_pairs import open_verification
from ..dfa import DFA
from ..packs.layout import ALIGNER, DETECTION, DETECTOR_OUTPUTS, INSIGHTFACE_PACK, MANIFEST, PackError, read_manifest
from ..packs.metadata import DFA_DETECTOR, add_metadata, read_metadata
from ..weights.sources import Description, load_published
from .detector_export import export_detector
from .model_pack import build_from_network
from .precision import PackPrecision, check_precision

logger = logging.getLogger(__name__)

DFA_AS_DETECTOR = "dfa"
INSIGHTFACE_LICENCE = "non-commercial research (InsightFace model zoo)"


class FoundDetector(NamedTuple):
    """A detector and what is known of it."""

    path: Path
    source: str
    licence: str


def make_pack(
    recognition: str | Path,
    detector: str | Path,
    aligner: str | Path | None = None,
    name: str = "kprpe",
    root: str | Path = "~/.insightface",
    precision: PackPrecision = "fp32",
    evaluate: str | Path | None = None,
    licence: str | None = None,
    detector_licence: str | None = None,
    network: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
) -> Path:
    """Build a FaceAnalysis pack from published weights or a training run, and a detector.

    Args:
        recognition: what :func:`~insightface_kprpe.weights.sources.load_published` loads.
        detector: an ONNX file in SCRFD's layout with landmarks; a folder with one; the name of an InsightFace pack,
            which InsightFace's own downloader fetches where it is not installed; or "dfa": the aligner, for pictures
            of one face.
        aligner: a DFA, by an exported ONNX file or by what ``load_published`` loads; it refines the landmarks for users
            of ``register()``. None: the one inside the network, if it has one.
        name: of the pack.
        root: InsightFace's root folder.
        precision: of the recognition files.
        evaluate: verification set (.bin) to measure them on, unmirrored; None: no thresholds.
        licence: of the recognition weights; None: what their source says.
        detector_licence: None: what its source says.
        network: name of the backbone, where the weights do not tell it.
        cache: where downloads from the Hub are kept.
        offline: download nothing.

    Returns:
        The pack's folder.

    Raises:
        FileNotFoundError, ImportError, RuntimeError, ValueError: see ``load_published``, ``build_from_network``.
    """
    check_precision(precision)
    if evaluate is not None and (Path(evaluate).suffix != ".bin" or not Path(evaluate).is_file()):
        raise PackError(f"evaluate must be a verification set (a .bin file), {evaluate} is none or does not exist")
    pairs = None if evaluate is None else open_verification(str(evaluate))
    logger.info("loading %s", recognition)
    net, about = load_published(recognition, network, cache, offline, licence)
    if about.task != "recognition":
        raise PackError(f"recognition must be a recognition network, {recognition} is a {about.architecture}")
    with tempfile.TemporaryDirectory() as folder:
        if aligner is not None:
            aligner = _aligner_file(aligner, Path(folder) / "aligner.onnx", cache, offline)
        elif detector == DFA_AS_DETECTOR and net.finds_keypoints:
            aligner = _export_aligner(net.dfa, about, Path(folder) / "aligner.onnx")
        if detector == DFA_AS_DETECTOR:
            if aligner is None:
                raise PackError("detector dfa needs the DFA: give it with --aligner, or a network with a DFA inside")
            found, aligner = FoundDetector(aligner, "the aligner", "unknown"), None
        else:
            found = find_detector(detector, root, offline)
        origin = {"source": about.source, "weights_sha256": about.sha256, "architecture": about.architecture}
        return build_from_network(
            net,
            found.path,
            name,
            root,
            about.licence,
            detector_licence or found.licence,
            aligner,
            precision=precision,
            pairs=pairs,
            origin=origin,
            detector_source=found.source,
        )


def find_detector(detector: str | Path, root: str | Path = "~/.insightface", offline: bool = False) -> FoundDetector:
    """The detector file that a path, or the name of an InsightFace pack, means.

    Args:
        detector: as in :func:`make_pack`, but for "dfa".
        root: InsightFace's root folder.
        offline: do not let InsightFace download a pack.

    Raises:
        PackError: there is none.
        RuntimeError: InsightFace could not fetch the pack.
    """
    path = Path(detector).expanduser()
    if path.is_file():
        return FoundDetector(path, path.name, "unknown")
    installed = Path(root).expanduser() / "models" / str(detector)
    if not path.is_dir() and not installed.is_dir():
        if len(path.parts) != 1 or path.suffix:
            raise PackError(
                f"detector {detector} does not exist; give an ONNX file, an InsightFace pack's name, or dfa"
            )
        _download(str(detector), root, offline)
    folder = installed if installed.is_dir() else path
    licence = INSIGHTFACE_LICENCE if INSIGHTFACE_PACK.fullmatch(folder.name) else "unknown"
    if (folder / MANIFEST).is_file():
        licence = read_manifest(folder)["files"].get(DETECTION, {}).get("licence", licence)
        return FoundDetector(folder / DETECTION, f"{folder.name}/{DETECTION}", licence)
    for candidate in sorted(folder.rglob("*.onnx"), key=lambda file: file.stat().st_size):  # detectors are small
        # An aligner has a detector's layout, and finds one face in a crop.
        if (
            candidate.parent.name == Path(ALIGNER).parent.name
            or read_metadata(candidate).get("detector") == DFA_DETECTOR
        ):
            continue
        if len(onnx.load(str(candidate), load_external_data=False).graph.output) in DETECTOR_OUTPUTS:
            source = f"{folder.name}/{candidate.relative_to(folder).as_posix()}"
            return FoundDetector(candidate, source, licence)
    raise PackError(f"{folder} holds no face detector with landmarks (an ONNX file with {DETECTOR_OUTPUTS} outputs)")


def _download(name: str, root: str | Path, offline: bool) -> None:
    """Let InsightFace fetch one of its packs."""
    from insightface.utils.storage import ensure_available

    if offline:
        raise PackError(f"detector pack {name} is not installed in {root}/models, and offline is set")
    try:
        (Path(root).expanduser() / "models").mkdir(parents=True, exist_ok=True)
        ensure_available("models", name, root=str(root))
    except Exception as error:  # requests, zipfile, or what else InsightFace uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(
            f"InsightFace could not fetch its pack {name} ({reason}); give the path of a detector's ONNX file instead"
        ) from error


def _aligner_file(aligner: str | Path, out: Path, cache: str | Path | None, offline: bool) -> Path:
    """An exported DFA, from an exported one or from weights."""
    if Path(aligner).suffix == ".onnx":
        return Path(aligner)
    net, about = load_published(aligner, cache=cache, offline=offline)
    if not isinstance(net, DFA):
        raise PackError(f"aligner must be a DFA, {aligner} is a {about.architecture}")
    return _export_aligner(net, about, out)


def _export_aligner(net: DFA, about: Description, out: Path) -> Path:
    export_detector(net, out, about.licence)
    add_metadata(out, {"source": about.source, "weights_sha256": about.sha256})
    return out
