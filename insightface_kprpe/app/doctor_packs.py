"""The packs of an InsightFace root folder: what each file is loaded as, what is not loaded and why."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx

from ..deployment.installed_packs import added_files, faults, rebuild_command
from ..packs.layout import ALIGNER_FILE, KEYPOINT_FOLDER, MANIFEST, PackError, onnx_files, read_manifest
from ..packs.metadata import DFA_DETECTOR, read_metadata
from ..packs.routing import stock_route
from .findings import BROKEN, OK, WARNING, Finding

# InsightFace decides by shapes.
_ROUTING = (
    "detection has 5 or more outputs; of the others, landmarks take squares of 192 pixels, attributes of 96, "
    "recognition of 112 or more, in steps of 16"
)


def examine_packs(root: Path) -> list[Finding]:
    """One finding for each file of each pack, and for each pack that cannot be used."""
    models = root / "models"
    folders = sorted(path for path in models.iterdir() if path.is_dir()) if models.is_dir() else []
    folders = [folder for folder in folders if not folder.name.startswith(".")]
    if not folders:
        fix = f"insightface-kprpe pack RUN --detector buffalo_l --root {root}"
        return [Finding("packs", WARNING, f"none in {models}", fix)]
    return [finding for folder in folders for finding in _examine_pack(folder)]


def _examine_pack(folder: Path) -> list[Finding]:
    name = f"pack {folder.name}"
    files = onnx_files(folder)
    if not files:
        nested = sorted({path.parent for path in onnx_files(folder, deep=True) if path.parent.parent == folder})
        if nested:
            found = f"{folder} has its files one folder too deep, where FaceAnalysis does not find them"
            return [Finding(name, BROKEN, found, f"mv {nested[0]}/*.onnx {folder}/")]
        return [Finding(name, BROKEN, f"{folder} holds no ONNX file", f"rm -r {folder}")]
    listed, manifest_findings = _examine_manifest(name, folder)
    findings, tasks = [], {}
    for path in files:
        finding, task = _examine_file(name, path, tasks, listed)
        if finding is not None:
            findings.append(finding)
        if task is not None:
            tasks.setdefault(task, path.name)
    broken = any(finding.status == BROKEN for finding in findings + manifest_findings)
    if "detection" not in tasks and not broken:
        fix = f"insightface-kprpe pack RUN --detector buffalo_l --name {folder.name} --root {folder.parent.parent}"
        findings.append(Finding(name, BROKEN, f"{folder} has no face detector, which FaceAnalysis needs", fix))
    return findings + manifest_findings


def _examine_file(
    name: str, path: Path, tasks: dict[str, str], listed: Collection[str]
) -> tuple[Finding | None, str | None]:
    """How a file is routed, or why not, unless the manifest's finding says so; and its task."""
    try:
        route = stock_route(path)
    except Exception as error:  # onnxruntime and protobuf raise all kinds of errors
        if listed:
            return None, None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"rm {path}   # then install the pack again"
        return Finding(name, BROKEN, f"{path.name} does not load: {reason}", fix), None
    if listed and path.name not in listed:
        return None, route.task
    if route.task is None:
        return Finding(name, WARNING, f"{path.name} is ignored: {why_ignored(path)}"), None
    if route.task in tasks:
        found = f"{path.name} is ignored: {tasks[route.task]}, which comes first, is the pack's {route.task} model"
        first = path.with_name(tasks[route.task])
        unused = first if path.name in listed and first.name not in listed else path
        return Finding(name, WARNING, found, f"mv {unused} {unused}.unused"), None
    return Finding(name, OK, f"{path.name}: {route.task} ({route.kind}){_after_register(path)}"), route.task


def why_ignored(path: Path) -> str:
    """Why InsightFace ignores an ONNX file."""
    graph = onnx.load(str(path), load_external_data=False).graph
    initializers = {initializer.name for initializer in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initializers]
    shapes = [
        [size.dim_value or size.dim_param or "?" for size in value.type.tensor_type.shape.dim] for value in inputs
    ]
    shown = " and ".join("x".join(str(size) for size in shape) for shape in shapes)
    outputs = "1 output" if len(graph.output) == 1 else f"{len(graph.output)} outputs"
    return f"it takes {shown} and has {outputs}; {_ROUTING}"


def _after_register(path: Path) -> str:
    """How a file of this package is loaded after ``register()``."""
    metadata = read_metadata(path)
    if metadata.get("detector") == DFA_DETECTOR:
        return "; after register() FaceAligner"
    if "inputs" not in metadata or "detector" in metadata:
        return ""
    folder = path.parent / KEYPOINT_FOLDER
    if metadata.get("inputs") == "images+keypoints":
        return "; after register() KeypointRecognizer"
    if (folder / path.name).is_file():
        refined = f", its keypoints refined by {ALIGNER_FILE}" if (folder / ALIGNER_FILE).is_file() else ""
        return f"; after register() KeypointRecognizer from {KEYPOINT_FOLDER}/{path.name}{refined}"
    return f"; the same after register(): no {KEYPOINT_FOLDER}/{path.name}"


def _examine_manifest(name: str, folder: Path) -> tuple[Collection[str], list[Finding]]:
    """The files that a pack of this package lists (none for others), and how they compare with the manifest."""
    if not (folder / MANIFEST).is_file():
        return (), []
    try:
        listed = read_manifest(folder)["files"]
    except PackError as error:
        return (), [Finding(name, BROKEN, str(error), rebuild_command(folder))]
    findings = [
        Finding(
            name, BROKEN, f"{file} was added after the pack was built", f"mv {folder / file} {folder / file}.unused"
        )
        for file in added_files(folder)
    ]
    if problems := faults(folder):
        findings.append(Finding(name, BROKEN, "; ".join(problems), rebuild_command(folder)))
    return listed, findings or [Finding(name, OK, f"the files match {MANIFEST}, and work")]
