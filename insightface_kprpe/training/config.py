"""Configs in arcface_torch's format: a python file with ``config = edict()``, merged over ``base.py`` and checked."""

from __future__ import annotations

import ast
import difflib
import importlib.resources
import json
import os
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from easydict import EasyDict as edict

from ..files import write_atomically

# Keys whose default is None: what else they may be.
_OPTIONAL_TYPES = {
    key: str for key in ("output", "precision", "wandb_key", "wandb_entity", "wandb_project", "suffix_run_name", "notes")
}
_CHOICES = {
    "loss": ("margin", "adaface"),
    "optimizer": ("adamw", "sgd"),
    "scheduler": ("polynomial", "cosine", "step"),
    "precision": (None, "fp32", "fp16", "bf16"),
}
_POSITIVE = ("batch_size", "gradient_acc", "num_epoch", "lr", "clip_grad", "frequent", "verbose", "embedding_size")


class ConfigError(ValueError):
    """A config that cannot be used; the message says which key, what was expected and what to do."""


def configs_folder() -> Path:
    """The folder of the configs that come with this package."""
    return Path(str(importlib.resources.files("insightface_kprpe.recognition_configs")))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> edict:
    """Read a config file over ``base.py``, apply ``key=value`` overrides and check every key, type and choice.

    Args:
        path: a config file, a run's ``config.json``, or the name of a config that comes with this package (e.g. "quickstart").
        overrides: strings ``key=value``; values are python literals, anything else is taken as a string.

    Returns:
        The merged config, with ``output`` and ``precision`` filled in.

    Raises:
        ConfigError: no such file, no ``config`` in it, an unknown key, a wrong type or value.
    """
    path = _find(path)
    config = edict(runpy.run_path(str(configs_folder() / "base.py"))["config"])
    for key, value in _run(path).items():
        config[key] = _checked(config, key, value, str(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override must be key=value, got {override!r}")
        config[key] = _checked(config, key, _literal(text), "command line")
    _check_values(config)
    if config.output is None:
        config.output = os.path.join("work_dirs", path.stem)
    if config.precision is None:
        config.precision = "fp16" if config.fp16 else "fp32"
    return config


def dump_config(config: edict, path: str | Path) -> None:
    """Write the merged config as JSON; :func:`load_config` reads it back for the same run."""
    write_atomically(path, (json.dumps(config, indent=2) + "\n").encode())


def _find(path: str | Path) -> Path:
    path = Path(path)
    shipped = configs_folder() / path.with_suffix(".py").name
    if path.is_file():
        return path
    if len(path.parts) <= 2 and shipped.is_file():
        return shipped
    names = ", ".join(sorted(file.stem for file in configs_folder().glob("*.py") if file.stem not in ("base", "__init__")))
    raise ConfigError(f"config must be a python file or one of {names}; got {path}, which does not exist")


def _run(path: Path) -> dict[str, Any]:
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
    if key not in config:
        near = difflib.get_close_matches(key, config, n=1)
        hint = f"did you mean {near[0]}?" if near else "see recognition_configs/base.py for all keys"
        raise ConfigError(f"{where}: unknown config key {key!r}; {hint}")
    expected = _OPTIONAL_TYPES.get(key) or type(config[key])
    if value is None and key in _OPTIONAL_TYPES:
        return None
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if expected is tuple and isinstance(value, str):  # val_targets=lfw
        return (value,)
    if issubclass(expected, dict) and isinstance(value, dict):
        return dict(value)
    if type(value) is not expected:
        raise ConfigError(f"{where}: {key} must be {expected.__name__}, got {type(value).__name__} {value!r}")
    return value


def _check_values(config: edict) -> None:
    for key, choices in _CHOICES.items():
        if config[key] not in choices:
            raise ConfigError(f"{key} must be one of {choices}, got {config[key]!r}")
    for key in _POSITIVE:
        if config[key] <= 0:
            raise ConfigError(f"{key} must be positive, got {config[key]}")
    if not 0 < config.sample_rate <= 1:
        raise ConfigError(f"sample_rate must be in (0, 1], got {config.sample_rate}")
    if config.scheduler == "step" and not config.decay_epochs:
        raise ConfigError('scheduler "step" needs decay_epochs, e.g. (10, 16, 22)')
