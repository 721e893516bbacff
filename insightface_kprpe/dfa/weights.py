"""Landmark networks from files: runs of ``train-dfa``, DFA weights, and RetinaFace's public weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..documents import read_json_object
from ..state_dict import load_weights, read_state_dict, strip_prefixes
from .aligner import DFA
from .network import RETINAFACE, RetinaFaceNet, start_from_retinaface


def load_dfa(source: str | Path | Mapping[str, torch.Tensor]) -> DFA:
    """A trained landmark network, in eval mode.

    Args:
        source: output folder of ``train-dfa``, a weights file, or a state dict. Weights without an aggregator, of which
            no config says more, are taken for RetinaFace's public ones, whose anchors and pixels differ from DFA's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the folder holds no such run, or the weights do not fit.
    """
    state, network = _read(source)
    return DFA(state, **network).eval()


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
    source = Path(source)
    folder = source.parent if source.name == "model.pt" else source
    if (folder / "config.json").is_file():
        config = read_json_object(folder / "config.json")
        if "aggregator" not in config:
            raise ValueError(f"{folder} is no run of train-dfa: its config.json says nothing of an aggregator")
        return read_state_dict(folder / "model.pt"), {key: config[key] for key in ("body", "aggregator", "image_size")}
    if source.is_dir():
        raise ValueError(f"{source} is no run of train-dfa: a run has config.json and model.pt")
    return _read(read_state_dict(source))


def network_of(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of ``RetinaFaceNet`` that the names of the weights tell."""
    network: dict[str, Any] = {"body": "resnet50" if "body.conv1.weight" in state else "mobilenet0.25"}
    if not any(key.startswith("aggregator.") for key in state):
        network |= RETINAFACE
    return network
