"""Verbs that make or look at data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..geometry import SCORE_THRESHOLD
from .app import app


@app.command()
def landmarks(
    source: Annotated[Path, typer.Argument(help="folder with train.rec, .rec or .bin file, or folder of images")],
    weights: Annotated[Path, typer.Option(help="landmark network: weights file, or output folder of train-dfa")],
    out: Annotated[Path | None, typer.Option(help="file to write, instead of the one beside the source")] = None,
    overlay: Annotated[int, typer.Option(help="also write a PNG of so many faces with their points")] = 0,
    batch_size: Annotated[int, typer.Option(help="crops a forward pass")] = 64,
    num_workers: Annotated[int, typer.Option(help="processes that read images, on every rank")] = 2,
) -> None:
    """Predict the landmarks of a set of crops: ldmk_5points.csv beside it, with a score for every face.

    Start it again to go on after an interruption. Several processes: torchrun --nproc_per_node=N -m
    insightface_kprpe.cli landmarks ...
    """
    from ..data.landmark_csv import read_landmark_csv
    from ..dfa import load_dfa
    from ..landmarks import contact_sheet, open_crops, predict_landmarks, write_contact_sheet
    from ..partial_fc import rank_and_world_size
    from ..training.loop import process_group

    with process_group() as device:
        crops = open_crops(source)
        options = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
        file = predict_landmarks(crops, load_dfa(weights), out, **options)
        if rank_and_world_size()[0] != 0:
            return
        keypoints, scores = read_landmark_csv(file, crops.count)
        low = int((scores < SCORE_THRESHOLD).sum())
        typer.echo(f"{file}: {crops.count} faces, {low} of them with a score below {SCORE_THRESHOLD}")
        if overlay > 0:
            write_contact_sheet(file.with_suffix(".png"), contact_sheet(crops, keypoints, scores, overlay))
            typer.echo(f"{file.with_suffix('.png')}: look at it")
