"""Networks that are built for the weights they get: of a training run, or of a file and a name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn

from ..backbones import get_model
from ..state_dict import ALIGNER_PREFIX, load_weights, read_state_dict, strip_prefixes


def load_run(folder: str | Path) -> nn.Module:
    """The network that a training run left in its output folder (``config.json`` and ``model.pt``), in eval mode.

    Raises:
        ValueError: the folder holds no run of a recognition network.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.pt").is_file():
        raise ValueError(f"model must be the output folder of a training run (config.json and model.pt), got {folder}")
    config = json.loads((folder / "config.json").read_text())
    if missing := {"network", "network_kwargs", "embedding_size"} - set(config):
        raise ValueError(f"{folder} is no run of a recognition network: its config.json has no {sorted(missing)[0]}")
    settings = {"num_features": config["embedding_size"], **config["network_kwargs"]}
    return load_network(folder / "model.pt", config["network"], **settings)


def load_network(weights: str | Path | Mapping[str, torch.Tensor], network: str, **settings) -> nn.Module:
    """A network with the weights of a file, in eval mode.

    Args:
        weights: what :func:`read_state_dict` reads, or a state dict.
        network: a registered name, see :func:`~insightface_kprpe.backbones.list_models`.
        **settings: of the network; the length of embeddings is that of the weights where it is not among them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit, or there is no such network.
    """
    state = strip_prefixes(weights if isinstance(weights, Mapping) else read_state_dict(weights))
    last = state.get("feature.2.weight")
    if last is not None:
        settings.setdefault("num_features", last.shape[0])
    aligner = {key[len(ALIGNER_PREFIX) :]: value for key, value in state.items() if key.startswith(ALIGNER_PREFIX)}
    if aligner:  # the file that training took it from may be gone
        settings["dfa_weights"] = aligner
    return load_weights(get_model(network, **settings), weights).eval()
