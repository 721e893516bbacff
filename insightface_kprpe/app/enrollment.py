"""Adds people's images to a gallery; new, changed, moved and deleted ones are identified by their content."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ..data.picture_files import list_people, nfc
from .gallery import Content, Gallery, Picture
from .pictures import read_picture
from .recognition import check_model, crop_faces, face_quality

# Below it, hardly any face can be told from others, and many are not faces: the worst of 11,000 aligned in-the-wild
# faces has 0.39, and half of a thousand sets of random points have less than 0.14.
LOW_QUALITY = 0.3
_PICTURES_AT_A_TIME = 32
_PICTURES_A_SAVE = 256  # at most lost by a kill while adding


@dataclass
class Enrolled:
    """What happened to images that were to be added to a gallery.

    Attributes:
        added: number of new rows, including those of changed images.
        passed_over: the name under which each file is already in the gallery.
        changed: files whose content has changed; embedded again.
        moved: the former path of each file, which no longer exists.
        left_out: why each file could not be added.
        doubts: remarks on files that were added but may need a look.
        nobody: people of whom the gallery has no image.
    """

    added: int = 0
    passed_over: dict[Path, str] = field(default_factory=dict)
    changed: list[Path] = field(default_factory=list)
    moved: dict[Path, str] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)
    doubts: dict[Path, str] = field(default_factory=dict)
    nobody: list[str] = field(default_factory=list)


class _New(NamedTuple):
    """An image to embed."""

    name: str
    file: Path
    content: Content


def people_of_folder(folder: str | Path) -> list[tuple[str, Path]]:
    """Name and path of every image: a sub-folder holds one person's, an image next to them is the person of its name.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of people not found: {folder}")
    people = list_people(folder, single=True)
    if not people:
        raise ValueError(f"no images in {folder}; expected {folder}/NAME/*.jpg, or {folder}/NAME.jpg")
    return [(name, path) for name, paths in people.items() for path in paths]


def enroll(
    app: Any,
    gallery: Gallery,
    pictures: Iterable[tuple[str, Path]],
    *,
    are_crops: bool = False,
) -> Enrolled:
    """Add the largest face of each image to a gallery.

    Files are compared by content: known content is skipped, or followed if it was moved, and changed files are embedded
    again.

    Args:
        app: insightface's ``FaceAnalysis`` after ``register()``, prepared.
        gallery: to add to; committed now and then and at the end, if anything was changed.
        images: name and image file of each.
        are_crops: every image is a single face already aligned to the template; no detection.

    Returns:
        What happened to them; files that are not images, and images without a face, are left out.

    Raises:
        ValueError: the gallery was made with another recognition model.
    """
    check_model(app, gallery)
    result, pictures = Enrolled(), list(pictures)
    waiting, unsaved = _sort_out(gallery, pictures, result)
    since_save = 0
    for group in _groups(tqdm(waiting, "enrolling", disable=None), _PICTURES_AT_A_TIME):
        readable = _read(group, result)
        photos = [photo for _, photo in readable]
        found = _faces_of_crops(app, readable, result) if are_crops else app.get_batch(photos)
        unsaved |= _add(gallery, [new for new, _ in readable], found, result)
        since_save += len(group)
        if unsaved and since_save >= _PICTURES_A_SAVE:
            gallery.commit()
            since_save, unsaved = 0, False
    if unsaved:
        gallery.commit()
    result.nobody = sorted({nfc(name) for name, _ in pictures} - gallery.people().keys())
    return result


def vanished(gallery: Gallery, folder: str | Path) -> list[Picture]:
    """The images that lay below a folder and do not exist any more."""
    return [picture for picture in gallery.below(Path(folder).resolve()) if not Path(picture.source).exists()]


