"""The command line: ``insightface-kprpe VERB``. It parses, calls the library, prints; nothing else lives here."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import arcface_torch, data, deployment, evaluation, faces, training  # noqa: F401 - they add their verbs
from .app import DEBUG, app
from .errors import describe


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="folder for everything that is made")] = Path("work_dirs/quickstart"),
) -> None:
    """Everything once, on drawn faces: data, training, verification, ONNX, model pack, FaceAnalysis (5 minutes)."""
    from ..quickstart.run import run_quickstart

    run_quickstart(output)


@app.command()
def models() -> None:
    """List the networks that a config's `network` may name."""
    from ..backbones import list_models

    typer.echo("\n".join(list_models()))


def main() -> None:
    """Run the command line; whatever goes wrong is one sentence and exit status 1, not a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        sys.exit(f"error: {describe(error, sys.argv[1:])}")
