"""A gallery in PostgreSQL with pgvector, for people that several machines know, or more than one can hold."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..data.picture_files import nfc
from ..evaluation.fusion import pool_templates
from .gallery import Content, Gallery, Match, Picture

logger = logging.getLogger(__name__)

_SCHEMES = ("postgresql:", "postgres:")  # also where the slashes are wrong: such a thing is no file, and may be secret
_ADVICE = "expected postgresql://USER@HOST:PORT/DATABASE, with % and two digits for special characters of a password"
# The people's templates are kept next to their images, so that a search reads one row a person; and within that row:
# PostgreSQL would put vectors of 2 kB elsewhere, and fetch each of them.
_TABLES = """
CREATE TABLE kprpe_gallery (model text NOT NULL);
CREATE TABLE kprpe_pictures (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL, source text NOT NULL, quality real NOT NULL, embedding vector({width}) NOT NULL,
    digest text NOT NULL, size bigint NOT NULL, time bigint NOT NULL);
CREATE TABLE kprpe_people (name text PRIMARY KEY, template vector({width}) NOT NULL);
ALTER TABLE kprpe_people ALTER COLUMN template SET STORAGE MAIN;
CREATE INDEX ON kprpe_pictures USING hash (name);
CREATE INDEX ON kprpe_pictures USING hash (source);
CREATE INDEX ON kprpe_pictures USING hash (digest);
INSERT INTO kprpe_gallery VALUES ('');
"""
_WIDTH = "SELECT atttypmod FROM pg_attribute WHERE attrelid = 'kprpe_people'::regclass AND attname = 'template'"
_TURN = "hashtext('insightface-kprpe gallery')"  # the lock that writers of a database's gallery take


def is_address(place: str | Path) -> bool:
    """Whether a gallery's place is an address in PostgreSQL."""
    return str(place).startswith(_SCHEMES)


@contextmanager
def open_postgres(address: str, to_edit: bool) -> Iterator[PostgresGallery]:
    """Connect to a gallery.

    Args:
        address: as libpq takes it, postgresql://...
        to_edit: nobody else can change the gallery meanwhile, and there need not be one yet.

    Raises:
        ImportError: the extra ``postgres`` is missing.
        ValueError: the address is none, or there is no gallery.
        RuntimeError: the server cannot be reached, or refuses.
    """
    try:
        import pgvector.psycopg  # noqa: F401
        import psycopg
    except ImportError as error:
        raise ImportError("a gallery in PostgreSQL needs: pip install 'insightface-kprpe[postgres]'") from error
    place = shown_address(address)
    with _explained(place):
        # Searches are statements of their own, so that a page that stays open holds no transaction open.
        connection = psycopg.connect(address, autocommit=not to_edit)
    try:
        gallery = PostgresGallery(connection, place)
        if to_edit:
            gallery.take_turn()
        elif not gallery.exists:
            raise ValueError(f"{place} has no gallery; create one with insightface-kprpe gallery add")
        yield gallery
    finally:
        connection.close()  # what was not committed is undone


def shown_address(address: str) -> str:
    """An address without its password, and whatever else is none of a message's business.

    Raises:
        ValueError: libpq does not understand it, or understands something else than was meant.
    """
    import psycopg

    try:
        parts = psycopg.conninfo.conninfo_to_dict(address)
    except psycopg.Error:
        # libpq's own message may quote a part of the password.
        raise ValueError(f"the gallery's address cannot be read; {_ADVICE}") from None
    user, host, port, database = (str(parts.get(key, "")) for key in ("user", "host", "port", "dbname"))
    # A password with a bare @ or / in it ends up there.
    if (port and not port.replace(",", "").isdecimal()) or "@" in host + database:
        raise ValueError(f"the gallery's address has a character in the wrong place; {_ADVICE}")
    server = "" if host.startswith("/") else f"[{host}]" if ":" in host else host
    return f"postgresql://{user}{'@' if user else ''}{server}{':' if port else ''}{port}/{database}"


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """What the server says against it, in a sentence that names the place."""
    import psycopg

    try:
        yield
    except psycopg.Error as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"{place}: {text}") from error


