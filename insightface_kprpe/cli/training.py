"""Verbs that train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="config file, or the name of one in recognition_configs/ (e.g. quickstart)")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="override config values")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="print the memory and steps that training needs, and exit")
    ] = False,
    world_size: Annotated[int, typer.Option(help="with --plan: number of GPUs")] = 1,
    images_per_second: Annotated[
        float | None, typer.Option(help="with --plan: throughput of one GPU, to estimate hours")
    ] = None,
) -> None:
    """Train in this process. Several: torchrun --nproc_per_node=N -m insightface_kprpe.training.trainer CONFIG ..."""
    from ..training.trainer import main as train_main

    options = ["--plan", f"--world-size={world_size}"] if plan else []
    if plan and images_per_second is not None:
        options.append(f"--images-per-second={images_per_second}")
    train_main([config, *(overrides or []), *options])


@app.command("train-dfa", context_settings={"allow_interspersed_args": False})
def train_dfa(
    config: Annotated[
        str, typer.Argument(help="config file, or the name of one in recognition_configs/ (e.g. dfa_small)")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="override config values")
    ] = None,
) -> None:
    """Train the landmark network (DFA) in this process.

    Several: torchrun --nproc_per_node=N -m insightface_kprpe.training.landmark_trainer CONFIG ...
    """
    from ..training.landmark_trainer import main as train_main

    train_main([config, *(overrides or [])])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="output folder of a training run")],
    out: Annotated[Path | None, typer.Option(help="folder for the report; default: RUN/report")] = None,
) -> None:
    """Plot a training run: loss, learning rate, norms, margins, verification, as PNG files and one HTML page."""
    from ..training.run_report import report_run

    for path in report_run(run, out):
        typer.echo(path)
