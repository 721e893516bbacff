"""A gallery of people that survives a kill, and search in it."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..data.picture_files import nfc
from ..evaluation.fusion import pool_templates
from ..evaluation.metrics import unit_rows
from ..files import atomic_path, check_writable, user_file
from ..fingerprint import file_sha256
from ..npz import read_npz

logger = logging.getLogger(__name__)

_FIELDS = ("names", "sources", "embeddings", "qualities")
_CONTENT_FIELDS = ("digests", "sizes", "times")  # galleries of the first days have none
_UNIT = 1e-3  # how far from 1 the length of a stored row may be


class Match(NamedTuple):
    """A person of the gallery, and the cosine similarity to them in [-1, 1]."""

    name: str
    similarity: float


class Content(NamedTuple):
    """Identifies the content of an image file: its SHA-256; size and modification time avoid reading it again."""

    digest: str = ""
    size: int = -1
    time: int = -1  # nanoseconds

    @classmethod
    def of(cls, path: Path, known: Content | None = None) -> Content:
        """The content of a file, which is read unless its size and time match those in ``known``."""
        status = path.stat()
        size, time = status.st_size, status.st_mtime_ns
        if known is not None and known.digest and (size, time) == known[1:]:
            return known
        return cls(file_sha256(path), size, time)


class Gallery:
    """Embeddings of named people, one row per image.

    Args:
        model: identifies the recognition model of the embeddings; "" in a new gallery.
    """

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.names = np.empty(0, dtype=np.str_)  # (N,) in composed Unicode
        self.sources = np.empty(0, dtype=np.str_)  # (N,) where each row came from
        self.embeddings = np.empty((0, 0), dtype=np.float32)  # (N, D) unit rows
        self.qualities = np.empty(0, dtype=np.float32)  # (N,) in [0, 1]
        self.digests = np.empty(0, dtype=np.str_)  # (N,) of the files' content; "" where unknown
        self.sizes = np.empty(0, dtype=np.int64)  # (N,) bytes, and
        self.times = np.empty(0, dtype=np.int64)  # (N,) nanoseconds: of the files when they were read; -1: unknown

    @classmethod
    def load(cls, path: str | Path) -> Gallery:
        """Read a gallery that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a gallery, or damaged.
        """
        path = user_file(path, "gallery", "create one with insightface-kprpe gallery add")
        gallery = cls()
        try:
            arrays = read_npz(path, ("model", *_FIELDS), _CONTENT_FIELDS)
            gallery.model = str(arrays.pop("model"))
            for field, values in arrays.items():
                setattr(gallery, field, values)
            gallery._complete(with_content=len(arrays) > len(_FIELDS))
        except ValueError as error:
            raise ValueError(
                f"{path} is not a gallery, or is damaged: {error}; add its people to a new one with insightface-kprpe "
                "gallery add"
            ) from error
        return gallery

    def _complete(self, with_content: bool) -> None:
        """Check what was read, and fill in what old galleries lack."""
        count = len(self.embeddings) if self.embeddings.ndim else 0
        if not with_content:
            self.digests, self.sizes, self.times = np.full(count, ""), np.full(count, -1), np.full(count, -1)
        kinds = dict.fromkeys(("names", "sources", "digests"), "U") | {"sizes": "i", "times": "i", "qualities": "f"}
        for field, kind in kinds.items():
            values = getattr(self, field)
            if values.shape != (count,) or values.dtype.kind != kind:
                raise ValueError(
                    f"{field} must be ({count},), one for each embedding, got {values.shape} {values.dtype}"
                )
        if self.embeddings.ndim != 2 or self.embeddings.dtype != np.float32:
            raise ValueError(f"embeddings must be (N, D) float32, got {self.embeddings.shape} {self.embeddings.dtype}")
        # Written so that NaN fails, too.
        lengths = np.sqrt(np.einsum("nd,nd->n", self.embeddings, self.embeddings, dtype=np.float64))
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _UNIT))
        if len(wrong):
            raise ValueError(f"embedding {wrong[0]} must be finite and of length 1, got length {lengths[wrong[0]]:g}")
        if not ((self.qualities >= 0) & (self.qualities <= 1)).all():
            raise ValueError("qualities must be in [0, 1]")
        self.names = np.array([nfc(name) for name in self.names.tolist()], dtype=np.str_)

    def save(self, path: str | Path) -> None:
        """Write the gallery; a kill at any moment leaves the old one or the new one."""
        fields = {field: getattr(self, field) for field in _FIELDS + _CONTENT_FIELDS}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, model=np.array(self.model), **fields)

    def add(
        self,
        names: Sequence[str],
        embeddings: np.ndarray,
        qualities: Sequence[float],
        sources: Sequence[str],
        contents: Sequence[Content] | None = None,
    ) -> None:
        """Add images of people.

        Args:
            names: B people.
            embeddings: (B, D) float, of any length.
            qualities: B numbers in [0, 1], how much each image counts for its person.
            sources: B descriptions of where the images are.
            contents: B, what the images are; None: unknown.

        Raises:
            ValueError: shapes do not fit, qualities are outside [0, 1], or embeddings are not finite or have no length.
        """
        rows = unit_rows(embeddings, "embeddings", np.float32)
        contents = [Content()] * len(rows) if contents is None else contents
        if not len(names) == len(rows) == len(qualities) == len(sources) == len(contents):
            raise ValueError(
                "names, embeddings, qualities, sources and contents must have the same length, got "
                f"{', '.join(str(len(values)) for values in (names, rows, qualities, sources, contents))}"
            )
        if not rows.any(1).all():
            raise ValueError("embeddings must not be zero, got a row of zeros")
        if not all(0 <= quality <= 1 for quality in qualities):
            raise ValueError(f"qualities must be in [0, 1], got {min(qualities):g} to {max(qualities):g}")
        if len(self.names) and rows.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"embeddings must be (B, {self.embeddings.shape[1]}) as in the gallery, got {rows.shape}; "
                "use the pack that it was made with"
            )
        self.embeddings = np.concatenate([self.embeddings.reshape(-1, rows.shape[1]), rows])
        new = {
            "names": [nfc(name) for name in names],
            "sources": sources,
            "qualities": qualities,
            "digests": [content.digest for content in contents],
            "sizes": [content.size for content in contents],
            "times": [content.time for content in contents],
        }
        for field, values in new.items():
            old = getattr(self, field)
            # String types of other lengths differ.
            values = np.asarray(values, dtype=np.str_ if old.dtype.kind == "U" else old.dtype)
            setattr(self, field, np.concatenate([old, values]))
        self._changed()

    def remove(self, name: str) -> int:
        """Forget a person.

        Returns:
            How many images that were.

        Raises:
            ValueError: nobody has that name.
        """
        drop = self.names == nfc(name)
        if not drop.any():
            raise ValueError(f"nobody in the gallery is named {name!r}; see insightface-kprpe gallery list")
        self.remove_rows(drop)
        return int(drop.sum())

    def remove_rows(self, drop: np.ndarray) -> None:
        """Forget images: (N,) bool."""
        for field in _FIELDS + _CONTENT_FIELDS:
            setattr(self, field, getattr(self, field)[~drop])
        self._changed()

    def content(self, row: int) -> Content:
        """What is known of the file that a row came from."""
        return Content(str(self.digests[row]), int(self.sizes[row]), int(self.times[row]))

    def move_row(self, row: int, name: str, source: str, content: Content) -> None:
        """Record that a row's image has moved, perhaps to another name."""
        new = {"names": nfc(name), "sources": source, "digests": content.digest}
        for field, text in new.items():
            values = getattr(self, field).tolist()
            values[row] = text
            setattr(self, field, np.array(values, dtype=np.str_))
        self.sizes[row], self.times[row] = content.size, content.time
        self._changed()

    def _changed(self) -> None:
        self.__dict__.pop("templates", None)

    def people(self) -> dict[str, int]:
        """How many images there are of each person, in the order of their names."""
        return dict(sorted(Counter(self.names.tolist()).items()))

    @functools.cached_property
    def templates(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) people and (T, D) float32 unit embeddings: the mean of a person's images, weighted by quality."""
        names, person = np.unique(self.names, return_inverse=True)
        if len(names) == len(self.names):
            return self.names, self.embeddings
        pooled, _ = pool_templates(self.embeddings, person, np.arange(len(person)), self.qualities)
        return names, pooled.astype(np.float32)

    def search(self, embeddings: np.ndarray, top: int = 1) -> list[list[Match]]:
        """The people most similar to each of some faces, by one matrix product.

        Args:
            embeddings: (B, D) float, of any length.
            top: how many people, at most.

        Returns:
            For each face up to ``top`` people, the most similar first.

        Raises:
            ValueError: the length of embeddings is not the gallery's.
        """
        names, templates = self.templates
        rows = unit_rows(embeddings, "embeddings", np.float32)
        if not len(names):
            return [[] for _ in rows]
        if rows.shape[1] != templates.shape[1]:
            raise ValueError(f"embeddings must be (B, {templates.shape[1]}) as in the gallery, got {rows.shape}")
        scores = rows @ templates.T
        top = min(top, len(names))
        best = np.argpartition(scores, -top, axis=1)[:, -top:] if top > 1 else scores.argmax(1)[:, None]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(scores, best, 1), 1, kind="stable"), 1)
        return [
            [Match(str(names[i]), float(row[i])) for i in columns] for row, columns in zip(scores, best, strict=True)
        ]


@contextmanager
def editing(path: str | Path) -> Iterator[Gallery]:
    """A gallery (a new one if there is no file) that no other process can change in the meantime; the block saves it.

    Raises:
        ValueError: the file is not a gallery, or damaged.
    """
    path = Path(path)
    check_writable(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s is being changed by another process; waiting for it", path)
        lock.acquire()
    try:
        yield Gallery.load(path) if path.exists() else Gallery()
    finally:
        lock.release()
