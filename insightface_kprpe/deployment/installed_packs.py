"""Installed packs: describe them, verify that they are unchanged, and remove them."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from insightface.app.common import Face

from ..data.synthetic import draw_face
from ..fingerprint import file_sha256
from ..inference.models import OnnxEmbedder
from ..packs.layout import (
    ALIGNER,
    DETECTION,
    INSIGHTFACE_PACK,
    KEYPOINT_RECOGNITION,
    MANIFEST,
    RECOGNITION,
    PackError,
    onnx_files,
    read_manifest,
)
from ..packs.metadata import input_convention, load_onnx, read_metadata
from ..packs.routing import stock_model, stock_route
from .precision import format_change

# As InsightFace names them; for other files the manifest has the task.
_TASKS = {DETECTION: "detection", ALIGNER: "detection", RECOGNITION: "recognition"}
_BUILT = (DETECTION, ALIGNER, RECOGNITION, KEYPOINT_RECOGNITION)
_PICTURE = 320  # pixels, of the drawn face that a detector is tried on


def describe(folder: Path) -> str:
    """A pack as text: for ours the manifest, for others what InsightFace loads the files as."""
    if not (folder / MANIFEST).is_file():
        lines = [f"{folder}: not built by this package; InsightFace loads its files as"]
        for path in onnx_files(folder, deep=True):
            try:
                route = stock_route(path)
                taken = f"{route.task or 'nothing'} ({route.kind})"
            except ValueError as error:
                taken = str(error).removeprefix(f"{path} ")
            lines.append(f"  {path.relative_to(folder)}: {taken}")
        return "\n".join(lines)
    manifest = read_manifest(folder)
    lines = [f"{folder}: pack {manifest['name']}"]
    for name, record in manifest["files"].items():
        path = folder / name
        lines.append(f"\n{name} ({f'{path.stat().st_size / 1e6:.1f} MB' if path.is_file() else 'missing'})")
        lines += [f"  {key:<12} {value}" for key, value in _facts(record).items()]
    return "\n".join(lines)


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    facts = {key: record[key] for key in ("task", "architecture", "precision") if key in record}
    if "colour_order" in record:
        scale = f", (pixel - {record['mean']}) / {record['std']}" if record.keys() >= {"mean", "std"} else ""
        facts["colors"] = record["colour_order"] + scale
    facts["keypoints"] = record.get("keypoint_convention", "unknown")
    if "change" in record:
        facts["change"] = format_change(record["change"])
    if "evaluation" in record:
        result = record["evaluation"]
        facts["evaluated"] = f"{result['accuracy']:.2f} % on {result['set']} ({result['pairs']} pairs)"
        facts["thresholds"] = format_thresholds(result["thresholds"])
    needs = [f"{key} {record[key]}" for key in ("onnxruntime", "insightface") if key in record]
    if needs:
        facts["needs"] = ", ".join(needs)
    return facts | {"source": record["source"], "licence": record["licence"], "sha256": record["sha256"]}


def format_thresholds(thresholds: Mapping[str, float]) -> str:
    """Cosine thresholds by false positive rate, from JSON, as text."""
    shown = ", ".join(f"cosine {value:.4f} at FPR {float(fpr):g}" for fpr, value in thresholds.items())
    return shown or "none: the set has too few pairs of different people"


def verify(folder: Path) -> list[str]:
    """Check that a pack's files are unchanged, are loaded as intended, and work.

    Args:
        folder: of the pack.

    Returns:
        Problems, one sentence each; empty if there are none.

    Raises:
        PackError: it is not a pack of this package.
    """
    added = [f"{name} was added after the pack was built; move it elsewhere" for name in added_files(folder)]
    return added + faults(folder)


def added_files(folder: Path) -> list[str]:
    """The ONNX files of a pack that its manifest does not list."""
    listed = read_manifest(folder)["files"]
    names = [path.relative_to(folder).as_posix() for path in onnx_files(folder, deep=True)]
    return [name for name in names if name not in listed]


def faults(folder: Path) -> list[str]:
    """Problems with the files that a pack's manifest lists, one sentence each."""
    problems, embeddings = [], {}
    for name, record in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing; build the pack again")
        elif file_sha256(path) != record["sha256"]:
            problems.append(f"{name} has changed since the pack was built; build it again")
        else:
            try:
                embeddings[name] = _try(path, name, record.get("task"))
            except Exception as error:  # onnxruntime and protobuf raise all kinds of errors
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                problems.append(f"{name} does not work: {reason.removeprefix(f'{path} ')}")
    lengths = {name: value.shape[-1] for name, value in embeddings.items() if value is not None}
    if len(set(lengths.values())) > 1:
        problems.append(f"recognition files disagree on the length of embeddings: {lengths}")
    return problems


