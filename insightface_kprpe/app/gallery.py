"""What a gallery of people is, wherever it is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.picture_files import nfc
from ..evaluation.metrics import unit_rows
from ..fingerprint import file_sha256


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


class Picture(NamedTuple):
    """An image in a gallery: whose it is, where it came from, and what is known of that file."""

    key: int  # tells it from the gallery's others, until some are dropped
    name: str
    source: str
    content: Content


class Gallery(ABC):
    """Embeddings of named people, one for each image.

    What is changed is seen at once, and survives from the next :meth:`commit` on.

    Attributes:
        place: where it is kept, for messages; a password is no part of it.
        model: identifies the recognition model of the embeddings; "" in a new gallery.
    """

    place: str
    model: str

    @property
    @abstractmethod
    def width(self) -> int | None:
        """Numbers of an embedding; None until some are added."""

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
        if self.width not in (None, rows.shape[1]):
            raise ValueError(
                f"embeddings must be (B, {self.width}) as in the gallery, got {rows.shape}; "
                "use the pack that it was made with"
            )
        if len(rows):
            self._add([nfc(name) for name in names], rows, qualities, sources, contents)

    def remove(self, name: str) -> int:
        """Forget a person.

        Returns:
            How many images that were.

        Raises:
            ValueError: nobody has that name.
        """
        pictures = self._remove(nfc(name))
        if not pictures:
            raise ValueError(f"nobody in the gallery is named {name!r}; see insightface-kprpe gallery list")
        return pictures

    def search(self, embeddings: np.ndarray, top: int = 1) -> list[list[Match]]:
        """The people most similar to each of some faces; all people are compared.

        A person is the mean of their images, weighted by quality.

        Args:
            embeddings: (B, D) float, of any length.
            top: how many people, at most.

        Returns:
            For each face up to ``top`` people, the most similar first.

        Raises:
            ValueError: the length of embeddings is not the gallery's.
        """
        rows = unit_rows(embeddings, "embeddings", np.float32)
        if self.width is None or not len(rows):
            return [[] for _ in rows]
        if rows.shape[1] != self.width:
            raise ValueError(f"embeddings must be (B, {self.width}) as in the gallery, got {rows.shape}")
        return self._search(rows, top)

    @abstractmethod
    def people(self) -> dict[str, int]:
        """How many images there are of each person, in the order of their names."""

    @abstractmethod
    def from_sources(self, sources: Collection[str]) -> list[Picture]:
        """The images that came from one of these places."""

    @abstractmethod
    def with_digests(self, digests: Collection[str]) -> list[Picture]:
        """The images whose files had one of these digests."""

    @abstractmethod
    def below(self, folder: str | Path) -> list[Picture]:
        """The images that came from this folder or its sub-folders, or from this file."""

    @abstractmethod
    def replace(self, pictures: Collection[Picture]) -> None:
        """Change name, source and content of the images that have the keys of these; their embeddings stay."""

    @abstractmethod
    def drop(self, pictures: Collection[Picture]) -> None:
        """Forget images."""

    @abstractmethod
    def commit(self) -> None:
        """Keep what was changed; a kill at any moment leaves what the last commit left."""

    @abstractmethod
    def _add(
        self,
        names: Sequence[str],
        rows: np.ndarray,
        qualities: Sequence[float],
        sources: Sequence[str],
        contents: Sequence[Content],
    ) -> None:
        """Add one or more images, with names in composed Unicode and unit rows (B, D) float32."""

    @abstractmethod
    def _remove(self, name: str) -> int:
        """Forget a person, named in composed Unicode; how many images that were."""

    @abstractmethod
    def _search(self, rows: np.ndarray, top: int) -> list[list[Match]]:
        """:meth:`search` for unit rows (B, D) float32, of the gallery's width."""
