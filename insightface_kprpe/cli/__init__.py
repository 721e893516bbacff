"""The command line: ``insightface-kprpe VERB``. It parses, calls the library, prints; nothing else lives here."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..debugging import shows_tracebacks
from . import (  # noqa: F401 - they add their verbs
    arcface_torch,
    data,
    demo,
    deployment,
    evaluation,
    faces,
    pairs,
    photos,
    training,
)
from .app import app
from .errors import describe


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder for all output")] = Path("work_dirs/quickstart"),
) -> None:
    """Run the whole path on drawn faces: data, training, verification, ONNX, model pack, FaceAnalysis (5 minutes)."""
    from ..quickstart.run import run_quickstart

    run_quickstart(output)


@app.command()
def models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="only these; wildcards work, e.g. 'r*'")
    ] = None,
    speed: Annotated[
        bool, typer.Option(help="also measure images/s on this machine: batches of 8, float32, random weights")
    ] = False,
) -> None:
    """List the networks that a config's `network` may name: size, cost, and which published weights each one loads.

    A multiply-add counts as two FLOPs. Example: insightface-kprpe models r50 cvlface_vit_b_kprpe --speed
    """
    from ..app.networks import choose_networks, table_rows

    for line in table_rows(choose_networks(names or []), speed):
        typer.echo(line)


def main() -> None:
    """Run the command line; errors end it with one sentence and exit status 1, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except Exception as error:
        if shows_tracebacks():
            raise
        sys.exit(f"error: {describe(error, sys.argv[1:])}")
