"""``make fuzz``: many damaged files for every reader, and a table of what became of them.

``python tests/fuzz COUNT [WORD]...`` tries the readers alone whose names have one of the words.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # before OpenCV, which tells of every damaged picture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.harness import OUTCOMES, try_all
from fuzz.readers import READERS


def main(count: int, words: list[str]) -> int:
    """Share ``count`` damaged files among the readers; the number of those that ended badly."""
    chosen = {name: reader for name, reader in READERS.items() if not words or any(word in name for word in words)}
    columns = (*OUTCOMES, "slowest, s", "MB more")
    print(f"{'reader':28}" + "".join(f"{column:>11}" for column in columns), flush=True)
    each = count / sum(reader.share for reader in chosen.values())
    bad, total = [], 0
    for name, reader in chosen.items():
        found, slowest, memory = try_all(name, reader, round(each))
        counts = [len(found[kind]) for kind in OUTCOMES]
        total += sum(counts)
        print(f"{name:28}" + "".join(f"{n:11}" for n in counts) + f"{slowest:11.2f}{memory / 1e6:11.0f}", flush=True)
        bad += [f"{name} {error}" for kind in ("raw", "traceback") for error in found[kind]]
    print(f"{total} damaged files for {len(chosen)} readers, {len(bad)} of them ended badly")
    print("\n".join(bad[:50]))
    return len(bad)


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, sys.argv[2:])))
