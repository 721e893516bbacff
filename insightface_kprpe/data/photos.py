"""Photos to look for faces in: a folder of them, one file, or the frames of a video."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from .picture_files import list_people, list_pictures, read_image_file, readable_suffixes

# One letter before the colon is a drive of Windows; pathlib makes one slash of two.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_VIDEOS = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"})


class PhotoFiles:
    """Picture files below a folder.

    Args:
        paths: of the files.
        folder: that their names are told from.

    Attributes:
        names: path of each below the folder, with slashes.
    """

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self.paths = list(paths)
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        return read_image_file(self.paths[index])

    def stamp(self, index: int) -> tuple[int, int]:
        """Size in bytes and time of the last change in nanoseconds: the same, and the photo is taken for the same."""
        status = self.paths[index].stat()
        return status.st_size, status.st_mtime_ns


class VideoFrames:
    """Frames of a video, read in their order; going back opens the file again.

    Args:
        path: of the video.
        every: of so many frames the first counts.

    Attributes:
        names: ``frame_000000`` and so on, by the frames' numbers in the video.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: OpenCV can read no frame of it.
    """

    def __init__(self, path: Path, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more frames, got {every}")
        self.path = path
        self._capture, self._owner, self._next = None, 0, 0
        self._open()
        # Counted, as many files say wrongly or not at all how long they are.
        while self._capture.grab():
            self._next += 1
        if not self._next:
            raise ValueError(f"{path} holds no frame that OpenCV can read; is it a video?")
        self.numbers = range(0, self._next, every)
        self.names = [f"frame_{number:06d}" for number in self.numbers]
        self._capture = None

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        number = self.numbers[index]
        # A process that was forked shares the place in the file with its parent.
        if self._capture is None or self._owner != os.getpid() or number < self._next:
            self._open()
        while self._next < number and self._capture.grab():
            self._next += 1
        whole, frame = self._capture.read()
        self._next += 1
        if not whole:
            raise ValueError(f"{self.path}: frame {number} could not be read")
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def stamp(self, index: int) -> tuple[int, int]:
        """Size and time of the video; see :meth:`PhotoFiles.stamp`."""
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def _open(self) -> None:
        self._capture, self._owner, self._next = cv2.VideoCapture(str(self.path)), os.getpid(), 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_capture": None}


def refuse_url(path: str | Path) -> Path:
    """A path that is no address of the net, of which this package opens none.

    Raises:
        ValueError: it is one.
    """
    if _URL.match(str(path)):
        raise ValueError(f"{path} is a URL, and nothing is downloaded here; save the picture and name its file")
    return Path(path)


def photo_paths(source: str | Path) -> list[Path]:
    """One picture file, or those of a folder and its sub-folders.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is a URL, or a folder without pictures.
    """
    source = refuse_url(source)
    if source.is_dir():
        if not (paths := list_pictures(source)):
            raise ValueError(f"{source} holds no pictures")
        return paths
    if not source.exists():
        raise FileNotFoundError(f"picture or folder not found: {source}")
    return [source]


def open_photos(source: str | Path, every: int = 1) -> PhotoFiles | VideoFrames:
    """Open photos: indexable, (H, W, 3) uint8 RGB, with ``names`` and ``stamp(index)``.

    Args:
        source: a folder with a sub-folder of photos a person, a folder of photos, one photo, or a video.
        every: of so many frames of a video the first counts.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is a URL, a folder without pictures, or a file of another kind.
    """
    source = refuse_url(source)
    if source.is_file() and source.suffix.lower() in _VIDEOS:
        return VideoFrames(source, every)
    if source.is_file() and source.suffix.lower() not in readable_suffixes():
        raise ValueError(
            f"source must be a folder of pictures, a picture or a video ({' '.join(sorted(_VIDEOS))}), got {source}"
        )
    if source.is_dir() and (people := list_people(source)):
        return PhotoFiles([path for paths in people.values() for path in paths], source)
    return PhotoFiles(photo_paths(source), source if source.is_dir() else source.parent)
