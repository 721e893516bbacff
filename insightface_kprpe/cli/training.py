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
    if plan:
        from ..training.config import load_config
        from ..training.plan import format_plan, plan_training

        typer.echo(format_plan(plan_training(load_config(config, overrides or []), world_size, images_per_second)))
        return
    from ..training.trainer import main as train_main

    train_main([config, *(overrides or [])])


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
