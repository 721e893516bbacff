"""A FaceAnalysis model pack on disk: names of its files, its manifest, and where packs are.

::

    ROOT/models/NAME/
      detection.onnx              SCRFD layout: 9 or 15 outputs, with landmarks; a DFA serves crops of one face
      recognition.onnx            images -> embedding; what the stock loader uses
      keypoints/recognition.onnx  images + keypoints -> embedding; used after insightface_kprpe.register()
      keypoints/dfa.onnx          a DFA that refines the detector's landmarks, in the layout of a detector; likewise
      pack.json                   what every file is, its SHA-256, origin and license

The stock loader does not look into ``keypoints/``; a second detector next to the first would confuse it.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from ..documents import read_json_object

MANIFEST = "pack.json"
DETECTION, RECOGNITION = "detection.onnx", "recognition.onnx"
# Files that only this package uses are in a sub-folder: the two-input form of the recognition model, under the same
# name, and perhaps the aligner that refines keypoints.
KEYPOINT_FOLDER, ALIGNER_FILE = "keypoints", "dfa.onnx"
KEYPOINT_RECOGNITION, ALIGNER = f"{KEYPOINT_FOLDER}/{RECOGNITION}", f"{KEYPOINT_FOLDER}/{ALIGNER_FILE}"
DETECTOR_OUTPUTS = (9, 15)  # SCRFD with landmarks, on 3 or 5 strides
_NUMBERS = {"evaluation", "change"}  # entries of a file in the manifest that are not strings
INSIGHTFACE_PACK = re.compile(r"(buffalo|antelope)\w*")  # names of packs that InsightFace publishes


class PackError(ValueError):
    """A file does not fit into a pack; the message says which and why. Nothing was written."""


def find_pack(name: str | Path, root: str | Path = "~/.insightface") -> Path:
    """The folder of a pack.

    Args:
        name: of the pack in ``root/models``, or its folder.
        root: InsightFace's root folder.

    Raises:
        FileNotFoundError: there is no such pack.
    """
    for folder in (Path(root).expanduser() / "models" / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder
    models = Path(root).expanduser() / "models"
    there = sorted(path.name for path in models.glob("[!.]*") if path.is_dir()) if models.is_dir() else []
    remedy = "" if there else "; insightface-kprpe quickstart makes one, for --root work_dirs/quickstart/insightface"
    raise FileNotFoundError(
        f"pack not found: {name} is neither a folder nor a name in {root}/models, which holds "
        f"{', '.join(there) or 'none'}; use --root for another root folder{remedy}"
    )


def onnx_files(folder: Path, deep: bool = False) -> list[Path]:
    """The ONNX files of a folder, in order; hidden ones and what macOS packs beside them are none.

    Args:
        folder: of a pack.
        deep: in its sub-folders too.
    """
    found = folder.rglob("*.onnx") if deep else folder.glob("*.onnx")
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(folder).parts)
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``pack.json`` says.

    Raises:
        PackError: there is none, so another program built the pack, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise PackError(f"{folder} was not built by this package: it has no {MANIFEST}")
    try:
        manifest = read_json_object(path)
        _check_manifest(manifest)
    except ValueError as error:
        raise PackError(f"{path} is damaged ({error}); build the pack again") from error
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Refuse a manifest that other code could not handle."""
    files = manifest.get("files")
    if not isinstance(manifest.get("name"), str) or not isinstance(files, dict):
        raise ValueError("it must have a name and an object of files")
    for name, record in files.items():
        parts = PurePosixPath(name).parts
        if not name or "\\" in name or ".." in parts or PurePosixPath(name).is_absolute():
            raise ValueError(f"file names must lie in the pack's folder, got {name!r:.60}")
        if not isinstance(record, dict):
            raise ValueError(f"{name!r:.60} must have an object, got {type(record).__name__}")
        for key in {"sha256", "source", "licence"} | record.keys() - _NUMBERS:
            if not isinstance(record.get(key), str):
                raise ValueError(f"{name!r:.60} must have a string as {key}, got {record.get(key)!r:.40}")
        for key in _NUMBERS & record.keys():
            if not _numbers_as_built(record[key], key):
                raise ValueError(f"{name!r:.60} has a damaged {key}")


def _numbers_as_built(values: Any, key: str) -> bool:
    """Whether measurements have the form in which :mod:`..deployment.model_pack` writes them."""
    if not isinstance(values, dict):
        return False
    if key == "change":
        numbers = [values.get(name) for name in ("minimal_cosine", "mean_cosine", "accuracy_fp32", "accuracy")]
        return all(isinstance(number, int | float) for number in numbers) and isinstance(values.get("pairs"), str)
    thresholds = values.get("thresholds")
    return (
        isinstance(values.get("set"), str)
        and isinstance(values.get("accuracy"), int | float)
        and isinstance(values.get("pairs"), int)
        and isinstance(thresholds, dict)
        and all(isinstance(value, int | float) for value in thresholds.values())
        and all(_is_number(fpr) for fpr in thresholds)
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def load_note(path: str | Path) -> str | None:
    """One log line about a pack's file; None if it is not from a pack of this package."""
    path = Path(path)
    for folder in path.parents[:2]:
        if (folder / MANIFEST).is_file():
            name = path.relative_to(folder).as_posix()
            record = read_manifest(folder)["files"].get(name)
            if record is None:
                return None
            precision, architecture = record.get("precision", "fp32"), record.get("architecture", "unknown")
            return f"{folder.name}/{name}: {architecture}, {precision}; {record['source']}; licence {record['licence']}"
    return None
