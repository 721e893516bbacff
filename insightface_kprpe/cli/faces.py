"""Verbs for faces in photos, and the one that checks the installation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app

if TYPE_CHECKING:
    import numpy as np

    from ..app.enrollment import Enrolled
    from ..app.gallery import Gallery

Pack = Annotated[str, typer.Option(help="model pack: a name in ROOT/models, or a folder")]
Root = Annotated[Path, typer.Option(help="InsightFace's root folder")]
Index = Annotated[str, typer.Argument(help="gallery: its file (.npz), or postgresql://USER@HOST/DATABASE")]
Aligned = Annotated[bool, typer.Option(help="--no-aligned feeds the detector's box to the network without aligning it")]
AreCrops = Annotated[bool, typer.Option("--crops", help="images are aligned crops already; do not run the detector")]
DetectorThreshold = Annotated[float, typer.Option(help="minimum detector score for a face")]

gallery_app = typer.Typer(
    help="Manage the gallery of people that recognize compares with.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(gallery_app, name="gallery")


@app.command()
def recognize(
    gallery: Annotated[
        str, typer.Argument(help="folder of people (NAME/*.jpg or NAME.jpg), gallery file, or postgresql:// address")
    ],
    photo: Annotated[str, typer.Argument(help="image with the faces to name, or a folder of images")],
    out: Annotated[
        Path | None, typer.Option(help="image to write, with boxes and names (.jpg, .png); for a folder, a folder")
    ] = None,
    pack: Pack = "kprpe",
    root: Root = Path("~/.insightface"),
    threshold: Annotated[
        float | None,
        typer.Option(help="minimum cosine similarity for a match; default: the pack's, or 0.3"),
    ] = None,
    det_thresh: DetectorThreshold = 0.5,
    aligned: Aligned = True,
    crops: AreCrops = False,
) -> None:
    """Name the people in a photo, or in all photos of a folder, with similarity (cosine) and quality (0 to 1).

    Example: insightface-kprpe recognize people.npz party.jpg --out named.jpg
    """
    from ..app.aligned_folder import crop_names
    from ..app.pictures import check_picture_name, read_picture
    from ..app.recognition import open_pack
    from ..data.photos import photo_paths
    from ..packs.layout import load_note

    photos, is_folder = photo_paths(photo), Path(photo).is_dir()
    if not is_folder:
        read_picture(photos[0])  # raises early if it cannot be read
        if out is not None:
            check_picture_name(out)
    names = crop_names([path.relative_to(photo).as_posix() for path in photos]) if is_folder else []
    with open_people(gallery) as people:
        analysis = open_pack(pack, root, det_thresh, aligned=aligned)
        note = load_note(analysis.models["recognition"].model_file) or f"{pack}: not built by this package"
        typer.echo(note, err=True)
        fill_gallery(people, gallery, analysis, crops)
        threshold = threshold_of(analysis, threshold)
        for number, path in enumerate(photos):
            try:
                picture = read_picture(path)
            except ValueError as error:
                typer.echo(f"left out: {error}", err=True)
                continue
            named = out / f"{names[number]}.jpg" if is_folder and out is not None else out
            _name_faces(analysis, people, path, picture, threshold, crops, named)


def _name_faces(
    analysis: Any, people: Gallery, photo: Path, picture: np.ndarray, threshold: float, crops: bool, out: Path | None
) -> None:
    """Name the faces of one photo, on the terminal and in the image ``out``."""
    from ..app.pictures import write_picture
    from ..app.recognition import annotate
    from ..app.recognition import recognize as name_faces

    faces = name_faces(analysis, people, picture, threshold, is_crop=crops)
    known = count(len(people.people()), "person", "people")
    typer.echo(f"{photo}: {count(len(faces), 'face', 'faces')}, gallery of {known}, threshold {threshold:.3f}")
    for number, (name, nearest, quality, face) in enumerate(faces, 1):
        box = " ".join(f"{value:.0f}" for value in face.bbox)
        similarity = "" if nearest is None else f"similarity {nearest.similarity:.3f}  "
        doubt = f"  (nearest: {nearest.name})" if name is None and nearest is not None else ""
        typer.echo(f"{number:3}  {name or 'unknown':<16}  {similarity}quality {quality:.3f}  box {box}{doubt}")
    if out is not None:
        write_picture(out, annotate(picture, faces))
        typer.echo(f"{out}: written")


def open_people(place: str) -> AbstractContextManager[Gallery]:
    """The gallery to search in; an empty one for a folder of people, which :func:`fill_gallery` fills."""
    from ..app.file_gallery import FileGallery
    from ..app.galleries import reading

    return nullcontext(FileGallery()) if Path(place).is_dir() else reading(place)


def fill_gallery(people: Gallery, place: str, analysis: Any, crops: bool) -> None:
    """Enrol the people of a folder; any other place is full already."""
    from ..app.enrollment import enroll, people_of_folder

    if Path(place).is_dir():
        _report(enroll(analysis, people, people_of_folder(place), are_crops=crops), Path(place))


def threshold_of(analysis: Any, asked: float | None) -> float:
    """What was asked for, else the pack's own, else a customary one, which is said."""
    from ..app.comparison import choose_threshold

    threshold = choose_threshold(analysis, asked)
    if not threshold.measured and asked is None:
        typer.echo(f"threshold {threshold.value:g}: {threshold.meaning}; set --threshold", err=True)
    return threshold.value


