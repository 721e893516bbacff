"""Damages bytes as transfers, disks, editors and attackers do."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

_NASTY = (
    b"nan",
    b"-1",
    b"1e999",
    b"",
    b"9" * 30,
    b"0",
    b"-0.5",
    b"inf",
    b"0x10",
    b"\xeb",
    b"1,2",
    b"3\t4",
    b"None",
    b"[]",
)


def mutate(data: bytes, seed: str) -> bytes:
    """A damaged copy: one to three changes, drawn by the seed."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_CHANGES)(data, rng)
    return data


# What stands in the place of an entry of a document.
_VALUES = (
    None, [], {}, "x", "", "\0", "../x", [1], {"a": 1}, True, -1, 0, 1.5, 10**6, 10**12, 10**400, float("nan"),
    float("inf"), "9" * 5000, "x" * 5000,
)  # fmt: skip


def mutate_document(data: bytes, seed: str) -> bytes:
    """JSON with an entry missing, twice, of another kind or deep; now and then bytes are damaged instead."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return mutate(data, seed)
    if rng.random() < 0.05:
        return b"[" * rng.choice((40, 100_000)) if rng.random() < 0.5 else b'{"a":' * rng.choice((40, 100_000))
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2))):
        places = list(_places(content))
        if not places:
            break
        inner, key = rng.choice(places)
        if rng.random() < 0.2:
            del inner[key]
        elif rng.random() < 0.1:
            inner["x" if isinstance(inner, dict) else key] = copy.deepcopy(inner[key])
        elif rng.random() < 0.05:
            inner[key] = _deep(rng.choice((31, 500)), inner[key])
        else:
            inner[key] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(content).encode()


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Where the entries of a document are: what holds each, and its key there."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from _places(value)


def _deep(levels: int, value: Any) -> Any:
    for _ in range(levels):
        value = [value]
    return value


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 1000)))


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(max(1, len(data)))
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _early_byte(data: bytes, rng: random.Random) -> bytes:
    """Heads are short and matter most."""
    at = rng.randrange(max(1, min(len(data), 64)))
    return data[:at] + bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))]) + data[at + 1 :]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    filling = rng.choice((bytes(end - start), b"\xff" * (end - start), rng.randbytes(end - start)))
    return data[:start] + filling + data[end:]


def _delete(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice((1, 3)) + data[end:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice((1, 4, 100))) + data[at:]


def _swap_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join(lines)


def _drop_field(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    if not lines:
        return data
    row = rng.randrange(len(lines))
    fields = re.split(rb"([ ,\t]+)", lines[row])
    del fields[rng.randrange(len(fields))]
    lines[row] = b"".join(fields)
    return b"".join(lines)


def _nasty_number(data: bytes, rng: random.Random) -> bytes:
    numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data[: 1 << 16]))
    if not numbers:
        return data
    at = rng.choice(numbers)
    return data[: at.start()] + rng.choice(_NASTY) + data[at.end() :]


def _other_encoding(data: bytes, rng: random.Random) -> bytes:
    text = data.decode("latin-1")
    return rng.choice(
        (text.encode("utf-16"), b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), text.encode("utf-8"))
    )


def _other_file(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        (b"", b"\x80\x04N.", b"PK\x05\x06" + bytes(18), b"<html></html>", b"version https://git-lfs\n", b"{}")
    )


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncate, _flip_bit, _early_byte, _early_byte, _overwrite, _delete, _repeat, _insert, _swap_lines, _drop_field,
    _nasty_number, _nasty_number, _other_encoding, _other_file,
)  # fmt: skip
