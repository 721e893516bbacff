"""Fixtures for all tests: reference vectors and real faces where they are available, else a skip that says so."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads of tiny nets wait for each other
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_packs
from postgres_cluster import cluster, find_server

import insightface_kprpe
import insightface_kprpe._timm
from insightface_kprpe.app.recognition import open_pack

SHARED = Path(os.environ.get("KPRPE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
COMMITTED = Path(__file__).parent / "data" / "golden"


def pytest_collection_modifyitems(items):
    """Files with the most slow tests first: started last, one of them would keep a process busy while others wait."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def log_reaches_caplog():
    """Command lines take the package's log for themselves; give it back after every test."""
    yield
    log = logging.getLogger("insightface_kprpe")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture
def unregistered():
    """``register()`` is taken back after the test."""
    yield
    insightface_kprpe.unregister()


@pytest.fixture
def tiny_app(tmp_path, unregistered):
    """A ``FaceAnalysis`` of a hand-made pack, which lies in the folder ``root``."""
    tiny_packs.write_pack(tmp_path / "root")
    return open_pack("tiny", tmp_path / "root", **tiny_packs.CPU)


@pytest.fixture(scope="session")
def shared():
    """The folder of development data next to the checkout (not part of the project)."""
    if not SHARED.is_dir():
        pytest.skip(f"development data not found at {SHARED} (set KPRPE_SHARED to its folder)")
    return SHARED


@pytest.fixture(scope="session")
def golden(request):
    """``golden("vit.npz")`` loads one file of reference vectors as a dict of arrays."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = COMMITTED / name
        if not path.is_file():
            path = request.getfixturevalue("shared") / "golden" / name
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return load


@pytest.fixture(scope="session")
def postgres():
    """A server with pgvector of the tests' own."""
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    pytest.importorskip("pgvector", reason="the extra postgres is not installed")
    binaries = find_server()
    if binaries is None:
        pytest.skip(
            "no PostgreSQL server with pgvector is installed (Debian's postgresql-NN-pgvector, or the extra test)"
        )
    with cluster(binaries) as server:
        yield server


@pytest.fixture(params=["file", "postgres"])
def gallery_place(request, tmp_path):
    """Where a gallery may be made, in each of the ways to keep one: its file, or its address."""
    if request.param == "file":
        return str(tmp_path / "gallery" / "people.npz")
    return request.getfixturevalue("postgres").empty_database()
