"""Reads untrusted JSON and YAML files as data, within limits, with errors that name the file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import read_text, user_file

MAX_BYTES = {"JSON": 4 << 20, "YAML": 64 << 10}  # the YAML parser takes a second for 100 kB
MAX_DEPTH = 30  # of nested lists and mappings
# An alias costs nothing to read, but aliases of aliases multiply for code that traverses the result.
MAX_ALIASES = 10
HEADER = "insightface_kprpe"  # key of the description in a .safetensors file's metadata


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is too large or too deep, or holds something else; the message names the file.
    """
    return parse_json_object(_text(Path(path), "JSON"), path)


def parse_json_object(text: str, where: str | Path) -> dict[str, Any]:
    """The object in JSON text; see :func:`read_json_object`.

    Args:
        text: JSON.
        where: its origin, for messages.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where} could not be read as JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{where} could not be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} must hold an object, got {type(content).__name__}")
    _check_depth(content, where)
    return content


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file that hold an object, and the objects; others, as one that a kill cut short, are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no file, or may not be read.
    """
    with open(user_file(path), encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                content = json.loads(line)
                if isinstance(content, dict):
                    yield line, content


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; tags that would make objects are refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is too large or too deep, has too many aliases, or holds something else.
    """
    import yaml

    text = _text(Path(path), "YAML")
    try:
        aliases, depth = _measure_yaml(text)
        small = depth <= MAX_DEPTH and aliases <= MAX_ALIASES
        content = yaml.safe_load(text) if small else None
    except Exception as error:  # PyYAML's constructors also raise the errors of int() and datetime
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} could not be read as plain YAML ({reason})") from error
    if not small:
        raise ValueError(f"{path} must have at most {MAX_DEPTH} levels and {MAX_ALIASES} aliases; simplify it")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(content).__name__}")
    _check_depth(content, path)
    return content


def _measure_yaml(text: str) -> tuple[int, int]:
    """The number of aliases and the depth of nesting; stops when either is too large."""
    import yaml

    aliases = depth = deepest = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases, deepest = aliases + isinstance(event, yaml.AliasEvent), max(deepest, depth)
        if deepest > MAX_DEPTH or aliases > MAX_ALIASES:
            break
    return aliases, deepest


def description_beside(weights: str | Path) -> tuple[dict[str, Any], Path | None]:
    """The description of the network in the weights file itself or in a file next to it.

    Searched in this order: the header of a ``.safetensors`` file that this package converted; ``config.json`` of a
    training run; CVLface's ``model.yaml``, also in ``pretrained_model``; ``conf`` in a ``config.json`` of the Hub.

    Args:
        weights: the file.

    Returns:
        The content and its file; empty and None if there is no description.

    Raises:
        ValueError: such a file is damaged.
    """
    weights = Path(weights)
    folder = weights.parent.parent if weights.parent.name == "pretrained_model" else weights.parent
    if weights.suffix == ".safetensors" and (header := _safetensors_header(weights)) is not None:
        return parse_json_object(header, f"{weights}: its header"), weights
    config = folder / "config.json"
    content = read_json_object(config) if config.is_file() else {}
    if "network" in content or "aggregator" in content:
        return content, config
    for path in (weights.with_suffix(".yaml"), folder / "pretrained_model" / "model.yaml", folder / "model.yaml"):
        if path.is_file():
            return read_yaml_mapping(path), path
    if isinstance(content.get("conf"), dict):
        return content["conf"], config
    return {}, None


def _safetensors_header(path: Path) -> str | None:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(HEADER)
    except Exception as error:  # of the library's own type
        raise ValueError(f"{path} could not be read as safetensors ({str(error).splitlines()[0]})") from error


def _text(path: Path, kind: str) -> str:
    most = MAX_BYTES[kind]
    if (size := user_file(path).stat().st_size) > most:
        raise ValueError(f"{path} must be {kind} of at most {most >> 10} KiB, got {size >> 10} KiB")
    return read_text(path)


def _check_depth(content: Any, where: str | Path) -> None:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            value
            for item in level
            for value in (item.values() if isinstance(item, dict) else item)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"{where} must have at most {MAX_DEPTH} levels of lists and objects")
