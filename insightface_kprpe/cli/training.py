"""Verbs that train."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app


@app.command(context_settings={"allow_interspersed_args": False})
def train(
    config: Annotated[str, typer.Argument(help="config file, or the name of a shipped one (e.g. quickstart)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="replace values")] = None,
) -> None:
    """Train in this process. Several: torchrun --nproc_per_node=N -m insightface_kprpe.training.trainer CONFIG ..."""
    from ..training.trainer import main as train_main

    train_main([config, *(overrides or [])])


@app.command("train-dfa", context_settings={"allow_interspersed_args": False})
def train_dfa(
    config: Annotated[str, typer.Argument(help="config file, or the name of a shipped one (e.g. dfa_small)")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="replace values")] = None,
) -> None:
    """Train the landmark network in this process. Several: torchrun ... -m insightface_kprpe.dfa.training CONFIG ..."""
    from ..dfa.training import main as train_main

    train_main([config, *(overrides or [])])
