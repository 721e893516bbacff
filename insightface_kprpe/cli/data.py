"""Verbs that create or inspect data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app

if TYPE_CHECKING:
    from ..data.record_tools import Packed

rec_app = typer.Typer(help="Create and inspect training sets in RecordIO.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(rec_app, name="rec")
visualize_app = typer.Typer(help="Draw figures.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(visualize_app, name="visualize")


@app.command()
def landmarks(
    source: Annotated[Path, typer.Argument(help="folder with train.rec, .rec or .bin file, or folder of images")],
    weights: Annotated[Path, typer.Option(help="landmark network: weights file, or output folder of train-dfa")],
    out: Annotated[
        Path | None, typer.Option(help="file to write; default: ldmk_5points.csv next to the source")
    ] = None,
    overlay: Annotated[int, typer.Option(help="also write a PNG of this many faces with their landmarks")] = 0,
    batch_size: Annotated[int, typer.Option(help="crops per forward pass")] = 64,
    num_workers: Annotated[int, typer.Option(help="worker processes per rank that read images")] = 2,
) -> None:
    """Predict the landmarks of a set of crops, with a score for each face; writes ldmk_5points.csv next to the set.

    Run it again to resume after an interruption. With several processes: torchrun --nproc_per_node=N -m
    insightface_kprpe.cli landmarks ...
    """
    from ..contact_sheet import write_sheet
    from ..data.crops import open_crops
    from ..data.landmark_csv import read_landmark_csv
    from ..dfa import load_dfa
    from ..distributed import process_group, rank_and_world_size
    from ..geometry import SCORE_THRESHOLD
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
            typer.echo(f"{file.with_suffix('.png')}: written")


_WORKERS = min(4, os.cpu_count() or 1)
Workers = Annotated[int, typer.Option(help="worker processes that read and check images; 0: none, use this process")]


@rec_app.command("pack")
def rec_pack(
    folder: Annotated[Path, typer.Argument(help="folder with one sub-folder of images per person")],
    out: Annotated[Path, typer.Argument(help="new folder for train.rec, train.idx, property, ldmk_5points.csv")],
    size: Annotated[int, typer.Option(help="side of the packed images, in pixels")] = 112,
    quality: Annotated[int, typer.Option(help="JPEG quality, 1 to 100, for images that have to be encoded")] = 95,
    num_workers: Workers = _WORKERS,
) -> None:
    """Pack a folder of people and its ldmk_5points.csv into InsightFace's RecordIO layout, and read it back to check.

    People and images are numbered in sorted order. JPEG files of the right size are copied byte for byte; all others
    are resized and encoded as JPEG (stored as YCbCr like every JPEG: there is no RGB or BGR order to mix up).
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
        int | None,
        typer.Option(metavar="SEED", help="seed for a random order, for readers that read sequentially (DALI)"),
    ] = None,
    num_workers: Workers = _WORKERS,
) -> None:
    """Convert any .rec file (im2rec, shuffled) to InsightFace's layout, or shuffle one, and read it back to check it.

    Images are copied byte for byte (JPEG quality and colors do not change) in the order of their labels, which are
    renumbered from 0 without gaps; the rows of ldmk_5points.csv move with them. With --shuffle the order is random, and
    the records that say where each person's images are do not exist.
    """
    from ..data.record_tools import repack

    packed = repack(source, out, shuffle=shuffle, num_workers=num_workers)
    _say_packed(out, packed, "all unchanged")


def _say_packed(out: Path, packed: Packed, how: str) -> None:
    typer.echo(f"{out}: {packed.images} images of {packed.identities} people ({how}), read back and compared")
    if packed.left_out:
        typer.echo(f"{packed.left_out} images left out (see above)")
    typer.echo(
        "ldmk_5points.csv written" if packed.landmarks else "no ldmk_5points.csv next to the source, so none written"
    )


@rec_app.command("inspect")
def rec_inspect(
    path: Annotated[Path, typer.Argument(help=".rec file, or folder with train.rec")],
    everything: Annotated[
        bool, typer.Option("--all", help="decode all images, not just 1000 spread over the file")
    ] = False,
    num_workers: Workers = _WORKERS,
) -> None:
    """Show counts, identities, image sizes, JPEG quality, landmarks; exit 1 on unreadable or contradictory data."""
    from ..data.record_inspection import inspect_records

    echo_facts(inspect_records(path, None if everything else 1000, num_workers))


