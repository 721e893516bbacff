"""CVLface's ``model.yaml``: which network a folder says it holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

# Folder of the model's code in CVLface, as yaml_path names it -> the position encoding.
_POSITIONS = {"vit": "", "vit_irpe": "_irpe", "vit_kprpe": "_kprpe"}
_OTHER_FAMILIES = ("iresnet", "iresnet_insightface", "part_fvit", "swin", "swin_kprpe")
# rpe_config's names, for files whose yaml_path is missing.
_POSITIONS_BY_RPE = {"": "", "iRPE": "_irpe", "KPRPE_shared": "_kprpe"}
_SIZES = {"small": "cvlface_vit_s", "base": "cvlface_vit_b"}
_SHARINGS = {
    "rel_keypoint_splithead_unshared": "none",
    "rel_keypoint_splithead": "layers",
    "rel_keypoint_unshared": "heads",
    "rel_keypoint": "both",
}
_DFA = "differentiable_face_aligner"
_BODIES = {"mobile0.25": "mobilenet0.25", "resnet50": "resnet50"}


def read_model_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; tags that would make objects are refused.

    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} could not be read as plain YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content


def config_of_yaml(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What a ``model.yaml`` says, in the words of this package's ``config.json``.

    Args:
        content: of the file.
        path: for messages.

    Returns:
        network, network_kwargs, embedding_size and colour_order of a recognition network, or body, aggregator and
        image_size of a DFA.

    Raises:
        ValueError: it describes a network that this package does not have.
    """
    name = content.get("name")
    if name == _DFA:
        return _aligner(content, path)
    if name not in _SIZES:
        what = f"an {name} of {_family(content)}" if _family(content) in _OTHER_FAMILIES else f"name {name!r}"
        raise ValueError(
            f"{path} describes {what}; of CVLface, this package has the ViTs (name small or base, of vit, vit_irpe or "
            "vit_kprpe) and the DFA"
        )
    rpe = content.get("rpe_config") or {}
    position = _position(content, rpe, path)
    settings: dict[str, Any] = {}
    if position == "_kprpe":
        settings = _kprpe(rpe, path)
    return {
        "network": _SIZES[name] + position,
        "network_kwargs": settings,
        "embedding_size": content.get("output_dim", 512),
        "colour_order": content.get("color_space", "RGB"),
    }


def _family(content: Mapping[str, Any]) -> str | None:
    """The folder of CVLface's models that ``yaml_path`` leads through."""
    parts = PurePosixPath(str(content.get("yaml_path", ""))).parts
    return next((part for part in parts if part in (*_POSITIONS, *_OTHER_FAMILIES)), None)


def _position(content: Mapping[str, Any], rpe: Mapping[str, Any], path: str | Path) -> str:
    family = _family(content)
    by_rpe = _POSITIONS_BY_RPE.get(rpe.get("name", ""))
    if family in _OTHER_FAMILIES or by_rpe is None:
        raise ValueError(
            f"{path} describes a {family or rpe['name']} network; of CVLface's, this package has "
            f"{', '.join(_POSITIONS)} and the DFA"
        )
    return by_rpe if family is None else _POSITIONS[family]


def _kprpe(rpe: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    fixed = {"rpe_on": "k", "method": "product", "ratio": 1.9}
    for key, value in fixed.items():
        if rpe.get(key, value) != value:
            raise ValueError(f"{path}: rpe_config.{key} must be {value}, as in the published models, got {rpe[key]}")
    if rpe.get("ctx_type") not in _SHARINGS:
        raise ValueError(
            f"{path}: rpe_config.ctx_type must be one of {', '.join(_SHARINGS)}, got {rpe.get('ctx_type')!r}"
        )
    settings = {"num_keypoints": rpe.get("num_keypoints", 5), "kprpe_sharing": _SHARINGS[rpe["ctx_type"]]}
    return {key: value for key, value in settings.items() if value not in (5, "none")}


def _aligner(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    if content.get("input_padding_ratio", 0) != 0:
        raise ValueError(f"{path}: input_padding_ratio must be 0, got {content['input_padding_ratio']}")
    if content.get("arch") not in _BODIES:
        raise ValueError(f"{path}: arch must be {' or '.join(_BODIES)}, got {content.get('arch')!r}")
    return {
        "body": _BODIES[content["arch"]],
        "aggregator": True,
        "image_size": content.get("input_size", 160),
    }
