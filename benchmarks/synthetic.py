"""How fast are faces drawn? One process, one thread: faces a second of CPU time, aligned and loose, and scenes.

python benchmarks/synthetic.py [--out synthetic.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

import cv2

from insightface_kprpe.data.synthetic import SyntheticFaces, draw_scene

PEOPLE, FACES, ROUNDS = 20, 200, 5


def per_second(draw, count: int) -> float:
    """Median over rounds per second of CPU time, after a warm-up round (which also builds the heads)."""
    rates = []
    for _ in range(ROUNDS + 1):
        started = time.process_time()
        for i in range(count):
            draw(i)
        rates.append(count / (time.process_time() - started))
    return statistics.median(rates[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="also write the figures as JSON")
    out = parser.parse_args().out
    cv2.setNumThreads(0)
    results = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 thread used"}
    for name, aligned in (("aligned faces / s / core", True), ("loose faces / s", False)):
        faces = SyntheticFaces(PEOPLE, FACES // PEOPLE, aligned=aligned)
        results[name] = round(per_second(faces.__getitem__, FACES), 1)
    results["scenes of 320 px with 4 people / s / core"] = round(
        per_second(lambda i: draw_scene(range(4), (320, 320), instance=i), 40), 1
    )
    for name, value in results.items():
        print(f"{name:40} {value}")
    if out:
        with open(out, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
