"""What ``doctor`` finds."""

from __future__ import annotations

from typing import NamedTuple

OK, WARNING, BROKEN = "ok", "warning", "broken"


class Finding(NamedTuple):
    """What was checked, its status ("ok", "warning" or "broken"), and the command that fixes it."""

    name: str
    status: str
    found: str
    fix: str = ""
