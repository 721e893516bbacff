"""Builds model packs: folders of ONNX files that the stock ``insightface`` loads by name; see :mod:`..packs.layout`.

Files of this package say what they are in their own metadata, of which ``pack.json`` is a copy that people can read.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch.nn as nn

from ..data.verification_pairs import VerificationPairs
from ..files import atomic_folder
from ..fingerprint import file_sha256
from ..packs.layout import ALIGNER, DETECTION, DETECTOR_OUTPUTS, KEYPOINT_RECOGNITION, MANIFEST, RECOGNITION, PackError
from ..packs.metadata import DFA_DETECTOR, add_metadata, read_metadata
from ..packs.routing import stock_route
from .detector_export import export_detector
from .onnx_export import export_onnx
from .precision import PackPrecision, check_precision, lower_precision, measure

logger = logging.getLogger(__name__)

FORMAT = "insightface-kprpe pack"
_LANDMARKS = "(faces, 5, 2) pixels of the picture: left eye, right eye, nose, left and right mouth corner as seen in it"
# What the record says of a file that does not say it itself: InsightFace feeds all detectors alike.
_DETECTOR = {"colour_order": "RGB", "keypoint_convention": _LANDMARKS}
_RECOGNISER = {key: "unknown" for key in ("architecture", "colour_order", "mean", "std", "keypoint_convention")}
_DEFAULTS = {
    DETECTION: {"task": "detection", "architecture": "SCRFD", **_DETECTOR},
    ALIGNER: {"task": "aligner", "architecture": "DFA", **_DETECTOR},
    RECOGNITION: {"task": "recognition", **_RECOGNISER},
    KEYPOINT_RECOGNITION: {"task": "recognition", **_RECOGNISER},
}
_DETECTORS = {DFA_DETECTOR: "DFA", "retinaface": "RetinaFace"}  # what export_detector says, for people
_JSON_ENTRIES = ("evaluation", "change")  # that metadata hold as JSON


def build(
    recognition: str | Path,
    detector: str | Path,
    keypoint_recognition: str | Path | None = None,
    name: str = "kprpe",
    root: str | Path = "~/.insightface",
    detector_licence: str = "unknown",
    aligner: str | Path | None = None,
    detector_source: str | None = None,
) -> Path:
    """Build a pack for ``FaceAnalysis(name=NAME, root=ROOT)`` and check that the stock loader takes it as intended.

    Args:
        recognition: image-only ONNX file (``export_onnx(net, path, image_only=True)``).
        detector: face detector in InsightFace's SCRFD layout.
        keypoint_recognition: two-input ONNX file of the same network, for users of ``register()``.
        name: of the pack.
        root: InsightFace's root folder; the pack goes to ``root/models/name``, replacing one of that name.
        detector_licence: of the detector file, for the record.
        aligner: DFA (``export_detector(dfa, path)``) that refines the detector's landmarks for users of ``register()``,
            and so needs ``keypoint_recognition``.
        detector_source: where the detector came from, for the record; None: its file name.

    Returns:
        The pack's folder.

    Raises:
        PackError: a file is missing or damaged, or the stock loader would take it for something else.
    """
    folder = _pack_folder(name, root)
    sources = {DETECTION: Path(detector), RECOGNITION: Path(recognition)}
    logger.info("checking how InsightFace takes the files, and installing them as %s", folder)
    _check_detector(sources[DETECTION])
    _check_recognition(sources[RECOGNITION])
    if keypoint_recognition is not None:
        sources[KEYPOINT_RECOGNITION] = Path(keypoint_recognition)
        if (inputs := read_metadata(sources[KEYPOINT_RECOGNITION]).get("inputs")) != "images+keypoints":
            raise PackError(
                f"{keypoint_recognition} must be exported with inputs images and keypoints, got {inputs or 'none'}"
            )
    if aligner is not None:
        sources[ALIGNER] = Path(aligner)
        _check_aligner(sources[ALIGNER], keypoint_recognition)
    with atomic_folder(folder) as temporary:
        records = {}
        for target, source in sources.items():
            (temporary / target).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, temporary / target)
            origin = detector_source if target == DETECTION and detector_source else source.name
            records[target] = _record(temporary / target, target, origin, detector_licence)
        manifest = {"name": name, "format": FORMAT, "files": records}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return folder


def build_from_network(
    net: nn.Module,
    detector: str | Path,
    name: str = "kprpe",
    root: str | Path = "~/.insightface",
    licence: str = "unknown",
    detector_licence: str = "unknown",
    aligner: str | Path | None = None,
    *,
    precision: PackPrecision = "fp32",
    pairs: VerificationPairs | None = None,
    origin: Mapping[str, str] | None = None,
    detector_source: str | None = None,
) -> Path:
    """Export a network in the forms that a pack holds, and build the pack; see :func:`build`.

    The aligner inside a self-aligned network also becomes the pack's, where no other is given.

    Args:
        licence: of the network's weights.
        precision: "fp32", or "fp16" or "int8" for the recognition files, see
            :func:`~insightface_kprpe.deployment.precision.lower_precision`.
        pairs: verification set, for thresholds in ``pack.json`` and to see what a lower precision changes.
        origin: more for the record of the recognition files, as "source" and "architecture".

    Raises:
        PackError: see :func:`build`.
        ValueError: there is no such precision.
        PrecisionError: a lower precision changes too much.
    """
    check_precision(precision)
    _pack_folder(name, root)  # what can fail at once does, before the exports take their time
    _check_detector(Path(detector))
    with tempfile.TemporaryDirectory() as folder:
        image_only, two_inputs = Path(folder) / "image_only.onnx", Path(folder) / "keypoints.onnx"
        forms = [image_only, two_inputs] if net.needs_keypoints else [image_only]
        for path in forms:
            logger.info("exporting the %s form and comparing it with torch", path.stem.replace("_", "-"))
            export_onnx(net, path, path is image_only, licence, origin)
            _finish(path, precision, pairs)
        if aligner is None and net.finds_keypoints:
            aligner = export_detector(net.dfa, Path(folder) / "dfa.onnx", licence)
            add_metadata(aligner, {"source": origin["source"]} if origin else {})
        twin = two_inputs if net.needs_keypoints else None
        return build(image_only, detector, twin, name, root, detector_licence, aligner, detector_source)


def _pack_folder(name: str, root: str | Path) -> Path:
    """Where a pack goes, if that is ours to write to."""
    if not name or Path(name).name != name or name.startswith("."):
        raise PackError(f"name must be a plain folder name, got {name!r}")
    folder = Path(root).expanduser() / "models" / name
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise PackError(f"{folder} exists and was not built by this package; choose another name or remove it")
    return folder


def _finish(path: Path, precision: PackPrecision, pairs: VerificationPairs | None) -> None:
    """Lower an exported file's precision and measure it, and write into the file what came of it."""
    facts, measured = {"precision": precision}, None
    if precision != "fp32":
        logger.info(
            "writing it in %s and comparing that with fp32 on %s", precision, pairs.name if pairs else "drawn pairs"
        )
        change, measured = lower_precision(path, path, precision, pairs)
        facts["change"] = json.dumps(change._asdict())
    if pairs is not None:
        if measured is None:
            logger.info("evaluating it on %s (%d pairs)", pairs.name, len(pairs.is_same))
            measured = measure(path, pairs)
        evaluation = {"set": pairs.name, "pairs": len(pairs.is_same), "keypoints": pairs.keypoint_source}
        evaluation |= {"accuracy": measured.accuracy, "thresholds": measured.thresholds}
        facts["evaluation"] = json.dumps(evaluation)
    add_metadata(path, facts)


