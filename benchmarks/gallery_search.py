"""From how many people on does faiss search a gallery faster than a matrix product, and for how many faces at a time?

    OMP_NUM_THREADS=1 python benchmarks/gallery_search.py [--people 10000 100000 1000000] [--faces 1 4 16 32]
        [--width 512] [--top 1] [--repeats 7] [--out gallery_search.json]

Both compare every face with every person (exact search), among random unit embeddings. The two take turns, after a
warm-up; times are medians of CPU time in milliseconds, which other work on the machine disturbs less than the clock,
and the ratio is the median of each turn's ratio: above 1 where faiss is the faster. Whether both name the same people
is looked at first. faiss takes no memory for the scores of all people, which are people x faces x 4 bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from insightface_kprpe.app.nearest import by_faiss, by_product, faiss
from insightface_kprpe.files import write_atomically


def unit_rows(count: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def cpu_time(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def compare(faces: np.ndarray, people: np.ndarray, top: int, repeats: int) -> dict[str, float]:
    """Times of both ways, which take turns."""
    ways = {"product": lambda: by_product(faces, people, top), "faiss": lambda: by_faiss(faces, people, top)}
    (one, scores), (other, other_scores) = (way() for way in ways.values())  # the warm-up
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(cpu_time(way))
    ratios = [product / by_faiss for product, by_faiss in zip(times["product"], times["faiss"], strict=True)]
    return {
        **{f"{name}_ms": round(1000 * statistics.median(values), 2) for name, values in times.items()},
        "ratio": round(statistics.median(ratios), 2),
        "same_people": round(float((one == other).mean()), 6),
        "largest_difference": float(np.abs(scores - other_scores).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--faces", nargs="+", type=int, default=[1, 4, 16, 32], help="searched for at a time")
    parser.add_argument("--width", type=int, default=512, help="numbers of an embedding")
    parser.add_argument("--top", type=int, default=1, help="people named for each face")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    if faiss() is None:
        sys.exit("error: faiss is not installed; pip install 'insightface-kprpe[faiss]'")
    report = {
        "width": arguments.width,
        "top": arguments.top,
        "threads": faiss().omp_get_max_threads(),
        "processor": platform.processor() or platform.machine(),
        "numpy": np.__version__,
        "faiss": faiss().__version__,
        "results": [],
    }
    sys.stdout.write("   people  faces   product     faiss  ratio\n")
    for count in arguments.people:
        people = unit_rows(count, arguments.width, 0)
        for number in arguments.faces:
            result = compare(unit_rows(number, arguments.width, 1), people, arguments.top, arguments.repeats)
            report["results"].append({"people": count, "faces": number, **result})
            sys.stdout.write(f"{count:9} {number:6} {result['product_ms']:9.2f} {result['faiss_ms']:9.2f}")
            sys.stdout.write(f" {result['ratio']:6.2f}\n")
            sys.stdout.flush()
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
