"""Builds networks for given weights: of a training run, or of a file and a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..backbones import get_model
from ..documents import read_json_object
from ..hub import is_hub_source
from ..state_dict import ALIGNER_PREFIX, check_fit, load_weights, read_state_dict, strip_prefixes
from .architecture import check_settings, read_architecture

# Types and limits of the entries of a config.json.
_TYPES = {"network": str, "network_kwargs": dict, "embedding_size": int, "body": str, "aggregator": bool}
_LARGEST = 65_536
_LIMITS = {"embedding_size": 65_536, "image_size": 2_048}


def load_run(folder: str | Path) -> nn.Module:
    """The network that a training run left in its output folder (``config.json`` and ``model.pt``), in eval mode.

    Raises:
        ValueError: the folder holds no run of a recognition network.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.pt").is_file():
        raise ValueError(f"model must be the output folder of a training run (config.json and model.pt), got {folder}")
    config = read_json_object(folder / "config.json")
    if missing := {"network", "network_kwargs", "embedding_size"} - set(config):
        raise ValueError(f"{folder} is not a run of a recognition network: its config.json has no {sorted(missing)[0]}")
    check_config(config, folder / "config.json")
    settings = {"num_features": config["embedding_size"], **config["network_kwargs"]}
    return load_network(folder / "model.pt", config["network"], **settings)


def check_config(config: Mapping[str, Any], where: str | Path) -> None:
    """Refuse a ``config.json`` whose network entries have wrong types, or are absurdly large.

    Args:
        config: its content.
        where: its origin, for the message.

    Raises:
        ValueError: an entry is not what it must be.
    """
    for key, kind in _TYPES.items():
        if key in config and not isinstance(config[key], kind):
            raise ValueError(f"{where}: {key} must be of type {kind.__name__}, got {config[key]!r:.40}")
    for key, most in _LIMITS.items():
        if key in config and (not isinstance(config[key], int) or not 1 <= config[key] <= most):
            raise ValueError(f"{where}: {key} must be a whole number from 1 to {most}, got {config[key]!r:.40}")


def _check_numbers(settings: Mapping[str, Any], where: str | Path) -> None:
    """Refuse settings that would build a network of absurd size, for kinds that cannot be compared with weights before.

    Raises:
        ValueError: a number is too large.
    """
    for value in _numbers(dict(settings)):
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{where}: numbers in network_kwargs must be at most {_LARGEST}, got {value!r:.40}")


def _numbers(content: Any) -> Iterator[float]:
    """All numbers in dicts and lists."""
    if isinstance(content, dict | list | tuple):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _numbers(item)
    elif isinstance(content, int | float):
        yield content


def load_network(weights: str | Path | Mapping[str, torch.Tensor], network: str, **settings) -> nn.Module:
    """A network with the weights of a file, in eval mode.

    Args:
        weights: what :func:`read_state_dict` reads, or a state dict.
        network: a registered name, see :func:`~insightface_kprpe.backbones.list_models`.
        **settings: of the network; the embedding size is that of the weights if it is not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights do not fit, or there is no such network.
    """
    where = "state dict" if isinstance(weights, Mapping) else str(weights)
    state = strip_prefixes(weights if isinstance(weights, Mapping) else read_state_dict(weights))
    last = state.get("feature.2.weight")
    if last is not None:
        settings.setdefault("num_features", last.shape[0])
    aligner = {key[len(ALIGNER_PREFIX) :]: value for key, value in state.items() if key.startswith(ALIGNER_PREFIX)}
    if aligner:  # the file that training read it from may be gone
        settings["dfa_weights"] = aligner
    elif is_hub_source(settings.get("dfa_weights") or ""):
        raise ValueError(f"{where}: settings of weights may not name others on the Hub, got {settings['dfa_weights']}")
    try:
        architecture = read_architecture(state)
    except ValueError:  # of another family
        architecture = None
    else:
        check_settings(settings, architecture, where)
    try:
        if architecture is None:
            check_fit(sketch(network, settings, where), state)  # before memory is taken for sizes that do not fit
        return load_weights(_build(network, settings, where), state).eval()
    except ValueError as error:
        raise ValueError(str(error).replace("state dict", where, 1)) from error


def sketch(network: str, settings: Mapping[str, Any], where: str | Path) -> nn.Module:
    """A network without memory for its weights ("meta"), of settings that may be anything.

    Raises:
        ValueError: a number is too large, or the network does not take the settings.
    """
    _check_numbers(settings, where)
    with torch.device("meta"):
        return _build(network, settings, where)


def _build(network: str, settings: Mapping[str, Any], where: str | Path) -> nn.Module:
    try:
        return get_model(network, **settings)
    except FileNotFoundError:  # of an aligner's weights
        raise
    except Exception as error:  # of torch, and of code that expects what the settings are not
        kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
        raise ValueError(f"{where}: {network} does not take these settings ({kind}{error})") from error
