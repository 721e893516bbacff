"""Configs in arcface_torch's format: a python file with ``config = edict()``, merged over a base and checked."""

from __future__ import annotations

import ast
import difflib
import importlib.resources
import json
import os
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict as edict

from ..files import write_atomically
from . import recipes

# Keys whose default is None: what else they may be.
_OPTIONAL_TYPES = dict.fromkeys(
    ("output", "precision", "init_from", "gradient_compression", "val", "suffix_run_name", "notes"), str
)
_OPTIONAL_TYPES |= dict.fromkeys(("wandb_key", "wandb_entity", "wandb_project"), str)
SECRETS = ("wandb_key",)  # never written to a run's folder
_CHOICES = {
    "loss": ("margin", "adaface"),
    "optimizer": ("adamw", "sgd"),
    "scheduler": ("polynomial", "cosine", "step"),
    "gradient_compression": (None, "bf16"),
    "precision": (None, "fp32", "fp16", "bf16"),
}
_POSITIVE = ("batch_size", "gradient_acc", "num_epoch", "lr", "clip_grad", "frequent", "verbose", "keep_checkpoints")
_POSITIVE += ("embedding_size", "image_size", "position_lr_scale", "logit_scale")


class ConfigError(ValueError):
    """A config that cannot be used; the message says which key, what was expected and what to do."""


def configs_folder() -> Path:
    """The folder of the configs that come with this package."""
    return Path(str(importlib.resources.files("insightface_kprpe.recognition_configs")))


def load_config(path: str | Path, overrides: Sequence[str] = (), base: str = "base") -> edict:
    """Read a config file over its base, apply ``key=value`` overrides and check every key, type and choice.

    Args:
        path: a config file, a run's ``config.json``, the name of a shipped config (e.g. "quickstart"), or one that
            :mod:`.recipes` knows (e.g. "wf12m_vit_b_kprpe").
        overrides: strings ``key=value``; values are python literals, anything else is taken as a string.
        base: name of the config that has every key and its default: "base", or "dfa_base" to train landmarks.

    Returns:
        The merged config, with ``output`` and ``precision`` filled in.

    Raises:
        ConfigError: no such file, no ``config`` in it, an unknown key, a wrong type or value.
    """
    path = _find(path)
    file_values, values = _run(path), {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override must be key=value, got {override!r}")
        values[key] = _literal(text)
    if (
        path.suffix == ".py" and "momentum" in file_values
    ):  # nothing but SGD has one, and arcface_torch's default is SGD
        file_values = {"optimizer": "sgd", **file_values}
    config = merge_config({str(path): file_values, "command line": values}, base)
    if config.output is None:
        config.output = os.path.join("work_dirs", path.stem)
    return config


def merge_config(sources: Mapping[str, Mapping[str, Any]], base: str = "base") -> edict:
    """Put values over a base and check every key, type and choice.

    Args:
        sources: values by where they come from; later ones win.
        base: see :func:`load_config`.

    Raises:
        ConfigError: an unknown key, a wrong type or value.
    """
    config = edict(runpy.run_path(str(configs_folder() / f"{base}.py"))["config"])
    for where, values in sources.items():
        for key, value in values.items():
            if key not in config:
                near = difflib.get_close_matches(key, config, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see recognition_configs/{base}.py for all keys"
                raise ConfigError(f"{where}: unknown config key {key!r}; {hint}")
            config[key] = _checked(config, key, value, where)
    _check_values(config)
    if config.precision is None:
        config.precision = "fp16" if config.get("fp16") else "fp32"
    return config


def dump_config(config: edict, path: str | Path) -> None:
    """Write the merged config but its secrets as JSON; :func:`load_config` reads it back for the same run."""
    public = {key: value for key, value in config.items() if key not in SECRETS}
    write_atomically(path, (json.dumps(public, indent=2) + "\n").encode())


def _find(path: str | Path) -> Path:
    path = Path(path)
    shipped = configs_folder() / path.with_suffix(".py").name
    if path.is_file():
        return path
    is_name = path.suffix in ("", ".py") and path.parts[:-1] in ((), (configs_folder().name,), ("recognition_configs",))
    if is_name and shipped.is_file():
        return shipped
    if is_name and path.stem in recipes.names():
        return path
    stems = {file.stem for file in configs_folder().glob("*.py")} - {"base", "dfa_base", "__init__"}
    names = ", ".join(sorted(stems))
    raise ConfigError(
        f"config must be a python file, one of {names}, or DATASET_NETWORK or DATASET_NETWORK_LOSS such as "
        f"wf12m_vit_b_kprpe_cosface; got {path}, which does not exist"
    )


def _run(path: Path) -> dict[str, Any]:
    if not path.exists():
        return recipes.by_name(path.stem)
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text())
        namespace = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"{path} cannot be run as a config: {type(error).__name__}: {error}") from error
    if not isinstance(namespace.get("config"), dict):
        raise ConfigError(f"{path} must define `config = edict()`; it does not")
    return namespace["config"]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _checked(config: edict, key: str, value: Any, where: str) -> Any:
    """The value in the type of the key's default, or an error."""
    expected = _OPTIONAL_TYPES.get(key) or type(config[key])
    if value is None and key in _OPTIONAL_TYPES:
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is list:  # what older versions of EasyDict make of a tuple
        expected = tuple
    if expected is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if expected is tuple and isinstance(value, str):  # val_targets=lfw
        return (value,)
    if (issubclass(expected, dict) or key == "augment") and isinstance(value, dict):
        return dict(value)
    if key == "augment" and isinstance(value, str):
        return value
    if type(value) is not expected:
        raise ConfigError(f"{where}: {key} must be {expected.__name__}, got {type(value).__name__} {value!r}")
    return value


def _check_values(config: edict) -> None:
    for key, choices in _CHOICES.items():
        if key in config and config[key] not in choices:
            raise ConfigError(f"{key} must be one of {choices}, got {config[key]!r}")
    for key in _POSITIVE:
        if config.get(key, 1) <= 0:
            raise ConfigError(f"{key} must be positive, got {config[key]}")
    if not 0 < config.get("sample_rate", 1) <= 1:
        raise ConfigError(f"sample_rate must be in (0, 1], got {config.sample_rate}")
    if not 0 <= config.get("init_min_match", 0) <= 1:
        raise ConfigError(f"init_min_match must be in [0, 1], got {config.init_min_match}")
    if config.scheduler == "step" and not config.decay_epochs:
        raise ConfigError('scheduler "step" needs decay_epochs, e.g. (10, 16, 22)')
