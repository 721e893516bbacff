"""One change to the launched process: what, why, and how; what --explain lists is what was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """A change to the process that a script runs in.

    Attributes:
        target: what is changed, by its dotted name.
        why: one sentence for people.
        apply: ``(root, cpu) -> bool`` makes the change; False: it is not needed here, and nothing was done.
    """

    target: str
    why: str
    apply: Callable[[Path, bool], bool]


def change(target: str, why: str, to: list[Change]) -> Callable[[Callable[[Path, bool], bool]], None]:
    """Decorator that makes a :class:`Change` of a function and appends it to a list."""
    return lambda apply: to.append(Change(target, why, apply))
