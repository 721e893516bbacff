"""A gallery of people that survives a kill, and search in it."""

from __future__ import annotations

import functools
import logging
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..evaluation.fusion import pool_templates
from ..evaluation.metrics import unit_rows
from ..files import atomic_path

logger = logging.getLogger(__name__)


class Match(NamedTuple):
    """A person of the gallery, and the cosine similarity to them in [-1, 1]."""

    name: str
    similarity: float


class Gallery:
    """Embeddings of named people, one row a picture.

    Args:
        model: what tells the recognition model apart whose embeddings these are; "" in a new gallery.
    """

    def __init__(self, model: str = "") -> None:
        self.model = model
        self.names = np.empty(0, dtype=np.str_)  # (N,)
        self.sources = np.empty(0, dtype=np.str_)  # (N,) where each row came from
        self.embeddings = np.empty((0, 0), dtype=np.float32)  # (N, D) unit rows
        self.qualities = np.empty(0, dtype=np.float32)  # (N,) in [0, 1]

    @classmethod
    def load(cls, path: str | Path) -> Gallery:
        """Read a gallery that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no gallery, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"gallery not found: {path}; make one with insightface-kprpe gallery add")
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is no gallery, or a damaged one; make one with insightface-kprpe gallery add")
        gallery = cls()
        try:
            with np.load(path, allow_pickle=False) as file:
                gallery.model = str(file["model"])
                for field in ("names", "sources", "embeddings", "qualities"):
                    setattr(gallery, field, file[field])
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no gallery, or a damaged one; add its people to a new one") from error
        counts = {len(gallery.names), len(gallery.sources), len(gallery.embeddings), len(gallery.qualities)}
        if len(counts) != 1 or gallery.embeddings.ndim != 2 or gallery.embeddings.dtype != np.float32:
            raise ValueError(f"{path} is no gallery: its arrays do not belong together")
        return gallery

    def save(self, path: str | Path) -> None:
        """Write the gallery; a kill at any moment leaves the old one or the new one."""
        fields = {field: getattr(self, field) for field in ("names", "sources", "embeddings", "qualities")}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, model=np.array(self.model), **fields)

    def add(
        self, names: Sequence[str], embeddings: np.ndarray, qualities: Sequence[float], sources: Sequence[str]
    ) -> None:
        """Add pictures of people.

        Args:
            names: B people.
            embeddings: (B, D) float, of any length.
            qualities: B numbers in [0, 1], how much each picture counts for its person.
            sources: B descriptions of where the pictures are.

        Raises:
            ValueError: shapes do not fit, or embeddings are not finite.
        """
        rows = unit_rows(embeddings, "embeddings", np.float32)
        if not len(names) == len(rows) == len(qualities) == len(sources):
            raise ValueError(f"names, embeddings, qualities and sources must be as many, got {len(names)}, {len(rows)}")
        if len(self.names) and rows.shape[1] != self.embeddings.shape[1]:
            raise ValueError(
                f"embeddings must be (B, {self.embeddings.shape[1]}) as in the gallery, got {rows.shape}; "
                "use the pack that it was made with"
            )
        self.embeddings = np.concatenate([self.embeddings.reshape(-1, rows.shape[1]), rows])
        self.names = np.concatenate([self.names, np.asarray(names, dtype=np.str_)])
        self.sources = np.concatenate([self.sources, np.asarray(sources, dtype=np.str_)])
        self.qualities = np.concatenate([self.qualities, np.asarray(qualities, dtype=np.float32)])
        self.__dict__.pop("templates", None)

    def remove(self, name: str) -> int:
        """Forget a person.

        Returns:
            How many pictures that were.

        Raises:
            ValueError: nobody has that name.
        """
        keep = self.names != name
        if keep.all():
            raise ValueError(f"nobody in the gallery is named {name!r}; see insightface-kprpe gallery list")
        for field in ("names", "sources", "embeddings", "qualities"):
            setattr(self, field, getattr(self, field)[keep])
        self.__dict__.pop("templates", None)
        return int(len(keep) - keep.sum())

    def people(self) -> dict[str, int]:
        """How many pictures there are of each person, in the order of their names."""
        return dict(sorted(Counter(self.names.tolist()).items()))

    @functools.cached_property
    def templates(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) people and (T, D) float32 unit embeddings: the mean of a person's pictures, weighted by quality."""
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
    """A gallery, a new one where there is no file, that no other process can change meanwhile; saving is the block's.

    Raises:
        ValueError: the file is no gallery, or damaged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
