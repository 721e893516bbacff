"""Loading published weights into a network, strictly and without running anything that the file may contain."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn

from ..backbones import get_model

logger = logging.getLogger(__name__)

# arcface_torch writes no prefix, CVLface "net.", its Hugging Face models "model.net."; the others come from wrappers.
PREFIXES = ("model.net.", "net.", "backbone.", "module.", "_orig_mod.")
# Where a self-aligned network keeps its aligner's weights.
ALIGNER_PREFIX = "dfa."
# Training-only, so files have it or not whatever the network was built with.
_OPTIONAL = {"mask_token"}


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pt``/``.pth`` file read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds other objects than tensors, or no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights file not found: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read as weights ({_reason(error)}); expected a plain state dict"
        ) from error
    for key in ("state_dict", "model", "state_dict_backbone"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return dict(state)


def _reason(error: Exception) -> str:
    """Why a file could not be read; torch's own words where they do not advise to read it unsafely."""
    lines = str(error).strip().splitlines()
    if not lines or isinstance(error, pickle.UnpicklingError | LookupError) or "weights_only" in str(error):
        return "it is another kind of file, or holds other objects than tensors"
    return lines[0]


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the wrapper prefixes that all keys share."""
    state = dict(state)
    changed = True
    while changed and state:
        changed = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in state):
                state = {key[len(prefix) :]: value for key, value in state.items()}
                changed = True
    return state


def load_weights(net: nn.Module, source: str | Path | Mapping[str, torch.Tensor]) -> nn.Module:
    """Load weights into a network; every tensor must fit.

    Args:
        net: e.g. what ``get_model`` returned.
        source: a ``.pt``, ``.pth`` or ``.safetensors`` file, or a state dict, with any of the published prefixes. One
            without an aligner (``dfa.``) leaves that of a self-aligned network as it is.

    Returns:
        ``net``, for chaining.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes differ; the message lists them. The network is then unchanged.
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    state = strip_prefixes(source if isinstance(source, Mapping) else read_state_dict(source))
    wanted = net.state_dict()
    for key in _OPTIONAL:
        if key in state and key not in wanted:
            logger.info("%s: %s left out, the network is built without token masking", name, key)
            state.pop(key)
        elif key in wanted and key not in state:
            state[key] = wanted[key]
    if not any(key.startswith(ALIGNER_PREFIX) for key in state):
        state |= {key: value for key, value in wanted.items() if key.startswith(ALIGNER_PREFIX)}
    problems = [f"missing {key}" for key in wanted if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in wanted]
    problems += [
        f"{key} is {tuple(state[key].shape)}, the network has {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{name} does not fit this {type(net).__name__}: {shown}")
    net.load_state_dict(state)
    return net


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
