"""Landmark networks from files: runs of ``train-dfa``, DFA weights, and RetinaFace's public weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..documents import read_json_object
from ..hub import local_source
from ..state_dict import load_weights, read_state_dict, strip_prefixes
from .aligner import DFA
from .network import RETINAFACE, RetinaFaceNet, start_from_retinaface

_WEIGHTS = (  # as CVLface's folders and its models on the Hub have them
    "model.safetensors", "model.pt", "pretrained_model/model.safetensors", "pretrained_model/model.pt",
)  # fmt: skip
MIN_SIDE, MAX_SIDE = 32, 2048  # pixels of a network's input


def load_dfa(source: str | Path | Mapping[str, torch.Tensor], *, aligned_from: str = "crop") -> DFA:
    """A trained landmark network, in eval mode.

    Args:
        source: output folder of ``train-dfa``; a weights file, or a folder of CVLface's with one, also on the Hub
            ("hf:owner/name[/path][@revision]"); or a state dict. Weights without an aggregator, of which no config says
            more, are taken for RetinaFace's public ones, whose anchors and pixels differ from DFA's.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError, RuntimeError: it is on the Hub, and huggingface_hub is not installed, or the download failed.
        ValueError: the folder holds no such run, or the weights do not fit.
    """
    state, network = _read(source)
    try:
        return DFA(state, **network).eval()
    except ValueError as error:
        raise ValueError(str(error) if isinstance(source, Mapping) else f"{source}: {error}") from error


def holds_dfa(source: str | Path) -> bool:
    """Whether a path is what :func:`load_dfa` reads: a file, or a run of ``train-dfa``."""
    config = Path(source) / "config.json"
    return Path(source).is_file() or (config.is_file() and "aggregator" in read_json_object(config))


def start_from(net: RetinaFaceNet, source: str | Path | Mapping[str, torch.Tensor]) -> None:
    """Load weights to train from; an aggregator that only one of the two has is left as it is, or left out.

    Args:
        net: with the body of the weights.
        source: as in :func:`load_dfa`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the folder holds no run of ``train-dfa``, or names or shapes differ.
    """
    state, network = _read(source)
    if "pixel_mean" in network:
        start_from_retinaface(net, state)
        return
    own = {key: value for key, value in net.state_dict().items() if key.startswith("aggregator.")}
    state = {key: value for key, value in state.items() if key in own or not key.startswith("aggregator.")}
    load_weights(net, own | state)


def _read(source: str | Path | Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights, and the arguments of ``RetinaFaceNet`` that they were trained with."""
    if isinstance(source, Mapping):
        state = strip_prefixes(source)
        return state, network_of(state)
    source = local_source(source)
    folder = source.parent if source.name == "model.pt" else source
    config = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "aggregator" in config:
        return read_state_dict(folder / "model.pt"), _checked(config, folder / "config.json")
    if "network" in config:
        raise ValueError(f"{folder} is not a run of train-dfa: its config.json has no aggregator")
    if source.is_dir():
        found = [source / name for name in _WEIGHTS if (source / name).is_file()]
        if not found:
            raise ValueError(f"{source} is not a run of train-dfa: a run has config.json and model.pt")
        source = found[0]
    return _read(read_state_dict(source))


def _checked(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The network that a run's config names, before memory is taken for it."""
    network = {key: config.get(key) for key in ("body", "aggregator", "image_size")}
    size = network["image_size"]
    if not isinstance(network["body"], str) or not isinstance(network["aggregator"], bool):
        raise ValueError(
            f"{path}: body must be a string and aggregator true or false, got {network['body']!r:.40} and "
            f"{network['aggregator']!r:.40}"
        )
    if not isinstance(size, int) or not MIN_SIDE <= size <= MAX_SIDE:
        raise ValueError(f"{path}: image_size must be {MIN_SIDE} to {MAX_SIDE} pixels, got {size!r:.40}")
    return network


def network_of(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of ``RetinaFaceNet`` that the names of the weights tell."""
    network: dict[str, Any] = {"body": "resnet50" if "body.conv1.weight" in state else "mobilenet0.25"}
    if not any(key.startswith("aggregator.") for key in state):
        network |= RETINAFACE
    return network
