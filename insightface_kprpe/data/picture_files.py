"""Lists and reads image files in the same way for every verb, and reports all other files."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from ..files import user_file
from .image_codec import HEIF_REMEDY, decode_image

logger = logging.getLogger(__name__)

_ALWAYS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp"})
_WHERE_OPENCV_CAN = frozenset({".gif", ".webp", ".tif", ".tiff", ".avif"})
_HEIF = frozenset({".heic", ".heif", ".hif"})
# Files that operating systems leave in folders; names that start with a dot are hidden anyway.
_SYSTEM_NAMES = frozenset(
    {
        "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "#snapshot",
        "$recycle.bin", "system volume information", "lost+found", "__pycache__",
    }
)  # fmt: skip
# What this package and its likes put beside pictures.
_COMPANIONS = ("ldmk_5points.csv", "ldmk_5points.png", "faces.csv", "pairs.txt", "label.txt", "property")
_SHOWN = 3  # files that a warning names, of each kind


@functools.cache
def readable_suffixes() -> frozenset[str]:
    """Suffixes of the formats that can be read, which depends on the OpenCV build and the extra ``heif``."""
    # OpenCV has both the encoder and the decoder of a format or neither, and can be asked only for the encoder without
    # a file.
    by_opencv = {suffix for suffix in _WHERE_OPENCV_CAN if cv2.haveImageWriter(f"x{suffix}")}
    return _ALWAYS | by_opencv | (_HEIF if importlib.util.find_spec("pillow_heif") else frozenset())


def nfc(name: str) -> str:
    """A name in composed Unicode (NFC): macOS writes an accent as a separate character, and both forms look alike."""
    return unicodedata.normalize("NFC", name)


def list_pictures(folder: str | Path) -> list[Path]:
    """The image files of a folder and its sub-folders, in order.

    Hidden and system files are ignored; a warning counts and names the others, by their suffix.
    """
    folder = Path(folder)
    pictures, others = _split(_files(folder))
    _warn_of(folder, others)
    return pictures


def list_people(folder: str | Path, single: bool = False) -> dict[str, list[Path]]:
    """Images of each person: those in the sub-folder of their name, and in its sub-folders.

    Hidden and system files are ignored. Warnings count and name the files that are not images, and name the people
    who have none.

    Args:
        folder: of the people.
        single: an image next to the sub-folders is one of the person that it is named after; otherwise a warning says
            that it is left out.

    Returns:
        Name (composed Unicode) -> image files, both in sorted order: how a folder of people is numbered.
    """
    folder = Path(folder)
    beside, people = [], defaultdict(list)
    others, without = [], []
    for entry in _entries(folder):
        if not entry.is_dir():
            beside.append(entry)
            continue
        pictures, unknown = _split(_files(entry))
        others += unknown
        if pictures:
            people[nfc(entry.name)] += pictures
        else:
            without.append(entry.name)
    pictures, unknown = _split(beside)
    if single:
        for picture in pictures:
            people[nfc(picture.stem)].append(picture)
        others += unknown
    _warn_of(folder, others)
    if people and pictures and not single:
        logger.warning("%s: left out: %d images next to the people's folders (%s)", folder, len(pictures),
                       _some(picture.name for picture in pictures))  # fmt: skip
    without = [name for name in without if nfc(name) not in people]
    if people and without:
        logger.warning("%s: no images of %d people: %s", folder, len(without), _some(without))
    return dict(sorted(people.items()))


def read_image_file(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned as its EXIF entry says; of a GIF the first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an image, a truncated one, of a kind that cannot be read here, or too large; with its
            name.
    """
    if not os.path.isfile(path):  # a folder, nothing, or a pipe, which would never end
        user_file(path, "image")
    try:
        return decode_image(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path} could not be read as an image: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} could not be read as an image: {error}; remove or replace it") from error


def _entries(folder: Path) -> list[Path]:
    """The entries of a folder without hidden and system names, in the order of composed names."""
    names = (name for name in os.listdir(folder) if not name.startswith(".") and name.lower() not in _SYSTEM_NAMES)
    return [folder / name for name in sorted(names, key=lambda name: (nfc(name), name))]


def _files(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files below a folder; links are followed, but not in circles."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _files(entry, (*above, here))
        else:
            yield entry


def _split(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Images, and all others but those that belong next to images."""
    pictures, others = [], []
    for file in files:
        if file.name.endswith(_COMPANIONS) and not _is_special(file):
            continue
        (pictures if file.suffix.lower() in readable_suffixes() else others).append(file)
    return pictures, others


def _is_special(file: Path) -> bool:
    """Whether this is a pipe, a socket or a device, which nobody can read to its end."""
    try:
        return not stat.S_ISREG(file.stat().st_mode)
    except OSError:  # as a link to nothing: reading it says so
        return False


def _warn_of(folder: Path, others: list[Path]) -> None:
    by_suffix = defaultdict(list)
    for file in others:
        by_suffix[file.suffix.lower()].append(str(file.relative_to(folder)))
    if not others:
        return
    kinds = (
        f"{len(names)} {suffix or 'without suffix'} ({_some(names)})" for suffix, names in sorted(by_suffix.items())
    )
    heif = f"; {HEIF_REMEDY}" if _HEIF & set(by_suffix) else ""
    opencv = _WHERE_OPENCV_CAN & set(by_suffix)
    old = f"; the installed OpenCV {cv2.__version__} does not read {', '.join(sorted(opencv))}" if opencv else ""
    logger.warning("%s: left out, not readable images: %s%s%s", folder, ", ".join(kinds), heif, old)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
