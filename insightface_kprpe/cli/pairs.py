"""Verbs about verification sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import app

bin_app = typer.Typer(help="Make and look at verification sets (.bin).", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bin_app, name="bin")


@bin_app.command("make")
def bin_make(
    folder: Annotated[Path, typer.Argument(help="crops, as align writes them: with pairs.txt, or a folder a person")],
    out: Annotated[Path, typer.Option(help=".bin file to write; landmarks go to NAME_ldmk_5points.csv beside it")],
    pairs_file: Annotated[
        Path | None, typer.Option("--list", help="pairs.txt in LFW's form, or .csv: first,second,is_same")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="draw so many, half of one person, in 10 folds that share nobody")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the drawn pairs")] = 0,
    missing: Annotated[str, typer.Option(help="images that are missing or damaged: fail, or skip their pairs")] = (
        "fail"
    ),
    num_workers: Annotated[int, typer.Option(help="processes that read images; 0: this one")] = min(
        4, os.cpu_count() or 1
    ),
) -> None:
    """Write a verification set that InsightFace's own loaders read, too.

    Without --list and --pairs the pairs are those of pairs.txt in FOLDER. Images of another size than 112x112 are
    resized whole: align them first. Example: insightface-kprpe bin make lfw_aligned --out lfw.bin
    """
    from ..data.verification_tools import make_verification_bin

    if pairs_file is not None and pairs is not None:
        raise ValueError("name a --list of pairs, or how many --pairs to draw, not both")
    given = pairs_file if pairs is None else pairs
    made = make_verification_bin(folder, out, given, missing=missing, seed=seed, num_workers=num_workers)
    left = f"; {made.left_out} pairs left out" if made.left_out else ""
    typer.echo(f"{out}: {made.pairs} pairs of {made.people} people, {made.same} of them of one person{left}")
    template = f", the template for {made.template} of {2 * made.pairs}" if made.template else ""
    none = f"no ldmk_5points.csv in {folder}: the set has no landmarks"
    typer.echo(none if made.landmarks is None else f"{made.landmarks}: landmarks{template}")


@bin_app.command("inspect")
def bin_inspect(file: Annotated[Path, typer.Argument(help=".bin file")]) -> None:
    """Pairs, images, sizes, folds, landmarks; unreadable images and contradictions (exit 1).

    Example: insightface-kprpe bin inspect lfw.bin
    """
    from ..data.verification_tools import inspect_verification_bin
    from .data import echo_facts

    echo_facts(inspect_verification_bin(file))
