"""Weights as named tensors: read without running anything, freed of wrappers' prefixes, loaded strictly."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn

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