def _sort_out(gallery: Gallery, pictures: Sequence[tuple[str, Path]], result: Enrolled) -> tuple[list[_New], bool]:
    """The images to embed, and whether the gallery was changed: what it has of changed files goes, of moved stays."""
    sources = {file: str(file.resolve()) for _, file in pictures}
    by_source = {picture.source: picture for picture in gallery.from_sources(sources.values())}
    outdated: dict[int, Picture] = {}
    elsewhere: dict[int, Picture] = {}  # moved, or only touched: as they are now
    unknown = []
    for name, file in pictures:
        known = by_source.get(sources[file])
        try:
            content = Content.of(file, None if known is None else known.content)
        except OSError as error:
            result.left_out[file] = f"cannot be read: {error.strerror}"
            continue
        if known is not None and content.digest == known.content.digest:
            if content != known.content:
                elsewhere[known.key] = known._replace(content=content)
            result.passed_over[file] = known.name
            continue
        if known is not None:
            outdated[known.key] = known
            result.changed.append(file)
        unknown.append(_New(nfc(name), file, content))
    moved, waiting = _meet_again(gallery, unknown, outdated, result)
    elsewhere |= moved
    if elsewhere:
        gallery.replace(elsewhere.values())
    if outdated:
        gallery.drop(outdated.values())
    return waiting, bool(elsewhere or outdated)


def _meet_again(
    gallery: Gallery, unknown: Sequence[_New], outdated: Collection[int], result: Enrolled
) -> tuple[dict[int, Picture], list[_New]]:
    """Of files that the gallery does not know: its images that were moved there, and the files of new content."""
    same = gallery.with_digests({new.content.digest for new in unknown})
    by_digest = {picture.content.digest: picture for picture in same if picture.key not in outdated}
    moved: dict[int, Picture] = {}
    waiting: dict[str, _New] = {}
    for new in unknown:
        digest = new.content.digest
        if (known := by_digest.get(digest)) is None:
            if waiting.setdefault(digest, new) is not new:
                result.passed_over[new.file] = waiting[digest].name
        elif Path(known.source).exists():
            result.passed_over[new.file] = known.name
        else:
            result.moved[new.file] = known.source
            by_digest[digest] = known._replace(name=new.name, source=str(new.file.resolve()), content=new.content)
            moved[known.key] = by_digest[digest]
    return moved, list(waiting.values())


def _read(group: Iterable[_New], result: Enrolled) -> list[tuple[_New, np.ndarray]]:
    """The images that can be read, and their pixels."""
    readable = []
    for new in group:
        try:
            readable.append((new, read_picture(new.file)))
        except (ValueError, OSError) as error:
            result.left_out[new.file] = str(error).removeprefix(f"{new.file} ")
    return readable


def _faces_of_crops(app: Any, readable: list[tuple[_New, np.ndarray]], result: Enrolled) -> list[list[Any]]:
    found = []
    for new, crop in readable:
        try:
            found += crop_faces(app, [crop])
        except ValueError as error:
            result.left_out[new.file] = str(error)
            found.append([])
    return found


def _add(gallery: Gallery, pictures: Sequence[_New], found: Sequence[list[Any]], result: Enrolled) -> bool:
    """Add the largest face of each image; True where there was one."""
    chosen = []
    for new, faces in zip(pictures, found, strict=True):
        if not faces:
            result.left_out.setdefault(new.file, "no face found")
            continue
        face = max(faces, key=_area)
        quality = face_quality(face)
        if not np.linalg.norm(face.embedding) > 0:
            result.left_out[new.file] = "the network gives no finite embedding"
            continue
        chosen.append((new, face, quality))
        doubts = [f"{len(faces)} faces, using the largest"] if len(faces) > 1 else []
        doubts += [f"quality {quality:.2f}: perhaps no face, or one in profile"] if quality < LOW_QUALITY else []
        if doubts:
            result.doubts[new.file] = "; ".join(doubts)
    if not chosen:
        return False
    names, files, contents = zip(*(new for new, _, _ in chosen), strict=True)
    embeddings = np.stack([face.embedding for _, face, _ in chosen])
    sources = [str(file.resolve()) for file in files]
    gallery.add(names, embeddings, [quality for _, _, quality in chosen], sources, contents)
    result.added += len(chosen)
    return True


def _area(face: Any) -> float:
    return float((face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1]))


def _groups(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
