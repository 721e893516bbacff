"""Progress of long work: a bar on a terminal, or else, e.g. in a log, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

SECONDS = 10.0  # between lines without a terminal


class Progress(tqdm):
    """tqdm with lines instead of a bar if there is no terminal; arguments are tqdm's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not sys.stderr.isatty():
            kwargs = {"mininterval": SECONDS, "delay": SECONDS, **kwargs}  # short work is not worth a line
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Receives each state of the bar from tqdm."""
        if file.isatty():
            return tqdm.status_printer(file)

        def print_line(text: str) -> None:
            if text.strip():
                file.write(f"{text.rstrip()}\n")
                file.flush()

        return print_line
