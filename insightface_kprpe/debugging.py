"""Whether errors come with their traceback, which the command line otherwise keeps from users."""

from __future__ import annotations

import os

VARIABLE = "INSIGHTFACE_KPRPE_DEBUG"  # environment variable: anything but "" and "0" shows tracebacks


def shows_tracebacks() -> bool:
    """Whether ``VARIABLE`` asks for them; ``insightface-kprpe --debug`` sets it."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")
