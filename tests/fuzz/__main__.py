"""``make fuzz``: many damaged files for every reader, and a table of what became of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.readers import OUTCOMES, READERS, try_all


def main(count: int) -> int:
    """Share ``count`` damaged files among the readers; the number of those that ended badly."""
    print(f"{'reader':20}" + "".join(f"{kind:>11}" for kind in OUTCOMES), flush=True)
    bad = []
    for name in READERS:
        found = try_all(name, -(-count // len(READERS)))
        print(f"{name:20}" + "".join(f"{len(found[kind]):11}" for kind in OUTCOMES), flush=True)
        bad += [f"{name} {error}" for kind in ("raw", "traceback") for error in found[kind]]
    print("\n".join(bad[:50]))
    return len(bad)


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)))
