"""How long does a search in a PostgreSQL gallery take, beside one in a file, without an index and with one?

    python benchmarks/gallery_postgres.py postgresql:///scratch [--people 20000] [--width 512] [--faces 20]
        [--out gallery_postgres.json]

The database must be empty, and is so again afterwards. One face at a time is searched for among random unit embeddings,
which are hard for an index, as nobody is near to anybody. Each face is a person of the gallery with noise, at a cosine
of about 0.5. The ways take turns, after a warm-up; times are medians of the clock in milliseconds, as the work is the
server's. "found" is how many of the faces an index names as the exact search does.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import psycopg

from insightface_kprpe.app.file_gallery import FileGallery
from insightface_kprpe.app.galleries import editing, reading
from insightface_kprpe.app.gallery import Gallery, Match
from insightface_kprpe.files import write_atomically

_ADDED_AT_A_TIME = 2000
_TABLES = "kprpe_gallery, kprpe_pictures, kprpe_people"


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def fill(gallery: Gallery, people: np.ndarray) -> None:
    for start in range(0, len(people), _ADDED_AT_A_TIME):
        rows = people[start : start + _ADDED_AT_A_TIME]
        names = [f"p{start + i}" for i in range(len(rows))]
        gallery.add(names, rows, [1.0] * len(rows), names)
    gallery.commit()


def take_turns(
    ways: dict[str, Callable], faces: np.ndarray
) -> tuple[dict[str, list[float]], dict[str, list[Sequence[Match]]]]:
    """Milliseconds of every search, and what it found."""
    times, found = {name: [] for name in ways}, {name: [] for name in ways}
    for way in ways.values():
        way(faces[:1])
    for face in faces:
        for name, way in ways.items():
            started = time.perf_counter()
            found[name] += way(face[None])
            times[name].append(1000 * (time.perf_counter() - started))
    return times, found


def same(one: list[Sequence[Match]], other: list[Sequence[Match]]) -> float:
    return statistics.mean(a[0].name == b[0].name for a, b in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="of an empty database")
    parser.add_argument("--people", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=512, help="numbers of an embedding")
    parser.add_argument("--faces", type=int, default=20, help="searched for, one at a time")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    people = unit_rows(rng.standard_normal((arguments.people, arguments.width), dtype=np.float32))
    noise = unit_rows(rng.standard_normal((arguments.faces, arguments.width), dtype=np.float32))
    faces = people[rng.choice(len(people), len(noise), replace=False)] + 3**0.5 * noise
    memory = FileGallery()
    fill(memory, people)
    started = time.perf_counter()
    with psycopg.connect(arguments.address, autocommit=True) as connection:
        try:
            with editing(arguments.address) as gallery:
                fill(gallery, people)
            seconds = {"fill": round(time.perf_counter() - started, 1)}
            with reading(arguments.address) as gallery:
                times, found = take_turns({"file": memory.search, "postgres": gallery.search}, faces)
                started = time.perf_counter()
                connection.execute("CREATE INDEX ON kprpe_people USING hnsw (template vector_ip_ops)")
                seconds["index"] = round(time.perf_counter() - started, 1)
                more, answers = take_turns({"index": gallery.search}, faces)
            times, found = times | more, found | answers
        finally:
            connection.execute(f"DROP TABLE IF EXISTS {_TABLES}")
        version = connection.execute("SHOW server_version").fetchone()[0]
    report = {
        "people": arguments.people,
        "width": arguments.width,
        "processor": platform.processor() or platform.machine(),
        "server": version,
        "seconds": seconds,
        "milliseconds": {name: round(statistics.median(values), 2) for name, values in times.items()},
        "postgres_names_as_file": same(found["file"], found["postgres"]),
        "found": same(found["postgres"], found["index"]),
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
