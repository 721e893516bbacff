"""Verbs that make or look at data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..geometry import SCORE_THRESHOLD
from .app import app

if TYPE_CHECKING:
    from ..data.record_tools import Packed

rec_app = typer.Typer(help="Make and look at training sets in RecordIO.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rec_app, name="rec")
visualize_app = typer.Typer(help="Draw pictures to look at.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(visualize_app, name="visualize")


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
    from ..contact_sheet import write_sheet
    from ..data.crops import open_crops
    from ..data.landmark_csv import read_landmark_csv
    from ..dfa import load_dfa
    from ..distributed import process_group, rank_and_world_size
    from ..inference.predicted_landmarks import contact_sheet, predict_landmarks

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
            write_sheet(file.with_suffix(".png"), contact_sheet(crops, keypoints, scores, overlay))
            typer.echo(f"{file.with_suffix('.png')}: look at it")


_WORKERS = min(4, os.cpu_count() or 1)
Workers = Annotated[int, typer.Option(help="processes that read and check images; 0: this one")]


@rec_app.command("pack")
def rec_pack(
    folder: Annotated[Path, typer.Argument(help="folder with one sub-folder of images a person")],
    out: Annotated[Path, typer.Argument(help="new folder for train.rec, train.idx, property, ldmk_5points.csv")],
    size: Annotated[int, typer.Option(help="side of the packed images, pixels")] = 112,
    quality: Annotated[int, typer.Option(help="JPEG quality of images that must be encoded, 1 to 100")] = 95,
    num_workers: Workers = _WORKERS,
) -> None:
    """Pack a folder of people into InsightFace's RecordIO layout, with its ldmk_5points.csv, and read it back.

    People and images are numbered in sorted order. JPEG files of the right size are taken over byte for byte; all
    others are resized and encoded as JPEG (stored as YCbCr like every JPEG: there is no RGB or BGR order to mix up).
    """
    from ..data.record_tools import pack_folder

    packed = pack_folder(folder, out, size=size, quality=quality, num_workers=num_workers)
    encoded = packed.images - packed.unchanged
    _say_packed(out, packed, f"{packed.unchanged} JPEG files unchanged, {encoded} encoded with quality {quality}")


@rec_app.command("repack")
def rec_repack(
    source: Annotated[Path, typer.Argument(help=".rec file, with or without .idx, or folder with train.rec")],
    out: Annotated[Path, typer.Argument(help="new folder for train.rec, train.idx, property, ldmk_5points.csv")],
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="random order, for readers that go from end to end (DALI)")
    ] = None,
    num_workers: Workers = _WORKERS,
) -> None:
    """Bring a .rec file of any kind (im2rec, shuffled) into InsightFace's layout, or shuffle one, and read it back.

    Images are copied byte for byte (JPEG quality and colors stay) in the order of their labels, which are renumbered
    from 0 without gaps; the rows of ldmk_5points.csv move with them. With --shuffle they are in random order, and the
    records that say where each person's images are do not exist.
    """
    from ..data.record_tools import repack

    packed = repack(source, out, shuffle=shuffle, num_workers=num_workers)
    _say_packed(out, packed, "all unchanged")


def _say_packed(out: Path, packed: Packed, how: str) -> None:
    typer.echo(f"{out}: {packed.images} images of {packed.identities} people ({how}), read back and compared")
    if packed.left_out:
        typer.echo(f"{packed.left_out} images left out, see above")
    typer.echo(
        "ldmk_5points.csv written" if packed.landmarks else "no ldmk_5points.csv beside the source: none written"
    )


@rec_app.command("inspect")
def rec_inspect(
    path: Annotated[Path, typer.Argument(help=".rec file, or folder with train.rec")],
    everything: Annotated[bool, typer.Option("--all", help="decode all images, not 1000 spread over the file")] = False,
    num_workers: Workers = _WORKERS,
) -> None:
    """Counts, identities, image sizes, JPEG quality, landmarks; unreadable images and contradictions (exit 1)."""
    from ..data.record_inspection import inspect_records

    facts = inspect_records(path, None if everything else 1000, num_workers)
    bad, formats, contradictions = (facts.pop(name) for name in ("bad", "formats", "contradictions"))
    for name, value in facts.items():
        typer.echo(f"{name:20} {value}")
    for name, count in formats.items():
        typer.echo(f"{'of these':20} {count} {name}; decoded to RGB")
    typer.echo(f"{'unreadable':20} {len(bad)}" + "".join(f"\n  {fault}" for fault in bad[:20]))
    for contradiction in contradictions:
        typer.echo(f"{'contradiction':20} {contradiction}")
    if bad or contradictions:
        raise typer.Exit(1)


@visualize_app.command("augmentation")
def visualize_augmentation(
    source: Annotated[
        str, typer.Argument(help='folder with train.rec, folder of people, or "synthetic"')
    ] = "synthetic",
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("augmentation.png"),
    config: Annotated[str | None, typer.Option(help="show this config's augmentation, not the paper's")] = None,
    count: Annotated[int, typer.Option(help="faces, one a row")] = 10,
    seed: Annotated[int, typer.Option(help="of the random choices")] = 0,
) -> None:
    """Draw faces as they are and, beside them, as training sees them, with their keypoints."""
    from ..contact_sheet import write_sheet
    from ..data.augmentation import build_augmentation
    from ..data.augmentation_sheet import augmentation_sheet
    from ..data.face_dataset import open_faces
    from ..training.config import load_config

    augment = build_augmentation(load_config(config).augment if config else "paper")
    write_sheet(out, augmentation_sheet(open_faces(source), augment, count, seed=seed))
    typer.echo(f"{out}: look at it")