def rebuild_command(folder: Path) -> str:
    """The command that rebuilds a pack, as far as its manifest records it; the rest is in capitals."""
    try:
        files = read_manifest(folder)["files"]
    except PackError:
        files = {}
    # The version with keypoints, which only networks without keypoints lack.
    recognition = files.get(KEYPOINT_RECOGNITION, files.get(RECOGNITION, {}))
    detection, aligner = files.get(DETECTION, {}), files.get(ALIGNER, {})
    pack, _, file = detection.get("source", "").partition("/")
    known = file and pack != folder.name and (INSIGHTFACE_PACK.fullmatch(pack) or (folder.parent / pack).is_dir())
    detector = pack if known else "PATH_TO_DETECTOR.onnx"
    if detection.get("architecture") == "DFA":
        detector, aligner = "dfa", detection
    words = ["insightface-kprpe", "pack", _known(recognition, "RUN"), "--detector", detector]
    # A built-in aligner comes with the network.
    if aligner and aligner["source"] != recognition.get("source"):
        words += ["--aligner", _known(aligner, "PATH_TO_DFA")]
    if recognition.get("precision", "fp32") != "fp32":
        words += ["--precision", recognition["precision"]]
    if "evaluation" in recognition:
        words += ["--evaluate", f"{recognition['evaluation']['set']}.bin"]
    others = [record for name, record in files.items() if name not in _BUILT and "task" in record]
    extras = {record["task"]: record["source"] for record in others}
    if extras:
        words += ["--with", ",".join(extras), "--from", next(iter(extras.values())).partition("/")[0]]
    return shlex.join([*words, "--name", folder.name, "--root", str(folder.parent.parent)])


def _known(record: Mapping[str, Any], placeholder: str) -> str:
    """Where weights came from; for an ONNX file the manifest has only its name."""
    source = record.get("source", "").partition(", converted from ")[0]
    unnamed = source in ("", "the aligner", "the network") or source.endswith(".onnx")
    return placeholder if unnamed else source


def _try(path: Path, name: str, task: str | None) -> np.ndarray | None:
    """Run a file once as InsightFace does; returns a recognition file's embedding of a drawn face."""
    if name == KEYPOINT_RECOGNITION:
        return _embed_with_keypoints(path)
    model = stock_model(path)
    task = _TASKS.get(name, task)
    if model is None or model.taskname != task:
        raise PackError(f"InsightFace loads it as {'nothing' if model is None else model.taskname}, not {task}")
    if task == "recognition":
        return _embed(model, read_metadata(path))
    picture, keypoints = draw_face(0, 0, size=_PICTURE)
    picture = np.ascontiguousarray(picture[..., ::-1])
    if task == "detection":
        fixed = model.input_size is not None
        model.prepare(-1, input_size=model.input_size if fixed else (_PICTURE, _PICTURE), det_thresh=0.5)
        model.detect(picture)
    else:
        whole = np.array([0, 0, _PICTURE, _PICTURE], np.float32)
        model.get(picture, Face(bbox=whole, kps=keypoints * _PICTURE, det_score=1.0))
    return None


def _embed(model: Any, metadata: Mapping[str, str]) -> np.ndarray:
    """InsightFace's embedding of a drawn face, if it feeds the file as the file expects."""
    path = model.model_file
    if "mean" in metadata and (model.input_mean, model.input_std) != input_convention(metadata, path):
        names = [node.name for node in load_onnx(path).graph.node[:8]]
        names = [name for name in names if name.startswith(("Sub", "Mul", "_minus", "_mul"))]
        raise PackError(
            f"InsightFace would feed it mean {model.input_mean} and std {model.input_std} because of the node names "
            f"{names} among the first eight; rename these nodes"
        )
    image, _ = draw_face(0, 0)
    return _finite(model.get_feat(np.ascontiguousarray(image[..., ::-1])))


def _embed_with_keypoints(path: Path) -> np.ndarray:
    if read_metadata(path).get("inputs") != "images+keypoints":
        raise PackError("it does not take images and keypoints")
    image, keypoints = draw_face(0, 0)
    images = torch.tensor(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    return _finite(OnnxEmbedder(path)(images, torch.tensor(keypoints)[None].float()).numpy())


def _finite(embedding: np.ndarray) -> np.ndarray:
    if not np.isfinite(embedding).all():
        raise PackError("its embedding of a synthetic face is not finite")
    return embedding


def remove(folder: Path) -> None:
    """Delete a pack that this package built.

    Args:
        folder: of the pack.

    Raises:
        PackError: it was not built by this package, or holds files that the pack does not list; nothing was deleted.
    """
    listed = {*read_manifest(folder)["files"], MANIFEST}
    others = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
    others = [name for name in others if name not in listed]
    if others:
        raise PackError(
            f"{folder} also holds {', '.join(others[:5])}, which the pack does not list; move them elsewhere"
        )
    # Under a name that the next build of the pack sweeps: a kill must not leave half a pack that nobody owns to.
    trash = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    os.replace(folder, trash / folder.name)
    shutil.rmtree(trash)
