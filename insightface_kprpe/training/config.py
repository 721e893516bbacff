"""Configs in arcface_torch's format: a Python file with ``config = edict()``, merged over a base and checked."""

from __future__ import annotations

import ast
import difflib
import importlib.resources
import json
import math
import os
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from easydict import EasyDict as edict

from ..documents import read_json_object
from ..files import read_text, write_atomically
from . import recipes

# Types of the keys whose default is None.
_OPTIONAL_TYPES = dict.fromkeys(
    ("output", "precision", "init_from", "gradient_compression", "val", "suffix_run_name", "notes"), str
)
_OPTIONAL_TYPES |= dict.fromkeys(("wandb_key", "wandb_entity", "wandb_project"), str)
_SHOWN = 120  # characters of a value that an error shows
_INTEGERS = 2**63  # below: no number of a config is as large, and torch takes none that is
SECRETS = ("wandb_key",)  # never written to a run's folder
_CHOICES = {
    "loss": ("margin", "adaface"),
    "optimizer": ("adamw", "sgd"),
    "scheduler": ("polynomial", "cosine", "step"),
    "gradient_compression": (None, "bf16"),
    "precision": (None, "fp32", "fp16", "bf16"),
}


class _Range(NamedTuple):
    """The range of a number; infinite and NaN are never allowed."""

    low: float
    high: float = math.inf
    low_allowed: bool = True
    high_allowed: bool = False

    def holds(self, value: float) -> bool:
        above = value >= self.low if self.low_allowed else value > self.low
        return above and (value <= self.high if self.high_allowed else value < self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {'(['[self.low_allowed]}{self.low}, {self.high}{')]'[self.high_allowed]}"
        return f"{'positive' if self in (_COUNT, _POSITIVE) else f'{self.low} or more'} and finite"


_COUNT, _POSITIVE, _NOT_NEGATIVE = _Range(1), _Range(0, low_allowed=False), _Range(0)
_FRACTION, _BELOW_ONE = _Range(0, 1, high_allowed=True), _Range(0, 1)
_RANGES = {
    **dict.fromkeys(("batch_size", "gradient_acc", "num_epoch", "frequent", "verbose", "keep_checkpoints"), _COUNT),
    **dict.fromkeys(("embedding_size", "image_size"), _COUNT),
    **dict.fromkeys(("lr", "clip_grad", "position_lr_scale", "logit_scale", "adaface_h"), _POSITIVE),
    **dict.fromkeys(("num_classes", "num_image", "num_workers", "save_every"), _NOT_NEGATIVE),
    **dict.fromkeys(("weight_decay", "padding"), _NOT_NEGATIVE),
    **dict.fromkeys(("momentum", "repeated_augmentation"), _BELOW_ONE),
    **dict.fromkeys(("init_min_match", "max_bad_images", "interclass_filtering_threshold"), _FRACTION),
    **dict.fromkeys(("adaface_m", "adaface_t_alpha"), _FRACTION),
    "sample_rate": _Range(0, 1, low_allowed=False, high_allowed=True),
    "warmup_epoch": _Range(-1),  # which means none, as in some of arcface_torch's configs
    "seed": _Range(0, 2**32),
}


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
        overrides: strings ``key=value``; values are Python literals; anything else is a string.
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
    """Merge values over a base and check every key, type and choice.

    Args:
        sources: values by their origin; later ones win.
        base: see :func:`load_config`.

    Raises:
        ConfigError: an unknown key, a wrong type or value.
    """
    config = edict(runpy.run_path(str(configs_folder() / f"{base}.py"))["config"])
    origin = dict.fromkeys(config, f"{base}.py")
    for where, values in sources.items():
        for key, value in values.items():
            if key not in config:
                near = difflib.get_close_matches(key, config, n=1)
                hint = f"did you mean {near[0]}?" if near else f"see recognition_configs/{base}.py for all keys"
                raise ConfigError(f"{where}: unknown config key {key!r:.{_SHOWN}}; {hint}")
            config[key], origin[key] = _checked(config, key, value, where), where
    try:
        _check_values(config)
    except ConfigError as error:  # whose first word is the key
        raise ConfigError(f"{origin[str(error).partition(' ')[0]]}: {error}") from None
    if config.precision is None:
        config.precision = "fp16" if config.get("fp16") else "fp32"
    return config


def dump_config(config: edict, path: str | Path) -> None:
    """Write the merged config without its secrets as JSON; :func:`load_config` reads it back for the same run."""
    public = {key: value for key, value in config.items() if key not in SECRETS}
    write_atomically(path, (json.dumps(public, indent=2) + "\n").encode())


def _find(path: str | Path) -> Path:
    path = Path(path)
    try:
        if path.is_file():
            return path
        if path.is_dir() and path.parts:
            raise ConfigError(f"config must be a file, got the folder {path}; a run's is {path / 'config.json'}")
        shipped = configs_folder() / f"{path.stem}.py"
    except OSError as error:
        raise ConfigError(f"config must be a file, got {str(path)!r:.80}: {error.strerror}") from error
    is_name = path.suffix in ("", ".py") and path.parts[:-1] in ((), (configs_folder().name,), ("recognition_configs",))
    if is_name and shipped.is_file():
        return shipped
    if is_name and path.stem in recipes.names():
        return path
    stems = {file.stem for file in configs_folder().glob("*.py")} - {"base", "dfa_base", "__init__"}
    names = ", ".join(sorted(stems))
    raise ConfigError(
        f"config must be a Python file, one of {names}, or DATASET_NETWORK or DATASET_NETWORK_LOSS such as "
        f"wf12m_vit_b_kprpe_cosface; got {path}, which does not exist"
    )


def _run(path: Path) -> dict[str, Any]:
    if not path.exists():
        return recipes.by_name(path.stem)
    is_json = path.suffix == ".json"
    try:
        config = read_json_object(path) if is_json else runpy.run_path(str(path)).get("config")
    except Exception as error:
        if is_json:
            raise ConfigError(f"{error}; a run's config.json is expected") from error
        if isinstance(error, SyntaxError):
            _check_encoding(path)
        raise ConfigError(f"{path} cannot be run as a config: {type(error).__name__}: {error}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ConfigError(f"{path} must define `config = edict()`, with strings as keys; got {config!r:.60}")
    return config


def _check_encoding(path: Path) -> None:
    try:
        read_text(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
        return float(value) if abs(value) < _INTEGERS else math.inf
    if expected is list:  # older versions of EasyDict turn tuples into lists
        expected = tuple
    if expected is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if expected is tuple and isinstance(value, str):  # val_targets=lfw
        return (value,)
    if (issubclass(expected, dict) or key == "augment") and isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{where}: {key} must have strings as keys, got {value!r:.{_SHOWN}}")
        return dict(value)
    if key == "augment" and isinstance(value, str):
        return value
    if type(value) is not expected:
        name = "dict" if issubclass(expected, dict) else expected.__name__
        raise ConfigError(f"{where}: {key} must be {name}, got {type(value).__name__} {value!r:.{_SHOWN}}")
    return value


def _check_values(config: edict) -> None:
    for key, choices in _CHOICES.items():
        if key in config and config[key] not in choices:
            raise ConfigError(f"{key} must be one of {choices}, got {config[key]!r:.{_SHOWN}}")
    for key, allowed in _RANGES.items():
        if key in config and not allowed.holds(config[key]):
            raise ConfigError(f"{key} must be {allowed}, got {config[key]!r:.{_SHOWN}}")
    for key, value in config.items():
        numbers = [number for number in _leaves(value) if isinstance(number, int | float)]
        if not all(abs(number) < (_INTEGERS if isinstance(number, int) else math.inf) for number in numbers):
            raise ConfigError(f"{key} must hold finite numbers, got {value!r:.{_SHOWN}}")
        numeric = key in ("margin_list", "decay_epochs", "augment") and isinstance(value, tuple | dict)
        if numeric and not all(type(number) in (int, float) for number in _leaves(value)):
            raise ConfigError(f"{key} must hold numbers, got {value!r:.{_SHOWN}}")
        if key in ("rec", "data", "network", "output") and value == "":
            raise ConfigError(f"{key} must not be empty")
    if len(config.get("margin_list", (1.0, 0.5, 0.0))) != 3:
        raise ConfigError(
            f"margin_list must be three numbers, such as (1.0, 0.5, 0.0), got {config.margin_list!r:.{_SHOWN}}"
        )
    if any(epoch <= 0 for epoch in config.decay_epochs):
        raise ConfigError(f"decay_epochs must be positive, got {config.decay_epochs!r:.{_SHOWN}}")
    if config.scheduler == "step" and not config.decay_epochs:
        raise ConfigError('scheduler "step" needs decay_epochs, e.g. (10, 16, 22)')
    if not all(isinstance(target, str) and target for target in config.get("val_targets", ())):
        raise ConfigError(f"val_targets must be names or paths, got {config.val_targets!r:.{_SHOWN}}")


def _leaves(value: Any) -> Iterator[Any]:
    """A value, or the contents of dicts, lists and tuples at any depth."""
    if not isinstance(value, dict | list | tuple):
        yield value
        return
    for item in value.values() if isinstance(value, dict) else value:
        yield from _leaves(item)
