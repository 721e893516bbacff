"""Would the tests notice? Plants one fault at a time in a copy of the package and runs the tests that should fail.

    python benchmarks/mutation.py [AREA ...] [--jobs 1] [--out mutation.json]

The faults are those of ``mutation_faults.txt``. A copy holds the package, the tests and nothing else: no development
data lies beside it, so what counts is what every contributor's checkout can see. A fault is caught when a test fails,
and survives when all tests of its area pass. Exit status 1: some survived; 2: the table or the tests need repair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from insightface_kprpe.files import write_atomically

TABLE = Path(__file__).with_name("mutation_faults.txt")
CHECKOUT = TABLE.parents[1]
PARTS = ("insightface_kprpe", "recognition_configs", "tests", "setup.cfg", "pyproject.toml", "ruff.toml")
TIME_LIMIT = 900  # seconds; a fault that makes ranks wait for each other for ever is caught, too


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
    """The tests that should catch some faults, the likeliest first, and the faults."""

    tests: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one fault; ``caught_by`` is the first test that failed, None where the fault survived."""

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
        areas[name] = Area(tuple(tests.split()), tuple(faults))
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
            f"{fault.name}: {fault.old!r} must stand once in the package, found {times} times; mend {TABLE}"
        )
    compile(found[0].read_text().replace(fault.old, fault.new), fault.name, "exec")
    return found[0].relative_to(CHECKOUT)


def run_tests(tree: Path, tests: Iterable[str]) -> tuple[int, str]:
    """pytest's exit status (1 also where it was not done in time) and output, with ``tree`` as all there is."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # two faults of one length within a second would share a compiled file
        "OMP_NUM_THREADS": "1",
        "KPRPE_SHARED": str(tree / "absent"),
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *tests]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tree, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the ranks that wait for each other
            return 1, "FAILED (not done in time)"
    return process.returncode, output


def try_fault(area: str, tests: Iterable[str], fault: Fault, trees: queue.Queue[Path]) -> Outcome:
    """Plant a fault in one of the copies, run the tests of its area, and take it out again.

    Raises:
        RuntimeError: the tests did not run to an end.
    """
    tree, file, started = trees.get(), locate(fault), time.perf_counter()
    original = (tree / file).read_text()
    try:
        (tree / file).write_text(original.replace(fault.old, fault.new))
        status, output = run_tests(tree, tests)
    finally:
        (tree / file).write_text(original)
        trees.put(tree)
    if status not in (0, 1):
        raise RuntimeError(f"{fault.name}: pytest ended with status {status}\n{output[-2000:]}")
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*?)(?: - .*)?$", output, re.MULTILINE)
    caught_by = (failed.group(1) if failed else "a test") if status else None
    return Outcome(area, fault.name, str(file), caught_by, round(time.perf_counter() - started, 1))


def check_without_faults(tree: Path, areas: Iterable[Area]) -> None:
    """The copy is what gets imported, and its tests pass.

    Raises:
        RuntimeError: they do not.
    """
    (tree / "tests" / "test_copy.py").write_text(
        "import insightface_kprpe\n\n\ndef test_copy():\n"
        f"    assert insightface_kprpe.__file__.startswith({str(tree)!r})\n"
    )
    tests = {"tests/test_copy.py": None} | {test: None for area in areas for test in area.tests}
    status, output = run_tests(tree, tests)
    if status:
        raise RuntimeError(f"the tests must pass before a fault is planted\n{output[-4000:]}")


def table(outcomes: Iterable[Outcome]) -> str:
    """One line a fault, survivors marked."""
    rows = [(o.area, o.name, o.caught_by or "*** survived ***") for o in outcomes]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{area:{widths[0]}}  {name:{widths[1]}}  {caught}" for area, name, caught in rows)


def try_all(areas: dict[str, Area], jobs: int) -> list[Outcome]:
    """Every fault of some areas, in order; a dot on stderr for each that is caught, an S for each survivor.

    Raises:
        StaleFault: a fault does not fit the package any more.
        RuntimeError: the tests fail without a fault, or do not run.
    """
    planned = [(name, area.tests, fault) for name, area in areas.items() for fault in area.faults]
    for *_, fault in planned:
        locate(fault)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(jobs):
            trees.put(copy_tree(Path(folder) / str(job)))
        check_without_faults(trees.queue[0], areas.values())
        for outcome in pool.map(lambda item: try_fault(*item, trees), planned):
            outcomes.append(outcome)
            sys.stderr.write("." if outcome.caught_by else "S")
            sys.stderr.flush()
    return outcomes


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
