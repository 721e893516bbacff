"""Sets of face crops in any container, in the order in which their landmark file numbers them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .face_dataset import LANDMARK_FILE
from .picture_files import list_people, list_pictures, read_image_file
from .record_checks import check_index
from .recordio import RecordReader
from .verification_bin import read_verification_bin


class Crops(NamedTuple):
    """A set of face crops.

    Attributes:
        count: how many.
        read: index -> (H, W, 3) uint8 RGB.
        landmark_file: where data sets and evaluators look for the landmarks.
        paths: the image files, in order; None if images are not files.
        container: the file that holds all images, if they are not files.
    """

    count: int
    read: Callable[[int], np.ndarray]
    landmark_file: Path
    paths: list[Path] | None = None
    container: Path | None = None


def open_crops(source: str | Path) -> Crops:
    """Open a set of crops in the order in which its landmark file numbers them.

    Args:
        source: a folder with ``train.rec``, a ``.rec`` file, a ``.bin`` verification set, a folder with one sub-folder
            of images per person, or a folder of images.

    Raises:
        ValueError: it is none of these, or damaged.
    """
    source = Path(source)
    if source.suffix == ".rec" or (source / "train.rec").is_file():
        reader = RecordReader(source)
        check_index(reader)
        read = functools.partial(_read_record, reader, reader.image_keys)
        return Crops(len(reader.image_keys), read, reader.path.parent / LANDMARK_FILE, container=reader.path)
    if source.suffix == ".bin" and source.is_file():
        pairs = read_verification_bin(source)
        landmark_file = source.with_name(f"{source.stem}_{LANDMARK_FILE}")
        return Crops(len(pairs.images), pairs.image, landmark_file, container=source)
    if not source.is_dir():
        raise ValueError(f"source must be a .rec or .bin file, or a folder of images or with train.rec, got {source}")
    paths = [path for files in list_people(source).values() for path in files] or list_pictures(source)
    if not paths:
        raise ValueError(f"source must be a folder of images or with train.rec, got {source}, which has neither")
    return Crops(len(paths), functools.partial(_read_path, paths), source / LANDMARK_FILE, paths)


def _read_record(reader: RecordReader, keys: np.ndarray, index: int) -> np.ndarray:
    return reader.read_image(int(keys[index]))[1]


def _read_path(paths: list[Path], index: int) -> np.ndarray:
    return read_image_file(paths[index])
