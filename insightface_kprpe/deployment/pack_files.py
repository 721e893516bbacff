"""The last step of building a pack: files are put in place, described, and tested there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from ..files import atomic_folder
from ..fingerprint import file_sha256
from ..packs.layout import ALIGNER, DETECTION, DETECTOR_OUTPUTS, KEYPOINT_RECOGNITION, MANIFEST, RECOGNITION, PackError
from ..packs.metadata import DFA_DETECTOR, load_onnx, metadata_of, minimal_runtime, save_onnx
from ..packs.routing import stock_route
from .installed_packs import faults
from .pack_sources import FoundFile

logger = logging.getLogger(__name__)

FORMAT = "insightface-kprpe pack"
_LANDMARKS = "(faces, 5, 2) pixels of the image: left eye, right eye, nose, left and right mouth corner as seen in it"
# The record of a file that does not describe itself: InsightFace feeds all detectors in the same way.
_DETECTOR = {"colour_order": "RGB", "keypoint_convention": _LANDMARKS}
_RECOGNIZER = {key: "unknown" for key in ("architecture", "colour_order", "mean", "std", "keypoint_convention")}
_DEFAULTS = {
    DETECTION: {"task": "detection", "architecture": "SCRFD", **_DETECTOR},
    ALIGNER: {"task": "aligner", "architecture": "DFA", **_DETECTOR},
    RECOGNITION: {"task": "recognition", **_RECOGNIZER},
    KEYPOINT_RECOGNITION: {"task": "recognition", **_RECOGNIZER},
}
_DETECTORS = {DFA_DETECTOR: "DFA", "retinaface": "RetinaFace"}  # export_detector's metadata, as text
_JSON_ENTRIES = ("evaluation", "change")  # that metadata hold as JSON
# The first release whose SCRFD reads outputs with a batch dimension.
BATCHED_SINCE = "1.0.1"


def check_folder(name: str, root: str | Path) -> Path:
    """The folder of a pack, if this package may write to it.

    Raises:
        PackError: the name is not a folder name, the folder is a pack of another program, or the root is not a folder.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise PackError(f"name must be a plain folder name, got {name!r}")
    folder = Path(root).expanduser() / "models" / name
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise PackError(f"root must be a folder, but {there} is a file; give another one with --root")
    if not os.access(there, os.W_OK):
        raise PackError(f"root must be writable, but {there} is not; give another one with --root")
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise PackError(f"{folder} exists and was not built by this package; choose another name or remove it")
    return folder


def check_detector(path: str | Path) -> None:
    """Refuse a file that is not a face detector with landmarks, and warn about hosts that cannot read it.

    Raises:
        PackError: it is none.
        ValueError: onnxruntime does not load it.
    """
    graph = _graph(path, "detector")
    outputs = len(graph.output)
    if outputs not in DETECTOR_OUTPUTS:
        raise PackError(
            f"detector {path} must have 9 or 15 outputs (score, box and landmarks of 3 or 5 strides), got {outputs}: "
            + (
                "it gives no landmarks, so faces cannot be aligned"
                if outputs >= 5
                else "it is not an SCRFD-style detector"
            )
        )
    # With weights in a second file it may not work before they are merged into one in the pack; the last step tests it
    # there.
    if not _in_two_files(path) and (route := stock_route(path)).task != "detection":
        raise PackError(f"{path} must be loaded as a detector by insightface.model_zoo, got {route.kind}")
    if is_batched(graph):
        logger.warning(
            "detector %s has outputs with a batch dimension, which insightface before %s cannot read; older versions "
            "need "
            "another detector",
            path,
            BATCHED_SINCE,
        )


def is_batched(graph: onnx.GraphProto) -> bool:
    """Whether a detector's outputs have a batch dimension: (B, anchors, D) instead of (anchors, D)."""
    return len(graph.output[0].type.tensor_type.shape.dim) == 3


def check_recognition(path: str | Path) -> bool:
    """Refuse a file that is not a recognition model; returns whether it takes keypoints.

    Raises:
        PackError: it has other inputs or outputs.
    """
    graph = _graph(path, "recognition")
    initializers = {initializer.name for initializer in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in initializers]
    with_keypoints = inputs == ["images", "keypoints"]
    if (len(inputs) != 1 and not with_keypoints) or len(graph.output) != 1:
        raise PackError(
            f"recognition {path} must have one output and the input images, or images and keypoints, got "
            f"{', '.join(inputs) or 'no input'} and {len(graph.output)} outputs"
        )
    return with_keypoints


def _graph(path: str | Path, role: str) -> onnx.GraphProto:
    try:
        return load_onnx(path, weights=True).graph
    except (FileNotFoundError, ValueError) as error:
        raise PackError(f"{role} must be an ONNX file: {error}") from error


def install(name: str, folder: Path, files: Mapping[str, FoundFile]) -> Path:
    """Assemble files into a pack, test every one in place, and publish it.

    Args:
        name: of the pack.
        folder: of the pack; one of ours is replaced.
        files: by their names in the pack.

    Returns:
        ``folder``.

    Raises:
        PackError: a file is not taken by InsightFace as intended, or does not work; nothing was published.
    """
    with atomic_folder(folder) as temporary:
        records = {}
        for target, found in files.items():
            (temporary / target).parent.mkdir(exist_ok=True)
            copy_whole(found.path, temporary / target)
            records[target] = _record(temporary / target, target, found)
        manifest = {"name": name, "format": FORMAT, "files": records}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if problems := faults(temporary):
            raise PackError(f"the pack was not built: {'; '.join(problems)}")
    return folder


def copy_whole(source: Path, target: Path) -> None:
    """Copy an ONNX file; weights in a second file next to it are merged into the copy."""
    if _in_two_files(source):
        save_onnx(load_onnx(source, weights=True), target)
    else:
        shutil.copyfile(source, target)


def _in_two_files(path: str | Path) -> bool:
    return any(onnx.external_data_helper.uses_external_data(tensor) for tensor in load_onnx(path).graph.initializer)


def _record(path: Path, target: str, found: FoundFile) -> dict[str, Any]:
    """The manifest's record of a file: its own metadata, completed by what is known of its kind."""
    model = load_onnx(path)
    metadata = metadata_of(model)
    if metadata.get("detector") in _DETECTORS:
        metadata = {"architecture": _DETECTORS[metadata["detector"]], **metadata}
    defaults = _DEFAULTS.get(target) or {"task": stock_route(path).task, "architecture": "unknown"}
    record = {
        "sha256": file_sha256(path),
        "source": metadata.get("source", found.source),
        "precision": metadata.get("precision", "fp32"),
        "licence": found.licence,
        "onnxruntime": f">= {minimal_runtime(model)}",
        **{key: metadata.get(key, value) for key, value in defaults.items()},
        "task": defaults["task"],
    }
    if target == DETECTION and is_batched(model.graph):
        record["insightface"] = f">= {BATCHED_SINCE}"
    return record | {key: json.loads(metadata[key]) for key in _JSON_ENTRIES if key in metadata}
