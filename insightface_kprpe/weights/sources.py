"""Networks from published weights: arcface_torch's, CVLface's, and CVLface's on the Hugging Face Hub.

A folder's description of its network (``model.yaml``, ``config.json``) is checked against the tensors. Nothing is
executed: YAML and JSON are read as data, weights as tensors.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.nn as nn

from ..backbones import Backbone, VisionTransformer, get_model, list_models
from ..dfa import DFA
from ..dfa.weights import network_of
from ..documents import HEADER, description_beside
from ..files import atomic_folder, atomic_path
from ..fingerprint import file_sha256
from ..hub import FORM, fetch_snapshot, is_hub_source, only_weights
from ..packs.metadata import KEYPOINT_CONVENTION
from ..state_dict import FoundWeights, check_turned_once, find_weights, list_names, read_state_dict
from .architecture import (
    LANDMARK_NETWORK,
    Architecture,
    check_network,
    embedding_length,
    named_network,
    names_by_tensors,
    read_architecture,
)
from .cvlface import config_of_yaml
from .description import Description
from .network import check_config, load_network, sketch

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.pt")
_FILE_SUFFIXES = (".pt", ".pth", ".onnx", ".bin")  # that nobody gives to a folder
_ALIGNER_KEYS = ("body", "aggregator", "image_size")


def load_published(
    source: str | Path,
    network: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
    licence: str | None = None,
) -> tuple[nn.Module, Description]:
    """Load a published network in eval mode.

    Args:
        source: arcface_torch's ``model.pt``; a CVLface folder (``model.pt``, ``model.yaml``); a snapshot of a CVLface
            model on the Hub (``model.safetensors``, ``pretrained_model/model.yaml``), or on the Hub itself
            "hf:owner/name[/path][@revision]";
            what :func:`convert` wrote; an output folder of this package's training. All of them by the folder, or by
            the weights file in it.
        network: name of the backbone; None: from the description next to the weights, else from their shapes.
        cache: where downloads are kept; None: ``huggingface_hub``'s own place.
        offline: download nothing.
        licence: of the weights; None: what the source says.

    Returns:
        A recognition network or a ``DFA``, and what it is.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: the source is on the Hub and ``huggingface_hub`` is not installed.
        RuntimeError: the download failed.
        ValueError: the weights are damaged, are not those of a network of this package, or do not match the folder's
            description; the message says what they are.
    """
    name, card = str(source), None
    if is_hub_source(source):
        source, name, card = fetch_snapshot(source, cache, offline)
    folder, weights = locate_weights(Path(source))
    content, beside = description_beside(weights)
    config, kind = _read_config(content, beside)
    found = _network_in(read_state_dict(weights), weights)
    state = found.tensors
    if network is not None:
        config, kind = {"network": network, "network_kwargs": {}}, "weights, with the network's name given"
    elif "network" not in config and (by_tensors := _name_by_tensors(found, weights)):
        config, kind = config | {"network": by_tensors}, "AdaFace" if by_tensors.startswith("ir_") else kind
    before = config.get("published", {})  # what it was before convert()
    build = _build_aligner if LANDMARK_NETWORK in state else _build_recognizer
    try:
        net, facts = build(state, config, f"{weights} ({kind})")
    except ValueError as error:
        raise ValueError(str(error).replace("state dict", str(weights), 1)) from error
    check_turned_once(net, content, str(weights))
    if str(content.get("color_space")).upper() == "BGR":
        facts["color_order"] += " (the first layer was converted from BGR)"
    return net, Description(
        source=f"{name}, converted from {before['source']}" if "source" in before else name,
        format=kind,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        sha256=file_sha256(weights),
        licence=licence or before.get("licence") or _licence(folder) or (card and _licence(card)) or "unknown",
        **facts,
    )


def _network_in(state: dict[str, torch.Tensor], weights: Path) -> FoundWeights:
    """The network's tensors in a file; everything else is logged."""
    try:
        found = find_weights(state)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    if found.others:
        logger.warning("%s: the network is under %r; left out: %s", weights, found.prefix, list_names(found.others))
    return found


def _is_of_adaface(found: FoundWeights) -> bool:
    """Whether this is a checkpoint of AdaFace's training, which is in BGR: the network as ``model``, then the head."""
    return found.prefix == "model." and any(name.startswith("head.") for name in found.others)


