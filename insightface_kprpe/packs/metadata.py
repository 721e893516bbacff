"""What ONNX files of this package say of themselves: how to feed them, what they are of, their licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from ..files import atomic_path

METADATA_PREFIX = "insightface_kprpe."
DFA_DETECTOR = "dfa"  # what the metadata say of a detector that finds the one face of a crop
KEYPOINT_CONVENTION = (
    "(batch, 5, 2) float32, x y in [0, 1] of the input crop (pixel / 112): left eye, right eye, nose, left and "
    "right mouth corner as seen in the image"
)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a file of this package says of itself; empty for other ONNX files."""
    model = onnx.load(str(path), load_external_data=False)
    prefix = METADATA_PREFIX
    return {p.key[len(prefix) :]: p.value for p in model.metadata_props if p.key.startswith(prefix)}


def add_metadata(path: str | Path, entries: Mapping[str, str]) -> None:
    """Store more in a file, for :func:`read_metadata`; entries of the same name are replaced."""
    model = onnx.load(str(path))
    set_metadata(model, entries)
    with atomic_path(path) as temporary:
        onnx.save(model, str(temporary))


def set_metadata(model: onnx.ModelProto, entries: Mapping[str, str]) -> None:
    """The same for a model in memory."""
    named = {METADATA_PREFIX + key: str(value) for key, value in entries.items()}
    kept = [prop for prop in model.metadata_props if prop.key not in named]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in named.items():
        model.metadata_props.add(key=key, value=value)
