import sys
import traceback

import numpy as np
import pytest
from postgres_cluster import PASSWORD, QUOTED_PASSWORD
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app.galleries import editing, reading
from insightface_kprpe.app.postgres_gallery import shown_address
from insightface_kprpe.cli.errors import describe

SECRETS = (PASSWORD, QUOTED_PASSWORD, "s3cret")


@pytest.fixture
def psycopg():
    return pytest.importorskip("psycopg", reason="the extra postgres is not installed")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://kim:s3cret@db.example:5433/faces", "postgresql://kim@db.example:5433/faces"),
        ("postgres://kim:s3cret%40%2Fword@db.example/faces", "postgresql://kim@db.example/faces"),
        ("postgresql://kim:s3cret?#@db.example/faces", "postgresql://kim@db.example/faces"),
        ("postgresql://db.example/faces?user=kim&password=s3cret", "postgresql://kim@db.example/faces"),
        ("postgresql://kim@[::1]/faces?sslpassword=s3cret", "postgresql://kim@[::1]/faces"),
        ("postgresql:///faces?host=/run/postgresql", "postgresql:///faces"),
        ("postgresql://a:1,b:2/faces", "postgresql://a,b:1,2/faces"),
    ],
)
def test_addresses_are_shown_without_passwords(psycopg, address, shown):
    assert shown_address(address) == shown


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://kim:s3cret/x@db/faces",
        "postgresql://kim:12/s3cret@db/faces",
        "postgresql://kim:x@s3cret@db/faces",
        "postgresql://kim:s3cret%zz@db/faces",
        "postgresql://kim:1/x?s3cret@db/faces",
        "postgresql:/kim:s3cret@db/faces",
        "postgres:kim:s3cret@db/faces",
    ],
)
def test_addresses_that_mean_something_else_are_refused_and_not_shown(psycopg, address):
    with pytest.raises(ValueError, match="expected postgresql://USER@HOST") as error, reading(address):
        pass
    assert "s3cret" not in str(error.value) and error.value.__cause__ is None


def printed(*arguments):
    """All that a command may print, with --debug even."""
    result = CliRunner().invoke(cli.app, arguments)
    if result.exception is None:
        return result.output
    debugged = "".join(traceback.format_exception(result.exception))
    return result.output + describe(result.exception, arguments) + debugged


def test_nothing_that_is_printed_holds_the_password(postgres, tmp_path):
    address = postgres.empty_database()
    (tmp_path / "photos").mkdir()
    nothing = "has no gallery; create one with insightface-kprpe gallery add"
    before = printed("gallery", "list", address)
    with editing(address) as gallery:
        gallery.add(["Ann"], np.ones((1, 4)), [1.0], ["a"])
        gallery.commit()
    outputs = {
        "postgresql://tester@/postgres: 1 person, 1 image": printed("gallery", "list", address),
        "nobody in the gallery is named 'Bob'": printed("gallery", "remove", address, "Bob"),
        "tester@/postgres: Ann removed (1 image), 0 people left": printed("gallery", "remove", address, "Ann"),
        "no images in": printed("gallery", "add", address, str(tmp_path / "photos")),
        "password authentication failed": printed("gallery", "list", postgres.address("postgres", "s3cret-and-wrong")),
        'database "absent" does not exist': printed("gallery", "list", postgres.address("absent")),
    }
    outputs[nothing] = before
    for expected, output in outputs.items():
        assert expected in output
        assert not any(secret in output for secret in SECRETS)


def test_what_the_server_says_names_the_place(postgres):
    message = r"^postgresql://tester@/absent: [^\n]*does not exist$"
    with pytest.raises(RuntimeError, match=message), reading(postgres.address("absent")):
        pass
    with (
        editing(postgres.empty_database()) as gallery,
        pytest.raises(RuntimeError, match=r"^postgresql://tester@/postgres"),
    ):
        gallery.add(["nul\0"], np.ones((1, 4)), [1.0], ["a"])


def test_a_server_without_pgvector_says_what_to_install(postgres, monkeypatch):
    with editing(postgres.empty_database()) as gallery:
        run_query = gallery._run
        answer = lambda query, *values: [] if "pg_available" in query else run_query(query, *values)  # noqa: E731
        monkeypatch.setattr(gallery, "_run", answer)
        with pytest.raises(RuntimeError, match="the server has no pgvector; install it there"):
            gallery.add(["Ann"], np.ones((1, 4)), [1.0], ["a"])


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImportError, match=r"pip install 'insightface-kprpe\[postgres\]'"), reading("postgresql://x/y"):
        pass


def test_an_index_may_be_put_on_the_people(postgres):
    """As the documentation says; the search then goes through it, nearest first."""
    import psycopg

    address = postgres.empty_database()
    rows = np.random.default_rng(0).normal(0, 1, (300, 8))
    with editing(address) as gallery:
        gallery.add([f"p{i}" for i in range(300)], rows, np.ones(300), ["x"] * 300)
        gallery.commit()
        before = gallery.search(rows[:5])
    with psycopg.connect(address) as connection:
        connection.execute("CREATE INDEX ON kprpe_people USING hnsw (template vector_ip_ops)")
        connection.execute("SET enable_seqscan = off")
        query = "EXPLAIN SELECT name FROM kprpe_people ORDER BY template <#> '[1,0,0,0,0,0,0,0]' LIMIT 1"
        assert "Index Scan" in str(connection.execute(query).fetchall())
    with reading(address) as gallery:
        assert [match.name for (match,) in gallery.search(rows[:5])] == [match.name for (match,) in before]
