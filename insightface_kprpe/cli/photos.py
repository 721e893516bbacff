"""Verbs that begin with photos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .faces import Aligned, AreCrops, DetectorThreshold, Pack, Root

_WORKERS = min(4, os.cpu_count() or 1)
_NAMED = 20  # photos without a crop that are told one by one


@app.command()
def align(
    source: Annotated[Path, typer.Argument(help="photos: a folder a person, or flat; one photo; a video")],
    out: Annotated[Path, typer.Option(help="folder for the crops, ldmk_5points.csv and faces.csv")],
    detector: Annotated[
        str, typer.Option(help="SCRFD as .onnx; pack; DFA, for crops of one face; or another run's faces.csv")
    ] = "kprpe",
    mode: Annotated[
        str, typer.Option(help="aligned: onto the template; box: the detector's box as it is; whole: the photo")
    ] = "aligned",
    faces: Annotated[str, typer.Option(help="of each photo: largest, central (the nearest to the middle), all")] = (
        "largest"
    ),
    max_faces: Annotated[int, typer.Option(help="with --faces all: the largest so many; 0: no limit")] = 0,
    det_thresh: DetectorThreshold = 0.5,
    min_size: Annotated[float, typer.Option(help="pixels that the shorter side of its box must have")] = 0,
    to: Annotated[str, typer.Option(help="folder: JPEG files; rec: RecordIO, the sub-folders are its people")] = (
        "folder"
    ),
    quality: Annotated[int, typer.Option(help="of the JPEG files, 1 to 100")] = 95,
    every: Annotated[int, typer.Option(help="of a video: one frame in so many")] = 1,
    overlay: Annotated[int, typer.Option(help="also write a PNG of so many photos with their crops")] = 0,
    num_workers: Annotated[int, typer.Option(help="processes; 0: this one")] = _WORKERS,
    root: Root = Path("~/.insightface"),
) -> None:
    """Cut the faces of photos out: 112x112 crops, with their landmarks, as training and evaluation take them.

    Start it again to go on after an interruption, or when photos were added or changed. Tight crops are looked at
    again with a border. What was found and not cut out stands in faces.csv, with the reason. Example:
    insightface-kprpe align photos --out crops --detector det_10g.onnx --overlay 64
    """
    from ..app.aligned_folder import align_to_folder, align_to_records, overlay_sheet
    from ..app.alignment import AlignOptions
    from ..contact_sheet import write_sheet
    from ..data.face_list import FACE_LIST

    if to not in ("folder", "rec"):
        raise ValueError(f"to must be folder or rec, got {to!r}")
    if overlay and to == "rec":
        raise ValueError("overlay goes with --to folder; align to a folder, look at it, and pack that with rec pack")
    options = AlignOptions(mode, faces, max_faces, det_thresh, min_size, quality)
    write = align_to_folder if to == "folder" else align_to_records
    done = write(source, out, detector, options, root=root, every=every, num_workers=num_workers)
    for name in done.gone:
        typer.echo(f"{name}: not there any more, its crops are removed", err=True)
    for number, (name, why) in enumerate(done.without.items()):
        if number == _NAMED:
            typer.echo(f"... and {len(done.without) - _NAMED} more", err=True)
            break
        typer.echo(f"{name}: no crop, {why}", err=True)
    if done.nobody:
        shown = ", ".join(done.nobody[:_NAMED]) + (", ..." if len(done.nobody) > _NAMED else "")
        typer.echo(f"warning: no crop of {len(done.nobody)} people: {shown}", err=True)
    bordered = len({face.photo for face in done.faces if face.with_border and face.crop})
    border = f", {bordered} of them found with a border" if bordered else ""
    left = sum(1 for face in done.faces if not face.crop and face.photo not in done.without)
    others = f", {left} more {'face' if left == 1 else 'faces'} left out" if left else ""
    typer.echo(f"{out}: {done.crops} crops of {done.photos} photos{border}; {len(done.without)} without a crop{others}")
    if not done.crops:
        raise ValueError(f"no face was cut out of {source}")
    typer.echo(f"{out / FACE_LIST}: every face that was found, and why it was left out")
    if overlay > 0:
        sheet = out / "ldmk_5points.png"
        write_sheet(sheet, overlay_sheet(done, source, out, overlay, every))
        typer.echo(f"{sheet}: look at it")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="image, or folder of one person's images")],
    second: Annotated[str, typer.Argument(help="image, or folder of one person's images")],
    out: Annotated[Path | None, typer.Option(help="image to write, with both sides (.jpg, .png)")] = None,
    pack: Pack = "kprpe",
    root: Root = Path("~/.insightface"),
    threshold: Annotated[
        float | None, typer.Option(help="minimum cosine similarity for one person; default: the pack's, or 0.3")
    ] = None,
    det_thresh: DetectorThreshold = 0.5,
    aligned: Aligned = True,
    crops: AreCrops = False,
) -> None:
    """Say whether two photos show the same person: similarity, threshold and its meaning, quality of both.

    The largest face of each photo counts. Of folders all photos are compared with each other, and their means, weighted
    by quality, give the answer. Example: insightface-kprpe compare a.jpg b.jpg --out both.png
    """
    from ..app.comparison import compare as compare_photos
    from ..app.comparison import side_by_side
    from ..app.pictures import check_picture_name, write_picture
    from ..app.recognition import open_pack
    from ..data.photos import photo_paths

    if out is not None:
        check_picture_name(out)
    for source in (first, second):
        photo_paths(source)  # says what is wrong before models are loaded
    analysis = open_pack(pack, root, det_thresh, aligned=aligned)
    compared = compare_photos(analysis, first, second, threshold, are_crops=crops)
    for name, why in compared.left_out.items():
        typer.echo(f"{name}: left out, {why}", err=True)
    for number, face in enumerate([*compared.first, *compared.second]):
        side = "AB"[number >= len(compared.first)]
        others = f"  ({face.others + 1} faces, the largest taken)" if face.others else ""
        typer.echo(f"{side}  {face.name}: quality {face.quality:.3f}{others}")
    if compared.similarities.size > 1:
        typer.echo(f"similarity of each photo of A (row) to each of B, mean {compared.similarities.mean():.3f}:")
        for face, row in zip(compared.first, compared.similarities, strict=True):
            typer.echo(f"  {Path(face.name).name[:24]:24}" + "".join(f" {value:6.3f}" for value in row))
    answer = "the same person" if compared.is_same else "different people"
    typer.echo(f"{answer}: similarity {compared.similarity:.3f}")
    typer.echo(f"threshold {compared.threshold.value:.3f}: {compared.threshold.meaning}")
    if out is not None:
        write_picture(out, side_by_side(compared))
        typer.echo(f"{out}: written")
