"""The command line: find the checkout, prepare this process, run the script in it."""

from __future__ import annotations

import argparse
import logging
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import mxnet_stand_in
from .changes import Change
from .compatibility import COMPATIBILITY
from .cpu import CPU_ONLY
from .plug_in import plug_in

logger = logging.getLogger(__name__)


def find_checkout(root: str | Path) -> Path:
    """The folder of arcface_torch's scripts, from it or from a whole InsightFace repository.

    Raises:
        FileNotFoundError: it is neither.
    """
    for folder in (Path(root), Path(root) / "recognition" / "arcface_torch"):
        if (folder / "backbones" / "__init__.py").is_file():
            return folder.resolve()
    raise FileNotFoundError(
        f"root must be InsightFace's recognition/arcface_torch (a folder with backbones/), got {root}; give the "
        "checkout with --root"
    )


def prepare(root: Path, cpu: bool = False) -> list[tuple[str, Change]]:
    """Change this process so that the checkout's scripts run in it with this package's parts.

    Args:
        root: from :func:`find_checkout`.
        cpu: also let the scripts run without a GPU.

    Returns:
        Every change that was made, under its group's heading.
    """
    groups = {
        "plugged into the checkout's own modules, when they are imported": plug_in(root),
        "provided where missing, or changed since the scripts were written": [
            *mxnet_stand_in.CHANGES,
            *COMPATIBILITY,
        ],
        "without a GPU (--cpu)": CPU_ONLY if cpu else [],
    }
    made = [(heading, change) for heading, group in groups.items() for change in group if change.apply(root, cpu)]
    sys.path.insert(0, str(root))
    return made


def explain(root: Path, made: Sequence[tuple[str, Change]]) -> str:
    """What :func:`prepare` did, as text."""
    lines, heading = [f"checkout: {root}; nothing in it is changed, nor anything outside the launched process"], None
    for group, change in made:
        if group != heading:
            lines += ["", f"{group}:"]
            heading = group
        lines.append(f"  {change.target}\n      {change.why}")
    return "\n".join(lines)


def find_script(root: Path, script: str) -> Path:
    """A script's path in the checkout.

    Raises:
        FileNotFoundError: the checkout has no such script.
    """
    path = root / script
    if not path.is_file():
        known = ", ".join(sorted(file.name for file in root.glob("*.py")))
        raise FileNotFoundError(f"script must be one of those in {root}, got {script}; it has {known}")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of ``python -m insightface_kprpe.arcface_torch``."""
    parser = argparse.ArgumentParser(
        prog="python -m insightface_kprpe.arcface_torch",
        description="Run a script of an arcface_torch checkout, unmodified, with insightface_kprpe plugged in.",
    )
    parser.add_argument("--root", default=".", help="the checkout: recognition/arcface_torch (here)")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, to try things out")
    parser.add_argument("--explain", action="store_true", help="list what is patched and exit")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="SCRIPT ...", help="train_v2.py CONFIG, ...")
    options = parser.parse_args(arguments)
    if not options.command and not options.explain:
        parser.error("name a script, e.g. train_v2.py CONFIG")
    try:
        root = find_checkout(options.root)
        script = None if options.explain else find_script(root, options.command[0])
        made = prepare(root, options.cpu)
    except (ValueError, ImportError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    if script is None:
        print(explain(root, made))
        return
    if not options.cpu and not torch.cuda.is_available():
        if script.name == "train_v2.py":
            sys.exit("error: train_v2.py needs a GPU, and none was found; put --cpu before it to try it without one")
        logger.warning("no GPU found, and most of these scripts need one; add --cpu to try them without it")
    sys.argv = [str(script), *options.command[1:]]
    runpy.run_path(str(script), run_name="__main__")
