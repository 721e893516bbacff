"""Would the tests notice? Plants one fault at a time in a copy of the package and runs the tests that should fail.

    python benchmarks/mutation.py [AREA ...] [--jobs 1] [--out mutation.json]

The faults are those of ``mutation_faults.txt``. A copy holds the package, the tests and nothing else: no development
data lies next to it, so what counts is what every contributor's checkout can see. A fault is caught when a test fails,
and survives when all tests of its area pass. Exit status 1: some survived; 2: the table or the tests need repair.

Tests run in forks of this process, which has imported torch and the like once and for all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from insightface_kprpe.files import write_atomically

TABLE = Path(__file__).with_name("mutation_faults.txt")
CHECKOUT = TABLE.parents[1]
PACKAGE = "insightface_kprpe"
PARTS = (PACKAGE, "recognition_configs", "tests", "setup.cfg", "pyproject.toml", "ruff.toml")
PRELOADED = ("torch", "cv2", f"{PACKAGE}._timm")
TIME_LIMIT = 900  # seconds; a fault that makes ranks wait for each other forever is caught, too


class StaleFault(ValueError):
    """The text of a fault is not there, or not only once."""


@dataclass(frozen=True)
class Fault:
    """A name, the text that is right, and the text that is wrong."""

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Area:
    """What to call pytest with, the tests likeliest to catch a fault first, and the faults."""

    tests: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; ``caught_by`` is the first test that failed, None if the fault survived."""

    area: str
    name: str
    file: str
    caught_by: str | None
    seconds: float


def read_table() -> dict[str, Area]:
    """The areas of ``mutation_faults.txt``, which says how it is written."""
    areas = {}
    for section in TABLE.read_text().split("\n== ")[1:]:
        head, *blocks = section.strip().split("\n\n")
        name, tests = head.split(": ")
        faults = []
        for block in blocks:
            title, *lines = block.splitlines()
            old, new = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in ("- ", "+ "))
            faults.append(Fault(title, old, new))
        areas[name] = Area(tuple(shlex.split(tests)), tuple(faults))
    return areas


def copy_tree(folder: Path) -> Path:
    """The package and its tests in ``folder / "checkout"``."""
    target = folder / "checkout"
    target.mkdir(parents=True)
    for part in PARTS:
        source = CHECKOUT / part
        if source.is_dir():
            shutil.copytree(source, target / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, target / part)
    return target


def locate(fault: Fault) -> Path:
    """The one file of the package that holds the fault's text, relative to the checkout: files may be moved.

    Raises:
        StaleFault: no file holds it, or it stands in several places.
    """
    counts = {path: path.read_text().count(fault.old) for path in (CHECKOUT / PARTS[0]).rglob("*.py")}
    found = [path for path, count in counts.items() if count]
    if len(found) != 1 or counts[found[0]] != 1:
        times = sum(counts.values())
        raise StaleFault(
            f"{fault.name}: {fault.old!r} must stand once in the package, found {times} times; fix {TABLE}"
        )
    compile(found[0].read_text().replace(fault.old, fault.new), fault.name, "exec")
    return found[0].relative_to(CHECKOUT)