def echo_facts(facts: dict[str, Any]) -> None:
    """Print what an inspection found; exit status 1 where something is wrong."""
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
    config: Annotated[str | None, typer.Option(help="show this config's augmentation instead of the paper's")] = None,
    count: Annotated[int, typer.Option(help="number of faces, one per row")] = 10,
    seed: Annotated[int, typer.Option(help="random seed")] = 0,
) -> None:
    """Draw faces before and after augmentation, side by side, with their keypoints."""
    from ..contact_sheet import write_sheet
    from ..data.augmentation import build_augmentation
    from ..data.augmentation_sheet import augmentation_sheet
    from ..data.face_dataset import open_faces
    from ..training.config import load_config

    augment = build_augmentation(load_config(config).augment if config else "paper")
    write_sheet(out, augmentation_sheet(open_faces(source), augment, count, seed=seed))
    typer.echo(f"{out}: written")


Source = Annotated[
    str, typer.Argument(help='crops: folder, .rec or .bin file, folder with label.txt, or "synthetic" (drawn)')
]
Faces = Annotated[list[int] | None, typer.Option("--face", help="index of a face in SOURCE, from 0; may be repeated")]


@visualize_app.command("kprpe")
def visualize_kprpe(
    model: Annotated[str, typer.Argument(help="KPRPE network: a training run, or any weights that convert reads")],
    source: Source = "synthetic",
    out: Annotated[Path, typer.Option(help="folder for depths.png, heads.png, faces.png, attention.png")] = Path(
        "kprpe_maps"
    ),
    face: Faces = None,
    query: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y", help="point in [0, 1] of the crop; default: left eye, nose, left mouth corner"),
    ] = None,
    depths: Annotated[str, typer.Option(help="layers, from 0; those that the network lacks are ignored")] = "0,1,3,5,7",
    head: Annotated[int, typer.Option(help="attention head, from 0")] = 0,
    depth: Annotated[int, typer.Option(help="layer of faces.png")] = 5,
    landmarks: Annotated[
        str | None, typer.Option(help="landmarks of the faces: a .csv file, or a DFA; default: those of SOURCE")
    ] = None,
    against: Annotated[str | None, typer.Option(help="ViT without KPRPE to compare with in attention.png")] = None,
    network: Annotated[
        str | None, typer.Option(help="MODEL's network, if its weights alone do not determine it")
    ] = None,
) -> None:
    """Draw what keypoints add to attention: the offsets B_ij, as in the paper's Figures 12 and 13.

    A red star marks the query, circles mark the keypoints; a stronger blue is a higher offset. Example:
    insightface-kprpe visualize kprpe work_dirs/run lfw_aligned --face 3 --face 17 --out maps
    """
    from ..evaluation.attention_figures import write_figures
    from ..evaluation.figure_faces import read_faces
    from ..weights.sources import load_published

    net = load_published(model, network)[0]
    other = None if against is None else load_published(against)[0]
    points = None if query is None else [_numbers(text, "query", float, 2) for text in query]
    layers = _numbers(depths, "depths", int)
    faces = read_faces(source, face or [0, 1, 2, 3], landmarks)
    for file in write_figures(out, net, faces, points, layers, head, depth, other):
        typer.echo(f"{file}: written")


@visualize_app.command("alignment")
def visualize_alignment(
    source: Source,
    predicted: Annotated[str, typer.Option(help="predicted landmarks: .csv file of SOURCE, or a DFA")],
    truth: Annotated[
        str | None, typer.Option(help="true landmarks: a .csv file, or a DFA; default: those of SOURCE")
    ] = None,
    out: Annotated[Path, typer.Option(help="PNG to write")] = Path("alignment.png"),
    face: Faces = None,
) -> None:
    """Draw what wrong landmarks do to aligned crops, as in the paper's Figures 7 and 9.

    True points are blue; predicted ones yellow within 5 % of the crop's side, else red. The last two columns lay the
    crops over each other: all points predicted, and only the worst one. Example: insightface-kprpe visualize alignment
    wider/val --predicted work_dirs/dfa --face 0 --face 7 --out alignment.png
    """
    from ..evaluation.alignment_figure import LIMIT, alignment_figure
    from ..evaluation.curves import save_figure
    from ..evaluation.figure_faces import read_faces

    faces = face or [0, 1, 2, 3]
    known = read_faces(source, faces, truth)
    figure, measured = alignment_figure(known, read_faces(source, faces, predicted).keypoints)
    save_figure(figure, out)
    typer.echo(f"{'face':>6}  worst point  beyond {LIMIT:.0%}  pixels moved  by the worst point alone")
    for name, error in zip(known.names, measured, strict=True):
        worst, beyond = 100 * error.errors.max(), int((error.errors > LIMIT).sum())
        typer.echo(f"{name:>6}  {worst:9.1f} %  {beyond:10}  {error.moved:12.1f}  {error.moved_by_worst:8.1f}")
    typer.echo(f"{out}: written")


def _numbers(text: str, name: str, kind: type, count: int | None = None) -> list:
    """The numbers of an option, which separates them by commas."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or len(values) != (count or len(values)):
        raise ValueError(f"{name} must be {f'{count} ' if count else ''}comma-separated numbers, got {text!r}")
    return values
