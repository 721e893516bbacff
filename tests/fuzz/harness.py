"""What a reader makes of damaged files: takes them, refuses them in a sentence that names them, or fails badly."""

from __future__ import annotations

import logging
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fuzz.mutator import mutate

OUTCOMES = ("accepted", "clean", "raw", "traceback")


class Reader(NamedTuple):
    """How a sound set of files is made in a folder, which of them is damaged, and how it is read.

    Attributes:
        make: writes the files.
        damaged: the file's path in the folder.
        read: reads what ``make`` wrote.
        mutate: (content, seed) -> damaged content.
        heals: damage is no error: what can be read is taken, or the file is made anew.
        share: of the damaged files that other readers get; those that take long get fewer.
    """

    make: Callable[[Path], None]
    damaged: str
    read: Callable[[Path], object]
    mutate: Callable[[bytes, str], bytes] = mutate
    heals: bool = False
    share: float = 1.0


class Found(NamedTuple):
    """What became of many damaged files.

    Attributes:
        by_outcome: one of ``OUTCOMES`` -> numbers of the files and errors.
        slowest: seconds of this process' CPU time that the slowest took.
        memory: bytes by which the largest memory that this process ever had has grown.
    """

    by_outcome: dict[str, list[str]]
    slowest: float
    memory: int


def outcome(reader: Reader, folder: Path, sound: bytes, seed: str) -> tuple[str, str]:
    """What a reader makes of its file, damaged as the seed says: one of ``OUTCOMES``, and the error."""
    (folder / reader.damaged).write_bytes(reader.mutate(sound, seed))
    try:
        reader.read(folder)
    except (ValueError, OSError, RuntimeError, EOFError) as error:
        named = folder.name in str(error) and "Traceback" not in str(error)
        return "clean" if named else "raw", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    return "accepted", ""


def try_all(name: str, reader: Reader, count: int) -> Found:
    """What becomes of ``count`` damaged files, or the reader's share of as many; the same for the same name."""
    found: dict[str, list[str]] = {kind: [] for kind in OUTCOMES}
    folder = Path(tempfile.mkdtemp(prefix="fuzzed-"))
    quiet = logging.getLogger("insightface_kprpe")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    slowest = 0.0
    try:
        reader.make(folder)
        sound = (folder / reader.damaged).read_bytes()
        reader.read(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and NumPy, about what they read
            for number in range(max(1, round(count * reader.share))):
                start = time.process_time()
                kind, error = outcome(reader, folder, sound, f"{name} {number}")
                slowest = max(slowest, time.process_time() - start)
                found[kind].append(f"{number}: {error}")
        memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    finally:
        quiet.setLevel(level)
        shutil.rmtree(folder)
    return Found(found, slowest, memory)
