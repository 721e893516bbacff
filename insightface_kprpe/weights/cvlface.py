"""CVLface's ``model.yaml``, which describes the network in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

# Folder of the model's code in CVLface, as yaml_path names it -> the position encoding.
_POSITIONS = {"vit": "", "vit_irpe": "_irpe", "vit_kprpe": "_kprpe"}
_OTHER_FAMILIES = ("part_fvit", "swin", "swin_kprpe")
# Folder of the code -> by the name in the file, this package's name. The second are arcface_torch's networks.
_IRESNETS = {
    "iresnet": {"ir18": "cvlface_ir18", "ir50": "cvlface_ir50", "ir101": "cvlface_ir101"},
    "iresnet_insightface": {"ir18": "r18", "ir50": "r50", "ir101": "r100"},
}
# rpe_config's names, for files whose yaml_path is missing.
_POSITIONS_BY_RPE = {"": "", "iRPE": "_irpe", "KPRPE_shared": "_kprpe"}
_SIZES = {"small": "cvlface_vit_s", "base": "cvlface_vit_b"}
_SHARINGS = {
    "rel_keypoint_splithead_unshared": "none",
    "rel_keypoint_splithead": "layers",
    "rel_keypoint_unshared": "heads",
    "rel_keypoint": "both",
}
# What to do with a network that this package does not have.
ONNX_INSTEAD = (
    "export it to ONNX where it was trained (arcface_torch: torch2onnx.py); evaluate, embed, recognize and pack accept "
    "any ArcFace ONNX file"
)
_DFA = "differentiable_face_aligner"
_BODIES = {"mobile0.25": "mobilenet0.25", "resnet50": "resnet50"}


def config_of_yaml(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The content of a ``model.yaml``, in the terms of this package's ``config.json``.

    Args:
        content: of the file.
        path: for messages.

    Returns:
        network, network_kwargs and embedding_size of a recognition network, or body, aggregator and image_size of a
        DFA.

    Raises:
        ValueError: it describes a network that this package does not have.
    """
    name = str(content.get("name"))
    if name == _DFA:
        return _aligner(content, path)
    iresnets = _IRESNETS.get(_family(content) or "iresnet", {})
    if name in iresnets:
        return {
            "network": iresnets[name],
            "network_kwargs": {},
            "embedding_size": content.get("output_dim", 512),
        }
    if name not in _SIZES:
        what = f"an {name} of {_family(content)}" if _family(content) in _OTHER_FAMILIES else f"name {name!r:.40}"
        raise ValueError(
            f"{path} describes {what}; of CVLface's networks, this package has the ViTs (name small or base, of vit, "
            "vit_irpe or "
            f"vit_kprpe), the IResNets (ir18, ir50, ir101) and the DFA; {ONNX_INSTEAD}"
        )
    rpe = content.get("rpe_config") or {}
    if not isinstance(rpe, Mapping):
        raise ValueError(f"{path}: rpe_config must be a mapping, got {type(rpe).__name__}")
    position = _position(content, rpe, path)
    settings: dict[str, Any] = {}
    if position == "_kprpe":
        settings = _kprpe(rpe, path)
    return {
        "network": _SIZES[name] + position,
        "network_kwargs": settings,
        "embedding_size": content.get("output_dim", 512),
    }


def _family(content: Mapping[str, Any]) -> str | None:
    """The folder of CVLface's models that ``yaml_path`` leads through."""
    parts = PurePosixPath(str(content.get("yaml_path", ""))).parts
    return next((part for part in parts if part in (*_POSITIONS, *_IRESNETS, *_OTHER_FAMILIES)), None)


def _position(content: Mapping[str, Any], rpe: Mapping[str, Any], path: str | Path) -> str:
    family = _family(content)
    by_rpe = _POSITIONS_BY_RPE.get(str(rpe.get("name", "")))
    if family in (*_IRESNETS, *_OTHER_FAMILIES) or by_rpe is None:
        raise ValueError(
            f"{path} describes a {family or rpe['name']} network; of CVLface's, this package has "
            f"{', '.join(_POSITIONS)} and the DFA; {ONNX_INSTEAD}"
        )
    return by_rpe if family is None else _POSITIONS[family]


def _kprpe(rpe: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    fixed = {"rpe_on": "k", "method": "product", "ratio": 1.9}
    for key, value in fixed.items():
        if rpe.get(key, value) != value:
            raise ValueError(
                f"{path}: rpe_config.{key} must be {value}, as in the published models, got {rpe[key]!r:.40}"
            )
    kind = str(rpe.get("ctx_type"))
    if kind not in _SHARINGS:
        raise ValueError(
            f"{path}: rpe_config.ctx_type must be one of {', '.join(_SHARINGS)}, got {kind!r:.40}; {ONNX_INSTEAD}"
        )
    settings = {"num_keypoints": rpe.get("num_keypoints", 5), "kprpe_sharing": _SHARINGS[kind]}
    return {key: value for key, value in settings.items() if value not in (5, "none")}


def _aligner(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    if content.get("input_padding_ratio", 0) != 0:
        raise ValueError(f"{path}: input_padding_ratio must be 0, got {content['input_padding_ratio']!r:.40}")
    arch = str(content.get("arch"))
    if arch not in _BODIES:
        raise ValueError(f"{path}: arch must be {' or '.join(_BODIES)}, got {arch!r:.40}")
    return {
        "body": _BODIES[arch],
        "aggregator": True,
        "image_size": content.get("input_size", 160),
    }
