"""A gallery in memory and in a file that survives a kill."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from ..data.picture_files import nfc
from ..evaluation.fusion import pool_templates
from ..files import atomic_path, user_file
from ..npz import read_npz
from .gallery import Content, Gallery, Match, Picture
from .nearest import nearest_rows

_FIELDS = ("names", "sources", "embeddings", "qualities")
_CONTENT_FIELDS = ("digests", "sizes", "times")  # galleries of the first days have none
_UNIT = 1e-3  # how far from 1 the length of a stored row may be


class FileGallery(Gallery):
    """A gallery in memory, one row per image; :meth:`commit` writes it to its file, where it has one.

    Args:
        model: identifies the recognition model of the embeddings; "" in a new gallery.
        path: its file, which need not be there yet; None: it lives in memory alone.
    """

    def __init__(self, model: str = "", path: str | Path | None = None) -> None:
        self.model = model
        self.path = None if path is None else Path(path)
        self.place = "memory" if path is None else str(path)
        self.names = np.empty(0, dtype=np.str_)  # (N,) in composed Unicode
        self.sources = np.empty(0, dtype=np.str_)  # (N,) where each row came from
        self.embeddings = np.empty((0, 0), dtype=np.float32)  # (N, D) unit rows
        self.qualities = np.empty(0, dtype=np.float32)  # (N,) in [0, 1]
        self.digests = np.empty(0, dtype=np.str_)  # (N,) of the files' content; "" where unknown
        self.sizes = np.empty(0, dtype=np.int64)  # (N,) bytes, and
        self.times = np.empty(0, dtype=np.int64)  # (N,) nanoseconds: of the files when they were read; -1: unknown

    @classmethod
    def load(cls, path: str | Path) -> FileGallery:
        """Read a gallery that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a gallery, or damaged.
        """
        path = user_file(path, "gallery", "create one with insightface-kprpe gallery add")
        gallery = cls(path=path)
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

    def commit(self) -> None:
        """Write the gallery to its file, where it has one."""
        if self.path is not None:
            self.save(self.path)

    @property
    def width(self) -> int | None:
        """Numbers of an embedding; None while there are none."""
        return self.embeddings.shape[1] if len(self.names) else None

    def people(self) -> dict[str, int]:
        """How many images there are of each person, in the order of their names."""
        return dict(sorted(Counter(self.names.tolist()).items()))

    def from_sources(self, sources: Collection[str]) -> list[Picture]:
        """The images that came from one of these places."""
        wanted = set(sources)
        return [self._picture(row) for row, source in enumerate(self.sources.tolist()) if source in wanted]

    def with_digests(self, digests: Collection[str]) -> list[Picture]:
        """The images whose files had one of these digests."""
        wanted = set(digests)
        return [self._picture(row) for row, digest in enumerate(self.digests.tolist()) if digest in wanted]

    def below(self, folder: str | Path) -> list[Picture]:
        """The images that came from this folder or its sub-folders, or from this file."""
        rows = enumerate(self.sources.tolist())
        return [self._picture(row) for row, source in rows if Path(source).is_relative_to(folder)]

    def _picture(self, row: int) -> Picture:
        content = Content(str(self.digests[row]), int(self.sizes[row]), int(self.times[row]))
        return Picture(row, str(self.names[row]), str(self.sources[row]), content)

    def replace(self, pictures: Collection[Picture]) -> None:
        """Change name, source and content of the images that have the keys of these; their embeddings stay."""
        names, sources, digests = self.names.tolist(), self.sources.tolist(), self.digests.tolist()
        for key, name, source, content in pictures:
            names[key], sources[key], digests[key] = nfc(name), source, content.digest
            self.sizes[key], self.times[key] = content.size, content.time
        self.names, self.sources, self.digests = (np.array(v, dtype=np.str_) for v in (names, sources, digests))
        self._changed()

    def drop(self, pictures: Collection[Picture]) -> None:
        """Forget images."""
        gone = np.zeros(len(self.names), dtype=bool)
        gone[[picture.key for picture in pictures]] = True
        self._keep(~gone)

    def _remove(self, name: str) -> int:
        gone = self.names == name
        self._keep(~gone)
        return int(gone.sum())

    def _keep(self, rows: np.ndarray) -> None:
        for field in _FIELDS + _CONTENT_FIELDS:
            setattr(self, field, getattr(self, field)[rows])
        self._changed()

    def _add(
        self,
        names: Sequence[str],
        rows: np.ndarray,
        qualities: Sequence[float],
        sources: Sequence[str],
        contents: Sequence[Content],
    ) -> None:
        self.embeddings = np.concatenate([self.embeddings.reshape(-1, rows.shape[1]), rows])
        new = {
            "names": names,
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

    def _changed(self) -> None:
        self.__dict__.pop("templates", None)

    @functools.cached_property
    def templates(self) -> tuple[np.ndarray, np.ndarray]:
        """(T,) people and (T, D) float32 unit embeddings: the mean of a person's images, weighted by quality."""
        names, person = np.unique(self.names, return_inverse=True)
        if len(names) == len(self.names):
            return self.names, self.embeddings
        pooled, _ = pool_templates(self.embeddings, person, np.arange(len(person)), self.qualities)
        return names, pooled.astype(np.float32)

    def _search(self, rows: np.ndarray, top: int) -> list[list[Match]]:
        names, templates = self.templates
        found, scores = nearest_rows(rows, templates, min(top, len(names)))
        return [
            [Match(str(names[person]), float(score)) for person, score in zip(*face, strict=True)]
            for face in zip(found, scores, strict=True)
        ]
