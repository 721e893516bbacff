"""The verb that runs a user's arcface_torch checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command("arcface-torch", context_settings={"allow_interspersed_args": False})
def arcface_torch(
    command: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT ...", help="a script in the checkout, and its arguments")
    ] = None,
    root: Annotated[Path, typer.Option(help="the checkout: InsightFace's recognition/arcface_torch")] = Path("."),
    cpu: Annotated[bool, typer.Option("--cpu", help="run without a GPU, to try things out")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="list what is patched and exit")] = False,
) -> None:
    """Run an arcface_torch checkout's own scripts, unmodified, with this package's networks and AdaFace plugged in.

    Several processes: torchrun --nproc_per_node=N -m insightface_kprpe.arcface_torch --root CHECKOUT SCRIPT ...
    """
    # In a process of its own: the scripts need patches that nothing else should see.
    options = ["--root", str(root), *["--cpu"] * cpu, *["--explain"] * explain]
    done = subprocess.run([sys.executable, "-m", "insightface_kprpe.arcface_torch", *options, *(command or [])])
    raise typer.Exit(done.returncode)
