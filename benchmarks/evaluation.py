"""How long do IJB-C and TinyFace take after embedding, and how much memory, against the usual way of writing them?

    python benchmarks/evaluation.py [--scale 1.0] [--out evaluation.json]

At ``--scale 1`` the sizes are the real ones: IJB-C 469,375 images in 23,124 templates and 15,658,489 pairs (gallery
templates against probe templates, as in the official list), TinyFace 3,728 probes against 157,871 images, 512 numbers
each, drawn from a seed. Every measurement is a process of its own that loads the data and then evaluates: seconds count
the evaluation, memory is the peak of the whole process with its data and imports. The plain forms need 12 GB of memory
at full size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

DIM = 512
FPRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RANKS = (1, 5, 20)
FORMS = ("plain", "insightface_kprpe")
Data = dict[str, np.ndarray]


def people(rng: np.random.Generator, centers: np.ndarray, identity: np.ndarray, blur: np.ndarray) -> np.ndarray:
    """Embeddings scattered around the centers of their identities: (N, DIM) float32."""
    embeddings = rng.standard_normal((len(identity), DIM), dtype=np.float32)
    for start in range(0, len(identity), 8192):
        part = slice(start, start + 8192)
        embeddings[part] *= blur[part, None]
        embeddings[part] += centers[identity[part]]
    return embeddings


def draw_ijb(rng: np.random.Generator, scale: float) -> Data:
    """An IJB-C: galleries of one template a subject, probe templates, each subject's probes against its gallery."""
    images, count, subjects, pairs = (max(40, int(scale * n)) for n in (469_375, 23_124, 3_531, 15_658_489))
    images, count = max(images, 2 * count), max(count, 2 * subjects)
    numbers = np.sort(rng.choice(10 * count, count, replace=False))
    subject = np.concatenate([rng.permutation(subjects), rng.integers(0, subjects, count - subjects)])
    template = np.sort(np.concatenate([np.arange(count), rng.integers(0, count, images - count)]))
    centers = rng.standard_normal((subjects, DIM), dtype=np.float32)
    # Some templates are far from their subject whatever the number of their images.
    centers = people(rng, centers, subject, rng.uniform(0.5, 3.5, count).astype(np.float32))
    embeddings = people(rng, centers, template, rng.uniform(0.5, 4, images).astype(np.float32))
    gallery_of = np.empty(subjects, dtype=np.int64)
    gallery_of[subject[:subjects]] = np.arange(subjects)
    probe = np.arange(subjects, count)
    first = np.concatenate([gallery_of[subject[probe]], rng.integers(0, subjects, pairs - len(probe))])
    second = np.concatenate([probe, rng.integers(subjects, count, pairs - len(probe))])
    return {
        "embeddings": embeddings,
        "scores": rng.uniform(0.3, 1, images).astype(np.float32),
        "templates": numbers[template].astype(np.int32),
        "medias": rng.integers(0, 6, images).astype(np.int32),
        "p1": numbers[first].astype(np.int32),
        "p2": numbers[second].astype(np.int32),
        "label": subject[first] == subject[second],
    }


def draw_tinyface(rng: np.random.Generator, scale: float) -> Data:
    """A TinyFace: probes, gallery images of the same people, and distractors."""
    probes, matches, ids, gallery = (max(20, int(scale * n)) for n in (3_728, 4_443, 2_569, 157_871))
    centers = rng.standard_normal((ids, DIM), dtype=np.float32)
    probe_ids, match_ids = np.arange(probes) % ids, np.arange(matches) % ids
    distractors = rng.standard_normal((gallery - matches, DIM), dtype=np.float32)
    mates = people(rng, centers, match_ids, rng.uniform(1, 3, matches).astype(np.float32))
    return {
        "probe": people(rng, centers, probe_ids, rng.uniform(1, 3, probes).astype(np.float32)),
        "gallery": np.concatenate([mates, distractors]),
        "probe_ids": probe_ids,
        "gallery_ids": np.concatenate([match_ids, np.full(len(distractors), -100)]),
    }


def plain_ijb(data: Data) -> dict[str, float]:
    """Template by template with masks, pair by pair in float64, and the whole ROC curve."""
    embeddings = data["embeddings"] * data["scores"][:, None]
    known = np.unique(data["templates"])
    pooled = np.zeros((len(known), DIM))
    for row, number in enumerate(known):
        mine = np.flatnonzero(data["templates"] == number)
        medias = data["medias"][mine]
        for media in np.unique(medias):
            pooled[row] += embeddings[mine[medias == media]].mean(0)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    position = np.zeros(known.max() + 1, dtype=np.int64)
    position[known] = np.arange(len(known))
    p1, p2 = position[data["p1"].astype(np.int64)], position[data["p2"].astype(np.int64)]
    scores = np.empty(len(p1))
    for start in range(0, len(p1), 100_000):
        part = slice(start, start + 100_000)
        scores[part] = (pooled[p1[part]] * pooled[p2[part]]).sum(-1)
    fpr, tpr, thresholds = plain_roc(scores, data["label"].astype(np.int64))
    result = {}
    for target in FPRS:
        nearest = np.abs(fpr - target).argmin()
        result[f"tpr_at_fpr_{target}"] = float(tpr[nearest])
        result[f"thresh_at_fpr_{target}"] = float(thresholds[nearest])
    return result