def _record(path: Path, target: str, origin: str, licence: str) -> dict[str, Any]:
    """What the manifest says of a file: what the file itself says, completed by what is known of its kind."""
    metadata = read_metadata(path)
    if metadata.get("detector") in _DETECTORS:
        metadata = {"architecture": _DETECTORS[metadata["detector"]], **metadata}
    record = {
        "sha256": file_sha256(path),
        "source": metadata.get("source", origin),
        "precision": metadata.get("precision", "fp32"),
        "licence": metadata.get("licence", licence),
        **{key: metadata.get(key, value) for key, value in _DEFAULTS[target].items()},
        "task": _DEFAULTS[target]["task"],
    }
    return record | {key: json.loads(metadata[key]) for key in _JSON_ENTRIES if key in metadata}


def _check_aligner(path: Path, keypoint_recognition: str | Path | None) -> None:
    _load_graph(path, "aligner")
    if read_metadata(path).get("detector") != DFA_DETECTOR:
        raise PackError(f"aligner must be a DFA exported as a detector, {path} is not; write it with export_detector")
    if keypoint_recognition is None:
        raise PackError("aligner refines keypoints for keypoint_recognition, which is not given; leave it out")


def _check_detector(path: Path) -> None:
    graph = _load_graph(path, "detector")
    outputs = len(graph.output)
    if outputs not in DETECTOR_OUTPUTS:
        raise PackError(
            f"detector {path} must have 9 or 15 outputs (score, box and landmarks of 3 or 5 strides), got {outputs}: "
            + (
                "it gives no landmarks, and faces cannot be aligned"
                if outputs >= 5
                else "it is no SCRFD-style detector"
            )
        )
    _check_route(path, "detection")


def _check_recognition(path: Path) -> None:
    graph = _load_graph(path, "recognition")
    initializers = {initializer.name for initializer in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in initializers]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise PackError(
            f"recognition {path} must have one input and one output for the stock loader, got {len(inputs)} and "
            f"{len(graph.output)}; export it with image_only=True"
        )
    route = _check_route(path, "recognition")
    expected = read_metadata(path)
    if expected and (route.input_mean, route.input_std) != (float(expected["mean"]), float(expected["std"])):
        names = [node.name for node in graph.node[:8] if node.name.startswith(("Sub", "Mul", "_minus", "_mul"))]
        raise PackError(
            f"recognition {path}: the stock loader would feed it mean {route.input_mean} and std {route.input_std} "
            f"because of the node names {names} among the first eight; rename these nodes"
        )


def _check_route(path: Path, task: str):
    route = stock_route(path)
    if route.task != task:
        raise PackError(f"{path} must be routed as {task} by insightface.model_zoo, it takes it for {route.kind}")
    return route


def _load_graph(path: Path, role: str) -> onnx.GraphProto:
    if not path.is_file():
        raise PackError(f"{role} must be an ONNX file, {path} does not exist")
    try:
        return onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise PackError(f"{role} must be an ONNX file, {path} is not ({type(error).__name__})") from error