@gallery_app.command("add")
def add_people(
    index: Index,
    people: Annotated[
        Path, typer.Argument(help="folder of people (NAME/*.jpg or NAME.jpg); with --name, one person's folder")
    ],
    name: Annotated[
        str | None, typer.Option(help="the person all images are of; PEOPLE may then be a single image")
    ] = None,
    pack: Pack = "kprpe",
    root: Root = Path("~/.insightface"),
    det_thresh: DetectorThreshold = 0.5,
    aligned: Aligned = True,
    crops: AreCrops = False,
    prune: Annotated[bool, typer.Option(help="remove images that were in PEOPLE and no longer exist")] = False,
) -> None:
    """Add the largest face in each image.

    Files are compared by content: known ones are skipped, changed ones embedded again, moved ones followed.
    Examples: insightface-kprpe gallery add people.npz photos/ --prune; insightface-kprpe gallery add
    postgresql://kim@db.example/faces ann.jpg --name Ann
    """
    from ..app.enrollment import enroll, people_of_folder, vanished
    from ..app.galleries import editing
    from ..app.recognition import open_pack
    from ..data.picture_files import list_pictures, nfc

    if name is None:
        pictures = people_of_folder(people)
    elif not people.exists():
        raise FileNotFoundError(f"images not found: {people}")
    else:
        pictures = [(nfc(name), path) for path in ([people] if people.is_file() else list_pictures(people))]
    analysis = open_pack(pack, root, det_thresh, aligned=aligned)
    with editing(index) as gallery:
        enrolled = enroll(analysis, gallery, pictures, are_crops=crops)
        lost = vanished(gallery, people)
        if prune and lost:
            gallery.drop(lost)
            gallery.commit()
        known = count(len(gallery.people()), "person", "people")
    _report(enrolled, people)
    fate = "removed" if prune else "still in the gallery; --prune removes it"
    for picture in lost:
        typer.echo(f"{picture.source}: no longer exists, {fate}", err=True)
    removed = f", {len(lost)} removed" if prune and lost else ""
    typer.echo(f"{gallery.place}: {_added(enrolled)}, {known}{removed}{_passed_over(enrolled, pictures)}")


def _added(enrolled: Enrolled) -> str:
    changed = f" ({len(enrolled.changed)} changed)" if enrolled.changed else ""
    moved = f", {len(enrolled.moved)} moved" if enrolled.moved else ""
    return f"{count(enrolled.added, 'image', 'images')} added{changed}{moved}"


def _passed_over(enrolled: Enrolled, pictures: list[tuple[str, Path]]) -> str:
    if not enrolled.passed_over:
        return ""
    # Names are listed where they are not the ones asked for.
    asked = {path: name for name, path in pictures}
    others = sorted({name for path, name in enrolled.passed_over.items() if asked[path] != name})
    known_as = f" (as {', '.join(others)})" if others else ""
    return f", {len(enrolled.passed_over)} skipped: already in the gallery{known_as}"


@gallery_app.command("list")
def list_people(index: Index) -> None:
    """List the people in the gallery, with their number of images.

    Example: insightface-kprpe gallery list people.npz
    """
    from ..app.galleries import reading

    with reading(index) as gallery:
        people = gallery.people()
    for name, pictures in people.items():
        typer.echo(f"{pictures:6}  {name}")
    known, pictures = count(len(people), "person", "people"), count(sum(people.values()), "image", "images")
    typer.echo(f"{gallery.place}: {known}, {pictures}, model {gallery.model}")


@gallery_app.command("remove")
def remove_person(index: Index, name: Annotated[str, typer.Argument(help="person to remove")]) -> None:
    """Remove a person. Example: insightface-kprpe gallery remove people.npz Ann"""
    from ..app.galleries import editing, reading

    with reading(index):
        pass  # fails if there is none
    with editing(index) as gallery:
        pictures = gallery.remove(name)
        gallery.commit()
        left = count(len(gallery.people()), "person", "people")
    typer.echo(f"{gallery.place}: {name} removed ({count(pictures, 'image', 'images')}), {left} left")


@app.command()
def doctor(
    root: Root = Path("~/.insightface"),
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Check the installation and the model packs; each problem is printed with the command that fixes it."""
    import json

    from ..app.doctor import examine, format_findings
    from ..app.findings import BROKEN

    findings = examine(root)
    typer.echo(json.dumps([item._asdict() for item in findings], indent=2) if as_json else format_findings(findings))
    raise typer.Exit(int(any(item.status == BROKEN for item in findings)))


def _report(enrolled: Enrolled, people: Path) -> None:
    """A line for each image with a problem; an error if no image could be added."""
    lines = {path: "changed, embedded again" for path in enrolled.changed if path not in enrolled.left_out}
    lines |= {path: f"moved from {source}" for path, source in enrolled.moved.items()}
    for path, line in lines.items():
        typer.echo(f"{path}: {line}", err=True)
    for path, doubt in enrolled.doubts.items():
        typer.echo(f"{path}: {doubt}", err=True)
    for path, reason in enrolled.left_out.items():
        gone = "; its old entry is removed from the gallery" if path in enrolled.changed else ""
        typer.echo(f"{path}: left out, {reason}{gone}", err=True)
    if enrolled.left_out and not (enrolled.added or enrolled.passed_over or enrolled.moved):
        raise ValueError(f"{people}: none of its images could be added")
    if enrolled.nobody:
        typer.echo(f"warning: the gallery has no images of {', '.join(enrolled.nobody)}", err=True)


def count(number: int, one: str, many: str) -> str:
    """A number and what is counted."""
    return f"{number} {one if number == 1 else many}"
