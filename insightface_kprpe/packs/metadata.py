"""The metadata of ONNX files: their input format, origin, license, and requirements."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

from ..files import atomic_path, user_file

METADATA_PREFIX = "insightface_kprpe."
DFA_DETECTOR = "dfa"  # metadata of a detector that finds the one face of a crop
KEYPOINT_CONVENTION = (
    "(batch, 5, 2) float32, x y in [0, 1] of the input crop (pixel / 112): left eye, right eye, nose, left and "
    "right mouth corner as seen in the image"
)
# The oldest onnxruntime that takes a file of at most this opset and IR version; newer ones are not in the table.
_RUNTIMES = (((18, 8), "1.14"), ((20, 9), "1.17"), ((21, 10), "1.18"))


def load_onnx(path: str | Path, weights: bool = False) -> onnx.ModelProto:
    """An ONNX model.

    Args:
        path: the file.
        weights: also load those in other files next to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or of another kind, or a file that it needs is missing.
    """
    path = user_file(path, "ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=weights)
        whole = model.ir_version > 0 and len(model.graph.node) > 0  # an empty message parses, too
    except Exception as error:  # protobuf's and onnx's own types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} could not be read as ONNX ({reason}); copy or export it again") from error
    if not whole:
        raise ValueError(f"{path} could not be read as ONNX (it holds no graph); copy or export it again")
    return model


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a file of this package; empty for other ONNX files.

    Raises:
        FileNotFoundError, ValueError: see :func:`load_onnx`.
    """
    return metadata_of(load_onnx(path))


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """The same for a model in memory."""
    prefix = METADATA_PREFIX
    # Text that is not UTF-8 comes as bytes; this package writes none.
    texts = [p for p in model.metadata_props if isinstance(p.key, str) and isinstance(p.value, str)]
    return {p.key[len(prefix) :]: p.value for p in texts if p.key.startswith(prefix)}


def input_convention(metadata: Mapping[str, str], path: str | Path) -> tuple[float, float]:
    """Mean and std by which a file of this package wants its pixels normalized.

    Args:
        metadata: of the file.
        path: of the file, for the message.

    Raises:
        ValueError: it does not say them, or they are no numbers to divide by.
    """
    try:
        mean, std = float(metadata["mean"]), float(metadata["std"])
        if math.isfinite(mean) and 0 < std < math.inf:
            return mean, std
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{path} does not say how to normalize its input (mean and std); export it again")


def add_metadata(path: str | Path, entries: Mapping[str, str | None]) -> None:
    """Store more in a file, for :func:`read_metadata`; entries of the same name are replaced, or removed by None."""
    model = load_onnx(path, weights=True)
    set_metadata(model, entries)
    save_onnx(model, path)


def set_metadata(model: onnx.ModelProto, entries: Mapping[str, str | None]) -> None:
    """The same for a model in memory."""
    named = {METADATA_PREFIX + key: value for key, value in entries.items()}
    kept = [prop for prop in model.metadata_props if prop.key not in named]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in named.items():
        if value is not None:
            model.metadata_props.add(key=key, value=str(value))


def save_onnx(model: onnx.ModelProto, path: str | Path) -> None:
    """Write a model as one file, in the lowest IR version that its opset allows; older runtimes then load it."""
    model.ir_version = min(model.ir_version, onnx.helper.find_min_ir_version_for(model.opset_import, True))
    for node in model.graph.node:
        del node.metadata_props[:]  # the origin in Python code, which that IR version does not support
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))


def minimal_runtime(model: onnx.ModelProto) -> str:
    """The oldest onnxruntime that runs a model, as "1.14"; "unknown" for files of a newer format than torch exports."""
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    ir_version = model.ir_version
    if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer):
        ir_version = max(
            ir_version, 9
        )  # 1.16 and older do not support LayerNormalization of opset 18 in half precision
    fitting = (version for (most, ir), version in _RUNTIMES if opset <= most and ir_version <= ir)
    return next(fitting, "unknown")
