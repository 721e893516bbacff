"""The command line that every training program has: a config and ``key=value`` overrides."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from easydict import EasyDict as edict

from .config import load_config
from .loop import TrainingError


def run_command_line(
    train: Callable[[edict], object], arguments: Sequence[str] | None, base: str, **description: str
) -> None:
    """Read a config and train by it; what a user can mend is one sentence and exit status 1, not a traceback.

    Args:
        train: what to do with the config.
        arguments: of the command line; None: those of this process.
        base: see :func:`~insightface_kprpe.training.config.load_config`.
        **description: ``prog``, ``description`` and ``epilog`` of the help.
    """
    parser = argparse.ArgumentParser(**description)
    parser.add_argument("config", help="a config file, or the name of one in recognition_configs/ (e.g. quickstart)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the config")
    options = parser.parse_args(arguments)
    try:
        train(load_config(options.config, options.overrides, base))
    except (ValueError, ImportError, FileNotFoundError, TrainingError) as error:
        sys.exit(f"error: {error}")