def plain_roc(scores: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every corner of the ROC curve, loosest first."""
    order = np.argsort(scores, kind="stable")[::-1]
    scores, label = scores[order], label[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    true = np.cumsum(label)[ends]
    false = 1 + ends - true
    keep = np.concatenate([[True], (np.diff(false, 2) != 0) | (np.diff(true, 2) != 0), [True]])
    true, false = np.append(0, true[keep]), np.append(0, false[keep])
    return (false / false[-1])[::-1], (true / true[-1])[::-1], np.append(np.inf, scores[ends][keep])[::-1]


def plain_tinyface(data: Data) -> dict[str, float]:
    """The whole score matrix, every row sorted."""
    probe, gallery = (data[name] / np.linalg.norm(data[name], axis=1, keepdims=True) for name in ("probe", "gallery"))
    scores = probe @ gallery.T
    same = data["probe_ids"][:, None] == data["gallery_ids"][None, :]
    enrolled = same.any(1)
    scores, same = scores[enrolled], same[enrolled]
    order = np.argsort(scores, axis=1)
    ranked = np.empty_like(same)
    for row in range(len(same)):
        ranked[row] = same[row, order[row, ::-1]]
    return {f"rank_{rank}": float(ranked[:, :rank].any(1).mean()) for rank in RANKS}


def our_ijb(data: Data) -> dict[str, float]:
    from insightface_kprpe.evaluation.fusion import fusion_weights
    from insightface_kprpe.evaluation.ijb import verification

    weights = fusion_weights("norm_detector", data["embeddings"], detector_score=data.pop("scores"))
    return verification(**data, weights=weights, fprs=FPRS)


def our_tinyface(data: Data) -> dict[str, float]:
    from insightface_kprpe.evaluation.tinyface import identification

    return identification(**data, ranks=RANKS)


DRAW = {"ijb": draw_ijb, "tinyface": draw_tinyface}
EVALUATE: dict[tuple[str, str], Callable[[Data], dict[str, float]]] = {
    ("ijb", "plain"): plain_ijb,
    ("ijb", "insightface_kprpe"): our_ijb,
    ("tinyface", "plain"): plain_tinyface,
    ("tinyface", "insightface_kprpe"): our_tinyface,
}


def child(protocol: str, task: str, folder: Path, scale: float) -> None:
    """Draw the data of a protocol into a folder, or measure one form on it and print JSON."""
    if task == "draw":
        for name, values in DRAW[protocol](np.random.default_rng(0), scale).items():
            np.save(folder / f"{protocol}.{name}.npy", values)
        return
    data = {path.name.split(".")[1]: np.load(path) for path in folder.glob(f"{protocol}.*.npy")}
    if task != "plain":
        import insightface_kprpe.evaluation.ijb  # noqa: F401  not part of the time, but of the memory
    start, cpu_start = time.perf_counter(), time.process_time()
    result = EVALUATE[protocol, task](data)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gb": peak / 1e9, "result": result}))


def measure(protocol: str, folder: Path, scale: float) -> dict:
    """Run both forms of a protocol; both must give the same result."""

    def run(task: str) -> str:
        command = [sys.executable, __file__, "--scale", str(scale), "--child", protocol, task, str(folder)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    run("draw")
    forms = {form: json.loads(run(form)) for form in FORMS}
    for path in folder.iterdir():
        path.unlink()
    plain, ours = (forms[form] for form in FORMS)
    off = {key: abs(ours["result"][key] - value) for key, value in plain["result"].items()}
    return {
        **forms,
        "speedup": plain["seconds"] / ours["seconds"],
        "memory_ratio": plain["peak_gb"] / ours["peak_gb"],
        "rates_equal": max(value for key, value in off.items() if "thresh" not in key) < 1e-9,
        "largest_threshold_difference": max((value for key, value in off.items() if "thresh" in key), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real number of images and pairs")
    parser.add_argument("--out", type=Path, default=None, help="write the figures here as JSON")
    parser.add_argument("--child", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], Path(args.child[2]), args.scale)
        return
    figures = {}
    print(f"{'protocol':<10}{'form':<20}{'seconds':>9}{'peak GB':>9}")
    for protocol in DRAW:
        with tempfile.TemporaryDirectory() as folder:
            figures[protocol] = measure(protocol, Path(folder), args.scale)
        for form in FORMS:
            print(f"{protocol:<10}{form:<20}{figures[protocol][form]['seconds']:>9.2f}", end="")
            print(f"{figures[protocol][form]['peak_gb']:>9.2f}")
        print(
            f"{'':<10}{'ratio':<20}{figures[protocol]['speedup']:>9.1f}{figures[protocol]['memory_ratio']:>9.1f}",
            end="",
        )
        print(f"   same rates: {figures[protocol]['rates_equal']}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"scale": args.scale, **figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
