"""Networks from published weights: arcface_torch's, CVLface's, and CVLface's on the Hugging Face Hub.

What a folder says of its network (``model.yaml``, ``config.json``) is checked against the tensors. Nothing is executed:
YAML and JSON are read as data, weights as tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..backbones import Backbone
from ..dfa import DFA
from ..dfa.weights import network_of
from ..files import atomic_folder, atomic_path
from ..fingerprint import file_sha256
from ..packs.metadata import KEYPOINT_CONVENTION
from ..state_dict import read_state_dict, strip_prefixes
from .architecture import LANDMARK_NETWORK, check_network, named_network, read_architecture
from .cvlface import config_of_yaml, read_model_yaml
from .hub import fetch_snapshot, is_hub_source
from .network import load_network

WEIGHTS = ("model.safetensors", "model.pt")
HEADER = "insightface_kprpe"  # key of what convert() writes into a .safetensors file's metadata
_FILE_SUFFIXES = (".pt", ".pth", ".onnx", ".bin")  # that nobody gives to a folder
_NETWORK_KEYS = ("network", "network_kwargs", "embedding_size")
_ALIGNER_KEYS = ("body", "aggregator", "image_size")


@dataclass(frozen=True)
class Description:
    """What a network is, and where it came from.

    Attributes:
        source: file or folder, or "hf:owner/name@commit".
        format: of the source.
        task: "recognition" or "aligner".
        architecture: for people.
        config: what ``load_run`` (or ``load_dfa``) needs to build the network.
        colour_order: of the images that the network takes.
        keypoint_convention: of the keypoints that it takes, or finds.
        parameters: how many.
        sha256: of the weights file.
        licence: of the weights.
    """

    source: str
    format: str
    task: str
    architecture: str
    config: dict[str, Any] = field(repr=False)
    colour_order: str
    keypoint_convention: str
    parameters: int
    sha256: str
    licence: str = "unknown"

    def text(self) -> str:
        """Several lines for people."""
        return "\n".join(
            f"{name:<12} {value}"
            for name, value in (
                ("source", self.source),
                ("format", self.format),
                ("task", self.task),
                ("architecture", self.architecture),
                ("network", self.config.get("network", "DFA")),
                ("parameters", f"{self.parameters:,}"),
                ("colours", self.colour_order),
                ("keypoints", self.keypoint_convention),
                ("sha256", self.sha256),
                ("licence", self.licence),
            )
        )


def load_published(
    source: str | Path,
    network: str | None = None,
    cache: str | Path | None = None,
    offline: bool = False,
    licence: str | None = None,
) -> tuple[nn.Module, Description]:
    """Load a network, whoever published it, in eval mode.

    Args:
        source: arcface_torch's ``model.pt``; a CVLface folder (``model.pt``, ``model.yaml``); a snapshot of a CVLface
            model on the Hub (``model.safetensors``, ``pretrained_model/model.yaml``) or "hf:owner/name[@revision]";
            what :func:`convert` wrote; an output folder of this package's training. All of them by the folder, or by
            the weights file in it.
        network: name of the backbone; None: what lies beside the weights says, else their shapes do.
        cache: where downloads are kept; None: ``huggingface_hub``'s own place.
        offline: download nothing.
        licence: of the weights; None: what the source says.

    Returns:
        A recognition network or a ``DFA``, and what it is.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ImportError: the source is on the Hub and ``huggingface_hub`` is not installed.
        RuntimeError: the download failed.
        ValueError: the weights are damaged, are not those of a network of this package, or are not what the folder
            says; the message tells what they are.
    """
    name = str(source)
    if is_hub_source(source):
        source, name = fetch_snapshot(source, cache, offline)
    folder, weights = _locate(Path(source))
    state = strip_prefixes(read_state_dict(weights))
    config, told = _read_config(folder, weights)
    if network is not None:
        config, told = {"network": network, "network_kwargs": {}}, "weights, with the network's name given"
    before = config.get("published", {})  # what it was before convert()
    build = _build_aligner if LANDMARK_NETWORK in state else _build_recogniser
    net, facts = build(state, config, f"{weights} ({told})")
    return net, Description(
        source=f"{name}, converted from {before['source']}" if "source" in before else name,
        format=told,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        sha256=file_sha256(weights),
        licence=licence or before.get("licence") or _licence(folder),
        **facts,
    )


def convert(net: nn.Module, description: Description, out: str | Path) -> Path:
    """Write a network so that this package, arcface_torch, and any reader of safetensors can load it.

    Args:
        net: what :func:`load_published` returned.
        description: likewise.
        out: "NAME.safetensors" for one file that also holds the description; else a folder with arcface_torch's
            ``model.pt`` and a ``config.json``, as training leaves it, which ``export``, ``evaluate`` and ``pack`` take.

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
            save_file(state, temporary, {HEADER: json.dumps(record)})
        return out
    if out.exists():
        raise ValueError(f"OUT must not exist yet, {out} does; choose another name or remove it")
    if not description.config:
        raise ValueError("RetinaFace's own weights have no training run's config.json; choose OUT.safetensors")
    with atomic_folder(out) as temporary:
        torch.save(state, temporary / "model.pt")
        (temporary / "config.json").write_text(json.dumps(record, indent=2) + "\n")
    return out