class Tests:
    """pytest in a fork of this process, with a copy of the checkout as all there is.

    Args:
        tree: the copy.
        arguments: of pytest.
    """

    def __init__(self, tree: Path, arguments: Sequence[str]) -> None:
        self.log = tree.parent / "log"
        self.started = time.perf_counter()
        self.pid = os.fork()
        if not self.pid:
            self._run(tree, arguments)

    def _run(self, tree: Path, arguments: Sequence[str]) -> None:
        status = 3
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.chdir(tree)
            for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
                del sys.modules[name]
            sys.path.insert(0, str(tree))
            sys.dont_write_bytecode = True  # two faults of one length within a second would share a compiled file
            os.environ |= {
                "PYTHONPATH": str(tree),
                "PYTHONDONTWRITEBYTECODE": "1",
                "KPRPE_SHARED": str(tree / "absent"),
            }
            status = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments])
        finally:
            sys.stdout.flush()
            os._exit(status)

    def wait(self, seconds: float) -> int | None:
        """pytest's exit status; None if it does not end within some seconds."""
        end = time.perf_counter() + seconds
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.perf_counter() > end:
                return None
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(done[1])

    def kill(self) -> None:
        """End it, with the ranks that wait for each other."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def output(self) -> str:
        """What it said."""
        return self.log.read_text(errors="replace")


class Trial:
    """One fault, planted in a copy of the checkout until the tests have ended.

    Args:
        tree: the copy.
        area: name of the fault's area.
        tests: of the area.
        fault: what to plant.
    """

    def __init__(self, tree: Path, area: str, tests: Sequence[str], fault: Fault) -> None:
        self.tree, self.area, self.fault = tree, area, fault
        self.file = locate(fault)
        self.original = (tree / self.file).read_text()
        (tree / self.file).write_text(self.original.replace(fault.old, fault.new))
        self.tests = Tests(tree, tests)

    def outcome(self) -> Outcome | None:
        """What became of it; None while the tests still run.

        Raises:
            RuntimeError: the tests did not run.
        """
        status, seconds = self.tests.wait(0), time.perf_counter() - self.tests.started
        caught_by = None
        if status is None:
            if seconds < TIME_LIMIT:
                return None
            self.tests.kill()
            caught_by = "(not done in time)"
        elif status == 1:
            failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", self.tests.output(), re.MULTILINE)
            caught_by = failed.group(1) if failed else "a test"
        elif status:
            raise RuntimeError(f"{self.fault.name}: pytest ended with {status}\n{self.tests.output()[-2000:]}")
        (self.tree / self.file).write_text(self.original)
        return Outcome(self.area, self.fault.name, str(self.file), caught_by, round(seconds, 1))


def check_without_faults(tree: Path, areas: Iterable[Area]) -> None:
    """The copy is what gets imported, and its tests pass.

    Raises:
        RuntimeError: they do not.
    """
    (tree / "tests" / "test_copy.py").write_text(
        f"import {PACKAGE}\n\n\ndef test_copy():\n    assert {PACKAGE}.__file__.startswith({str(tree)!r})\n"
    )
    for arguments in [("tests/test_copy.py",), *(area.tests for area in areas)]:
        tests = Tests(tree, arguments)
        if tests.wait(float("inf")):
            raise RuntimeError(f"the tests must pass before a fault is planted\n{tests.output()[-4000:]}")


def try_all(areas: dict[str, Area], jobs: int) -> list[Outcome]:
    """Every fault of some areas, in order; a dot on stderr for each that is caught, an S for each survivor.

    Raises:
        StaleFault: a fault does not fit the package any more.
        RuntimeError: the tests fail without a fault, or do not run.
    """
    planned = [(name, area.tests, fault) for name, area in areas.items() for fault in area.faults]
    for *_, fault in planned:
        locate(fault)
    os.environ["OMP_NUM_THREADS"] = "1"
    for module in PRELOADED:
        importlib.import_module(module)
    waiting, running, outcomes = list(reversed(planned)), [], {}
    with tempfile.TemporaryDirectory() as folder:
        free = [copy_tree(Path(folder) / str(job)) for job in range(jobs)]
        check_without_faults(free[0], areas.values())
        try:
            while waiting or running:
                while waiting and free:
                    running.append(Trial(free.pop(), *waiting.pop()))
                time.sleep(0.05)
                for trial in list(running):
                    if outcome := trial.outcome():
                        outcomes[trial.fault] = outcome
                        running.remove(trial)
                        free.append(trial.tree)
                        sys.stderr.write("." if outcome.caught_by else "S")
                        sys.stderr.flush()
        finally:
            for trial in running:  # where something stopped the work
                trial.tests.kill()
    return [outcomes[fault] for *_, fault in planned]


def table(outcomes: Iterable[Outcome]) -> str:
    """One line a fault, survivors marked."""
    rows = [(o.area, o.name, o.caught_by or "*** survived ***") for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{area:{widths[0]}}  {name:{widths[1]}}  {caught}" for area, name, caught in rows)


def main() -> int:
    known = read_table()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at once, each on one core (default 1)")
    parser.add_argument("--out", type=Path, help="where to write the outcomes as JSON")
    arguments = parser.parse_args()
    if unknown := [area for area in arguments.areas if area not in known]:
        parser.error(f"AREA must be of {', '.join(known)}, got {' '.join(unknown)}")
    try:
        outcomes = try_all({name: known[name] for name in arguments.areas or known}, arguments.jobs)
    except (StaleFault, RuntimeError) as error:
        sys.stderr.write(f"{error}\n")
        return 2

    survivors = sum(outcome.caught_by is None for outcome in outcomes)
    sys.stdout.write(f"\n{table(outcomes)}\n\n{len(outcomes)} faults, {survivors} survived\n")
    if arguments.out:
        report = {
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "faults": len(outcomes),
            "survivors": survivors,
            "outcomes": [asdict(outcome) for outcome in outcomes],
        }
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