class PostgresGallery(Gallery):
    """A gallery in the tables ``kprpe_gallery``, ``kprpe_pictures`` and ``kprpe_people`` of a database.

    Args:
        connection: psycopg's.
        place: the address, for messages.
    """

    def __init__(self, connection: Any, place: str) -> None:
        self.connection, self.place, self.model = connection, place, ""
        self._width: int | None = None
        self._look()

    @property
    def exists(self) -> bool:
        """Whether anything was ever added."""
        return self._width is not None

    @property
    def width(self) -> int | None:
        """Numbers of an embedding; None until some are added."""
        return self._width

    def take_turn(self) -> None:
        """Wait for other writers, and look again at what they have left."""
        if not self._run(f"SELECT pg_try_advisory_lock({_TURN})")[0][0]:
            logger.warning("%s is being changed by another process; waiting for it", self.place)
            self._run(f"SELECT pg_advisory_lock({_TURN})")
        self.connection.commit()
        self._look()

    def _look(self) -> None:
        if self._run("SELECT to_regclass('kprpe_gallery')")[0][0] is not None:
            self._learn_vectors()
            ((self._width,),) = self._run(_WIDTH)
            ((self.model,),) = self._run("SELECT model FROM kprpe_gallery")

    def _learn_vectors(self) -> None:
        from pgvector.psycopg import register_vector

        with _explained(self.place):
            register_vector(self.connection)

    def people(self) -> dict[str, int]:
        """How many images there are of each person, in the order of their names."""
        counted = self._run("SELECT name, count(*) FROM kprpe_pictures GROUP BY name") if self.exists else []
        return dict(sorted(counted))

    def from_sources(self, sources: Collection[str]) -> list[Picture]:
        """The images that came from one of these places."""
        return self._pictures("source = ANY(%s)", list(sources))

    def with_digests(self, digests: Collection[str]) -> list[Picture]:
        """The images whose files had one of these digests."""
        return self._pictures("digest = ANY(%s)", list(digests))

    def below(self, folder: str | Path) -> list[Picture]:
        """The images that came from this folder or its sub-folders, or from this file."""
        path = str(folder)
        return self._pictures("source = %s OR starts_with(source, %s)", path, path.rstrip(os.sep) + os.sep)

    def _pictures(self, condition: str, *values: Any) -> list[Picture]:
        query = f"SELECT id, name, source, digest, size, time FROM kprpe_pictures WHERE {condition} ORDER BY id"
        rows = self._run(query, *values) if self.exists else []
        return [Picture(key, name, source, Content(*content)) for key, name, source, *content in rows]

    def replace(self, pictures: Collection[Picture]) -> None:
        """Change name, source and content of the images that have the keys of these; their embeddings stay."""
        names = self._names_of(pictures) | {nfc(picture.name) for picture in pictures}
        query = "UPDATE kprpe_pictures SET name = %s, source = %s, digest = %s, size = %s, time = %s WHERE id = %s"
        self._run_many(query, [(nfc(name), source, *content, key) for key, name, source, content in pictures])
        self._pool(names)

    def drop(self, pictures: Collection[Picture]) -> None:
        """Forget images."""
        names = self._names_of(pictures)
        self._run("DELETE FROM kprpe_pictures WHERE id = ANY(%s)", [picture.key for picture in pictures])
        self._pool(names)

    def commit(self) -> None:
        """Keep what was changed; a kill at any moment leaves what the last commit left."""
        if self.exists:
            self._run("UPDATE kprpe_gallery SET model = %s", self.model)
        with _explained(self.place):
            self.connection.commit()

    def _add(
        self,
        names: Sequence[str],
        rows: np.ndarray,
        qualities: Sequence[float],
        sources: Sequence[str],
        contents: Sequence[Content],
    ) -> None:
        from pgvector import Vector

        if not self.exists:
            self._create(rows.shape[1])
        query = """INSERT INTO kprpe_pictures (name, source, quality, embedding, digest, size, time)
            VALUES (%s, %s, %s, %s, %s, %s, %s)"""
        fields = zip(names, sources, qualities, rows, contents, strict=True)
        self._run_many(query, [(n, s, float(q), Vector(row), *content) for n, s, q, row, content in fields])
        self._pool(set(names))

    def _create(self, width: int) -> None:
        if not self._run("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'"):
            raise RuntimeError(
                f"{self.place}: the server has no pgvector; install it there (Debian: postgresql-NN-pgvector, "
                "where NN is the server's version)"
            )
        self._run("CREATE EXTENSION IF NOT EXISTS vector")
        for statement in _TABLES.format(width=int(width)).split(";\n"):
            self._run(statement)
        self._learn_vectors()
        self._width = width

    def _remove(self, name: str) -> int:
        if not self.exists:
            return 0
        self._run("DELETE FROM kprpe_people WHERE name = %s", name)
        return len(self._run("DELETE FROM kprpe_pictures WHERE name = %s RETURNING 1", name))

    def _names_of(self, pictures: Collection[Picture]) -> set[str]:
        """Whose images these are at present."""
        keys = [picture.key for picture in pictures]
        return {name for (name,) in self._run("SELECT DISTINCT name FROM kprpe_pictures WHERE id = ANY(%s)", keys)}

    def _pool(self, names: Collection[str]) -> None:
        """Make the templates of people anew, whose images have changed."""
        from pgvector import Vector

        query = "SELECT name, embedding, quality FROM kprpe_pictures WHERE name = ANY(%s) ORDER BY id"
        rows = self._run(query, list(names))
        self._run("DELETE FROM kprpe_people WHERE name = ANY(%s)", list(names))
        if not rows:
            return
        people, person = np.unique(np.array([name for name, _, _ in rows], dtype=object), return_inverse=True)
        embeddings = np.stack([embedding.to_numpy() for _, embedding, _ in rows])
        pooled, _ = pool_templates(
            embeddings, person, np.arange(len(person)), np.float32([quality for _, _, quality in rows])
        )
        query = "INSERT INTO kprpe_people (name, template) VALUES (%s, %s)"
        self._run_many(query, [(name, Vector(row)) for name, row in zip(people, pooled, strict=True)])

    def _search(self, rows: np.ndarray, top: int) -> list[list[Match]]:
        from pgvector import Vector

        # pgvector's <#> is the negative inner product.
        query = "SELECT name, -(template <#> %s) FROM kprpe_people ORDER BY template <#> %s LIMIT %s"
        faces = [Vector(row) for row in rows]
        return [[Match(*match) for match in self._run(query, face, face, top)] for face in faces]

    def _run(self, query: str, *values: Any) -> list[tuple]:
        with _explained(self.place):
            cursor = self.connection.execute(query, values or None)
            return cursor.fetchall() if cursor.description else []

    def _run_many(self, query: str, rows: Sequence[tuple]) -> None:
        with _explained(self.place), self.connection.cursor() as cursor:
            cursor.executemany(query, rows)