def _name_by_tensors(found: FoundWeights, weights: Path) -> str | None:
    """The registered network, ViTs of this package aside, that has these tensors; None if there is none."""
    names = names_by_tensors(found.tensors)
    if len(names) > 1 and _is_of_adaface(found):
        names = [name for name in names if name.startswith("ir_")]
    if len(names) > 1:
        raise ValueError(
            f"{weights} holds the weights of {' or '.join(names)}, which have the same tensors and differ only in "
            "their input; specify which with network=NAME (--network NAME): ir_18 to ir_101 are for AdaFace's weights "
            "(BGR), cvlface_ir18 to cvlface_ir101 for CVLface's (RGB)"
        )
    return names[0] if names else None


def convert(net: nn.Module, description: Description, out: str | Path) -> Path:
    """Write a network so that this package, arcface_torch, and any reader of safetensors can load it.

    Args:
        net: what :func:`load_published` returned.
        description: likewise.
        out: "NAME.safetensors" for one file that also holds the description; else a folder with arcface_torch's
            ``model.pt`` and a ``config.json``, as training leaves it, which ``export``, ``evaluate`` and ``pack``
            accept.

    Returns:
        ``out``.

    Raises:
        ValueError: the folder exists or is named as a file, or cannot describe the network.
    """
    out = Path(out)
    if out.suffix in _FILE_SUFFIXES:
        raise ValueError(f"OUT must be NAME.safetensors or a new folder, which will hold model.pt, got {out}")
    record = {**description.config, "published": {k: v for k, v in asdict(description).items() if k != "config"}}
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    if out.suffix == ".safetensors":
        from safetensors.torch import save_file

        with atomic_path(out) as temporary:
            try:
                save_file(state, temporary, {HEADER: json.dumps(record)})
            except Exception as error:  # of the library's own type, also where the disk is full
                raise OSError(f"{out} could not be written ({str(error).splitlines()[0]})") from error
        return out
    if out.exists():
        raise ValueError(f"OUT must not exist yet, {out} does; choose another name or remove it")
    if not description.config:
        raise ValueError("RetinaFace's own weights cannot be written as a training run; choose OUT.safetensors")
    with atomic_folder(out) as temporary:
        try:
            torch.save(state, temporary / "model.pt")
        except RuntimeError as error:  # torch's, where the disk is full
            raise OSError(f"{out} could not be written ({str(error).splitlines()[0]}); is the disk full?") from error
        (temporary / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    return out


def locate_weights(source: Path) -> tuple[Path, Path]:
    """The folder that describes the network, and the weights file.

    Raises:
        FileNotFoundError: there is no such file or folder, or it holds no weights.
        ValueError: it is an ONNX file, or a folder with several weights files.
    """
    source = source.expanduser()
    if source.suffix == ".onnx":
        raise ValueError(
            f"{source} is an ONNX file, not weights; evaluate, embed, recognize and pack accept it directly"
        )
    if source.is_file():
        return (source.parent.parent if source.parent.name == "pretrained_model" else source.parent), source
    if not source.is_dir():
        raise FileNotFoundError(f"weights not found: {source} is neither a file nor a folder (on the Hub: {FORM})")
    for folder in (source, source / "pretrained_model"):
        for name in WEIGHTS:
            if (folder / name).is_file():
                return source, folder / name
    checkpoints = sorted(str(path.parent) for path in source.glob("checkpoints/*/model.pt"))
    if checkpoints:
        raise FileNotFoundError(f"{source} holds no {' or '.join(WEIGHTS)}; did you mean {checkpoints[-1]}?")
    files = [path.name for path in source.iterdir() if path.is_file()]
    return source, source / only_weights(files, PurePosixPath(), str(source))


def _read_config(content: dict[str, Any], beside: Path | None) -> tuple[dict[str, Any], str]:
    """The description of the network, in the terms of this package's ``config.json``, and its kind of source."""
    if beside is None:
        return {}, "weights alone"
    converted = beside.suffix == ".safetensors"  # its own header
    if converted or "network" in content or "aggregator" in content:
        check_config(content, beside)
        before = content.get("published", {})
        if not isinstance(before, dict) or not all(
            isinstance(before.get(key, ""), str) for key in ("source", "licence")
        ):
            raise ValueError(f"{beside}: published must be an object of strings, got {before!r:.40}")
        return (
            content,
            "converted by this package" if converted else "a training run of this package",
        )
    on_hub = beside.parent.name == "pretrained_model" or beside.name == "config.json"
    config = config_of_yaml(content, beside)
    check_config(config, beside)
    return config, "CVLface on Hugging Face" if on_hub else "CVLface"


def _build_recognizer(
    state: dict[str, torch.Tensor], config: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The recognition network, and its description."""
    try:
        architecture = read_architecture(state)
    except ValueError as error:
        if not _is_custom(config.get("network")):
            raise ValueError(f"{where}: {error}") from error
        return _build_by_name(state, config)
    if "aggregator" in config:
        raise ValueError(f"{where} claims to be an aligner, but is a {architecture.describe()}")
    if "network" not in config:
        found = named_network(architecture)
        if found is None:
            raise ValueError(
                f"{where} holds a {architecture.describe()}, which is not a named size, and weights alone do not "
                "determine "
                f"all of it; put a config.json next to it: {_config_for(architecture)}, with the closest name that "
                "`insightface-kprpe models` lists"
            )
        config = {"network": found[0], "network_kwargs": found[1]}
    changes = config.get("network_kwargs", {})
    settings = {"num_features": config.get("embedding_size", architecture.num_features), **changes}
    check_network(config["network"], settings, architecture, where)
    net = load_network(state, config["network"], **settings)
    return net, _recognition_facts(net, architecture.describe(), config["network"], changes)


def _config_for(architecture: Architecture) -> str:
    """The ``config.json`` of a network without a named size, with what weights do not determine in capitals."""
    sizes = {key: getattr(architecture, key) for key in ("depth", "embed_dim", "patch_size")}
    sizes |= {
        "num_heads": architecture.num_heads or "HEADS",
        "mlp_ratio": architecture.mlp_width / architecture.embed_dim,
    }
    return json.dumps({"network": "NAME", "network_kwargs": sizes})


def _is_custom(network: str | None) -> bool:
    """Whether a name is that of a registered network other than a ViT of this package."""
    if network not in list_models():
        return False
    with torch.device("meta"):
        return not isinstance(get_model(network), VisionTransformer)


def _build_by_name(state: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """A network other than a ViT of this package, as its registered name builds it, and its description."""
    changes = config.get("network_kwargs", {})
    length = config.get("embedding_size") or embedding_length(sketch(config["network"], changes, "state dict"), state)
    net = load_network(state, config["network"], **{"num_features": length, **changes})
    facts = _recognition_facts(net, f"{type(net).__name__}, embedding {net.num_features}", config["network"], changes)
    if net.bgr:
        facts["color_order"] += " (the network converts them to BGR for its weights)"
    return net, facts


def _recognition_facts(net: Backbone, architecture: str, network: str, changes: dict[str, Any]) -> dict[str, Any]:
    keypoints = KEYPOINT_CONVENTION if net.needs_keypoints else "none: faces must be aligned to the template"
    return {
        "task": "recognition",
        "architecture": architecture,
        "config": {"network": network, "network_kwargs": changes, "embedding_size": net.num_features},
        "color_order": "RGB in [-1, 1]",
        "keypoint_convention": "found by the network itself" if net.finds_keypoints else keypoints,
    }


def _build_aligner(
    state: dict[str, torch.Tensor], config: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The landmark network, and its description."""
    if "network" in config:
        raise ValueError(f"{where} claims to be a {config['network']}, but is a landmark network (DFA)")
    network = network_of(state)
    claimed = {key: config[key] for key in _ALIGNER_KEYS if key in config}
    found = {"body": network["body"], "aggregator": network.get("aggregator", True)}
    if wrong := [key for key in found if key in claimed and claimed[key] != found[key]]:
        raise ValueError(
            f"{where} claims {wrong[0]} {claimed[wrong[0]]}, but is a landmark network with body "
            f"{found['body']} and {'an' if found['aggregator'] else 'no'} aggregator"
        )
    try:
        net = DFA(state, **(claimed or network)).eval()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    kind = "DFA" if found["aggregator"] else "RetinaFace"
    return net, {
        "task": "aligner",
        "architecture": f"{kind}, {found['body']}, {net.image_size} pixels",
        "config": {**found, "image_size": net.image_size} if found["aggregator"] or claimed else {},
        "color_order": "RGB in [-1, 1]",
        "keypoint_convention": KEYPOINT_CONVENTION.replace("(pixel / 112)", "(of any size)"),
    }


def _licence(folder: Path) -> str | None:
    """The license in the front matter of a model card."""
    card = folder / "README.md"
    if card.is_file() and (text := card.read_text(errors="replace")).startswith("---"):
        found = re.search(r"^license: *([\w.-]+) *$", text.split("---")[1], re.MULTILINE)
        if found:
            return found[1]
    return None
