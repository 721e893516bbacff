"""Verbs that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="config file, or the name of a shipped one (e.g. quickstart)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="replace values")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="do not train: print what it needs (memory, steps)")] = False,
    world_size: Annotated[int, typer.Option(help="with --plan: number of GPUs")] = 1,
    images_per_second: Annotated[float | None, typer.Option(help="with --plan: of one GPU, for the hours")] = None,
) -> None:
    """Train in this process. Several: torchrun --nproc_per_node=N -m insightface_kprpe.training.trainer CONFIG ..."""
    from ..training.trainer import main as train_main

    options = ["--plan", f"--world-size={world_size}"] if plan else []
    if plan and images_per_second is not None:
        options.append(f"--images-per-second={images_per_second}")
    train_main([config, *(overrides or []), *options])


@app.command("train-dfa", context_settings={"allow_interspersed_args": False})
def train_dfa(
    config: Annotated[str, typer.Argument(help="config file, or the name of a shipped one (e.g. dfa_small)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="replace values")] = None,
) -> None:
    """Train the landmark network in this process.

    Several: torchrun --nproc_per_node=N -m insightface_kprpe.training.landmark_trainer CONFIG ...
    """
    from ..training.landmark_trainer import main as train_main

    train_main([config, *(overrides or [])])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a training's output folder")],
    out: Annotated[Path | None, typer.Option(help="folder for the report; default: report in RUN")] = None,
) -> None:
    """Draw how a training went: loss, learning rate, norms, margins, verification, as PNG and one HTML file."""
    from ..training.run_report import report_run

    for path in report_run(run, out):
        typer.echo(path)