def _locate(source: Path) -> tuple[Path, Path]:
    """The folder that describes the network, and the weights file."""
    source = source.expanduser()
    if source.is_file():
        return (source.parent.parent if source.parent.name == "pretrained_model" else source.parent), source
    if not source.is_dir():
        raise FileNotFoundError(f"weights not found: {source} is no file or folder (on the Hub: hf:OWNER/NAME)")
    for folder in (source, source / "pretrained_model"):
        for name in WEIGHTS:
            if (folder / name).is_file():
                return source, folder / name
    checkpoints = sorted(str(path.parent) for path in source.glob("checkpoints/*/model.pt"))
    hint = f"; did you mean {checkpoints[-1]}?" if checkpoints else ""
    raise FileNotFoundError(f"{source} holds no weights: expected {' or '.join(WEIGHTS)} in it{hint}")


def _read_config(folder: Path, weights: Path) -> tuple[dict[str, Any], str]:
    """What is said of the network beside the weights or in them ({}: nothing), and where."""
    if weights.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(weights, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
        if header is not None:
            return json.loads(header), "converted by this package"
    beside = {}
    if (folder / "config.json").is_file():
        beside = _read_json(folder / "config.json")
        if "network" in beside or "aggregator" in beside:
            return beside, "a training run of this package"
    for path in (weights.with_suffix(".yaml"), folder / "pretrained_model" / "model.yaml", folder / "model.yaml"):
        if path.is_file():
            told = "CVLface on Hugging Face" if path.parent.name == "pretrained_model" else "CVLface"
            return config_of_yaml(read_model_yaml(path), path), told
    if isinstance(beside.get("conf"), dict):
        return config_of_yaml(beside["conf"], folder / "config.json"), "CVLface on Hugging Face"
    return {}, "weights alone"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} could not be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    return content


def _build_recogniser(
    state: dict[str, torch.Tensor], config: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The recognition network, and what to say of it."""
    try:
        architecture = read_architecture(state)
    except ValueError as error:
        if "network" in config:  # of another kind, whose weights only its own class can read
            return _build_by_name(state, config)
        raise ValueError(f"{where}: {error}") from error
    if "aggregator" in config:
        raise ValueError(f"{where} is said to be an aligner, but it is a {architecture.describe()}")
    if "network" not in config:
        found = named_network(architecture)
        if found is None:
            raise ValueError(
                f"{where} holds a {architecture.describe()}, which is no named size, and weights alone do not tell "
                "all of it; give network="
            )
        config = {"network": found[0], "network_kwargs": found[1]}
    changes = config.get("network_kwargs", {})
    settings = {"num_features": config.get("embedding_size", architecture.num_features), **changes}
    check_network(config["network"], settings, architecture, where)
    turned = config.get("colour_order", "RGB") == "BGR"
    if turned:
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flip(1)
    net = load_network(state, config["network"], **settings)
    record = (config["network"], changes, settings["num_features"])
    return net, {
        "task": "recognition",
        "architecture": architecture.describe(),
        "config": dict(zip(_NETWORK_KEYS, record, strict=True)),
        "colour_order": "RGB in [-1, 1]" + (" (the first layer was turned from BGR)" if turned else ""),
        "keypoint_convention": _keypoint_convention(net),
    }


def _build_by_name(state: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """A network that is no ViT of this package, as its registered name builds it, and what to say of it."""
    changes = config.get("network_kwargs", {})
    settings = changes | ({"num_features": config["embedding_size"]} if "embedding_size" in config else {})
    net = load_network(state, config["network"], **settings)
    return net, {
        "task": "recognition",
        "architecture": f"{type(net).__name__}, embedding {net.num_features}",
        "config": dict(zip(_NETWORK_KEYS, (config["network"], changes, net.num_features), strict=True)),
        "colour_order": "RGB in [-1, 1]",
        "keypoint_convention": _keypoint_convention(net),
    }


def _keypoint_convention(net: Backbone) -> str:
    if net.finds_keypoints:
        return "found by the network itself"
    return KEYPOINT_CONVENTION if net.needs_keypoints else "none: faces must be aligned to the template"


def _build_aligner(
    state: dict[str, torch.Tensor], config: dict[str, Any], where: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The landmark network, and what to say of it."""
    network = network_of(state)
    told = {key: config[key] for key in _ALIGNER_KEYS if key in config}
    really = {"body": network["body"], "aggregator": network.get("aggregator", True)}
    if wrong := [key for key in really if key in told and told[key] != really[key]]:
        raise ValueError(
            f"{where} is said to have {wrong[0]} {told[wrong[0]]}, but it is a landmark network with body "
            f"{really['body']} and {'an' if really['aggregator'] else 'no'} aggregator"
        )
    if "network" in config:
        raise ValueError(f"{where} is said to be a {config['network']}, but it is a landmark network (DFA)")
    net = DFA(state, **(told or network)).eval()
    kind = "DFA" if really["aggregator"] else "RetinaFace"
    return net, {
        "task": "aligner",
        "architecture": f"{kind}, {really['body']}, {net.image_size} pixels",
        "config": {**really, "image_size": net.image_size} if really["aggregator"] or told else {},
        "colour_order": "RGB in [-1, 1]",
        "keypoint_convention": KEYPOINT_CONVENTION.replace("(pixel / 112)", "(of any size)"),
    }


def _licence(folder: Path) -> str:
    """What the front matter of a model card says."""
    card = folder / "README.md"
    if card.is_file() and (text := card.read_text(errors="replace")).startswith("---"):
        found = re.search(r"^license: *([\w.-]+) *$", text.split("---")[1], re.MULTILINE)
        if found:
            return found[1]
    return "unknown"
