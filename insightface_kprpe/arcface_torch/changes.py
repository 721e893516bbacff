"""One change to the launched process: what, why, and how; --explain lists those that were made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Change:
    """A change to the process that a script runs in.

    Attributes:
        target: what is changed, by its dotted name.
        why: one sentence for the user.
        apply: ``(root, cpu) -> bool`` makes the change; False: it is not needed here, and nothing was done.
    """

    target: str
    why: str
    apply: Callable[[Path, bool], bool]


def change(target: str, why: str, to: list[Change]) -> Callable[[Callable[[Path, bool], bool]], None]:
    """Decorator that turns a function into a :class:`Change` and appends it to a list."""
    return lambda apply: to.append(Change(target, why, apply))
