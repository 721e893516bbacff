"""The command line of the training programs: a config, ``key=value`` overrides, and the log."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from easydict import EasyDict as edict

from ..debugging import VARIABLE, shows_tracebacks
from .config import load_config
from .loop import EXIT_INTERRUPTED
from .run_folder import TrainingError, writing

# (config, world size, images per second of one GPU) -> text
Plan = Callable[[edict, int, float | None], str]


def run_command_line(
    train: Callable[[edict], object],
    arguments: Sequence[str] | None,
    base: str,
    plan: Plan | None = None,
    **description: str,
) -> None:
    """Read a config and train; an error that the user can fix is one sentence and exit status 1, not a traceback.

    Args:
        train: what to do with the config.
        arguments: of the command line; None: those of this process.
        base: see :func:`~insightface_kprpe.training.config.load_config`.
        plan: what the option ``--plan`` prints instead; None: there is no such option.
        **description: ``prog``, ``description`` and ``epilog`` of the help.
    """
    options = _parser(plan is not None, description).parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides, base)
        if plan is not None and options.plan:
            print(plan(config, options.world_size, options.images_per_second))
            return
        start_logging(Path(config.output), int(os.environ.get("RANK", 0)))
        train(config)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if shows_tracebacks():
            raise
        explained = isinstance(error, ValueError | ImportError | OSError | TrainingError)
        hint = "" if explained else f" ({VARIABLE}=1 in the environment shows the traceback)"
        text = str(error) or type(error).__name__
        if not explained and not isinstance(error, RuntimeError | EOFError):
            text = f"{type(error).__name__}: {text}"
        sys.exit(f"error: {text}{hint}")


def _parser(plans: bool, description: dict[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(**description)
    parser.add_argument("config", help="a config file, or the name of one in recognition_configs/ (e.g. quickstart)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override config values")
    if plans:
        parser.add_argument(
            "--plan", action="store_true", help="print the memory and steps that training needs, and exit"
        )
        parser.add_argument("--world-size", type=int, default=1, help="with --plan: number of GPUs")
        parser.add_argument(
            "--images-per-second", type=float, help="with --plan: throughput of one GPU, to estimate hours"
        )
    return parser


def start_logging(output: Path, rank: int) -> None:
    """Send the package's log to the console and to ``training.log``; other ranks than 0 log only warnings."""
    root = logging.getLogger("insightface_kprpe")
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if rank == 0:
        with writing("the folder of the run", output):
            output.mkdir(parents=True, exist_ok=True)
            handlers.append(_LogFile(output / "training.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    root.propagate = False


class _LogFile(logging.FileHandler):
    """Reports once that a line could not be written, e.g. on a full disk, instead of a traceback for each."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)
