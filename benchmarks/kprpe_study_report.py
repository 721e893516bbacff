"""Tables and curves of the study of KPRPE, from the runs that kprpe_study.py made.

    python benchmarks/kprpe_study_report.py --out study

prints a table for every part, in Markdown, and writes report.md, report.json and curves_*.png (extra "plots") beside
the runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from insightface_kprpe.evaluation.metrics import kfold_accuracy, tpr_at_fpr
from insightface_kprpe.files import atomic_path, write_atomically

COMPARED = ("ViT lr 0.002", "KPRPE x30", "iRPE x10")  # test by test
FPR = 0.01
DRAWS = 1000  # of the bootstrap
_COLOURS = {"ViT": "#0072B2", "iRPE": "#009E73", "KPRPE": "#D55E00"}
# Panels of the curves: what is on the axis, the tests that belong there, and which amount changes nothing.
_PANELS = (
    ("rotation of the crops, degrees", r"rotation ([\d.]+)", 0.0),
    ("scale of the crops, times", r"scale ([\d.]+)", 1.0),
    ("shift of the crops, share of the side", r"shift ([\d.]+)", 0.0),
    ("resolution of the crops, pixels", r"([\d.]+) px", 112.0),
    ("noise of the keypoints, share of the side", r"keypoint noise ([\d.]+)", 0.0),
)
_ALIGNED = r"aligned first, keypoint noise ([\d.]+)"


class Spread(NamedTuple):
    """Mean and sample standard deviation over ``count`` seeds; the deviation of one is None."""

    mean: float
    std: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} +- {self.std:.1f}"


def spread(values: Sequence[float]) -> Spread:
    """Mean, deviation and number of values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


class Result:
    """One run: what ``run.json`` and ``scores.npz`` say.

    Attributes:
        run: the content of ``run.json``.
        scores: (P,) cosines by test.
    """

    def __init__(self, run: Mapping[str, Any], scores: Mapping[str, np.ndarray]) -> None:
        self.run, self.scores = run, scores

    @classmethod
    def read(cls, folder: Path) -> Result:
        """A run's folder."""
        with np.load(folder / "scores.npz", allow_pickle=False) as file:
            scores = dict(file)
        return cls(json.loads((folder / "run.json").read_text()), scores)

    def is_same(self, test: str) -> np.ndarray:
        """(P,) bool: the answers of a test; its set's name comes before the comma."""
        return self.scores[f"{test.split(',')[0]}/is_same"]

    def people(self, test: str) -> np.ndarray:
        """(P, 2) int: who is on the pairs."""
        return self.scores[f"{test.split(',')[0]}/people"]

    def right(self, test: str) -> np.ndarray:
        """(P,) bool: pairs that are judged rightly, by the threshold that is best on the other folds."""
        cosines, same, folds = self.scores[test].astype(float).clip(-1, 1), self.is_same(test), folds_of(test)
        first = np.tile([1.0, 0.0], (len(cosines), 1))  # two dimensions are enough for vectors of these cosines
        second = np.stack([cosines, np.sqrt(1 - cosines**2)], 1)
        thresholds = kfold_accuracy(first, second, same, folds).fold_thresholds
        sizes = [len(part) for part in np.array_split(same, folds)]
        return (2 - 2 * cosines < np.repeat(thresholds, sizes)) == same

    def tpr(self, test: str) -> float:
        """TPR at an FPR of 1 %, percent."""
        return 100 * tpr_at_fpr(self.scores[test], self.is_same(test), [FPR])[0].tpr


def folds_of(test: str) -> int:
    """Five of LFW's ten official folds are there; other sets are cut in ten."""
    return 5 if test.startswith("lfw") else 10


def read_results(out: Path) -> list[Result]:
    """All runs that have ended but the bases, which are not compared."""
    results = [Result.read(path.parent) for path in out.glob("*/*/run.json") if path.parts[-3] != "base"]
    return sorted(results, key=lambda result: (result.run["part"], _rank(result.run["name"]), result.run["seed"]))


def _rank(name: str) -> tuple:
    """Where a network stands in tables: the plain ViT first, then by scale or learning rate."""
    kind, *settings = name.split()
    return list(_COLOURS).index(kind), [float(n) for n in re.findall(r"[0-9.]+", settings[0])], name


def accuracies(results: Iterable[Result], name: str) -> dict[str, Spread]:
    """By test: accuracy over the seeds of one network."""
    runs = [result.run["accuracy"] for result in results if result.run["name"] == name]
    return {test: spread([run[test] for run in runs]) for test in runs[0]}


def gain(results: Sequence[Result], name: str, than: str, test: str) -> tuple[Spread, float, float] | None:
    """By how many points one network is better than another on a test, over the seeds that both have.

    Returns:
        Mean and deviation over seeds, and the bounds that hold 95 % of the means when people are drawn anew
        (bootstrap: a pair counts as often as both of its people are drawn). None where there is no common seed.
    """
    of = {key: {r.run["seed"]: r for r in results if r.run["name"] == key} for key in (name, than)}
    seeds = sorted(of[name].keys() & of[than].keys())
    if not seeds or any(test not in of[key][seeds[0]].scores for key in of):
        return None
    differences = np.stack([100.0 * of[name][s].right(test) - 100.0 * of[than][s].right(test) for s in seeds])
    people = np.unique(of[name][seeds[0]].people(test), return_inverse=True)[1].reshape(-1, 2)
    rng, count, means = np.random.default_rng(0), people.max() + 1, []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        weights = np.where(people[:, 0] == people[:, 1], times[people[:, 0]], times[people].prod(1))
        means.append((differences.mean(0) * weights).sum() / weights.sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return spread(differences.mean(1).tolist()), float(low), float(high)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparison(results: Sequence[Result], names: Sequence[str], name: str, than: str) -> str:
    """A table of the tests that all have, and by how much one network is better than another."""
    columns = {each: accuracies(results, each) for each in names}
    rows = []
    for test in columns[than]:
        found = gain(results, name, than, test)
        if found is not None:
            seeds, low, high = found
            last = f"{'+' * (seeds.mean >= 0)}{seeds} ({low:+.1f} to {high:+.1f})"
            rows.append([test, *(str(columns[each].get(test, "")) for each in names), last])
    return table(["accuracy, %", *names, f"{name} - {than} (95 % of people)"], rows)


def keypoint_table(results: Sequence[Result], name: str, than: str, test: str) -> str:
    """What right and wrong keypoints are worth: to a network that sees them, and to align the crop by them first."""
    seen, plain = accuracies(results, name), accuracies(results, than)
    changes = [key.removeprefix(f"{test}, ") for key in seen if key.startswith(f"{test}, ") and "point" in key]
    rows = [["as they are", str(plain[test]), str(plain[f"{test}, aligned first"]), str(seen[test])]]
    for change in changes:
        rows.append(
            [change, "", str(plain.get(f"{test}, aligned first, {change}", "")), str(seen[f"{test}, {change}"])]
        )
    return table(["keypoints", than, f"{than}, crops aligned first", name], rows)


def draw_curves(results: Sequence[Result], names: Sequence[str], path: Path, title: str) -> None:
    """One panel a kind of test, one curve a network, bars of one standard deviation, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = list(figure.subplots(2, 3, sharey=True).flat)
    tests = {name: accuracies(results, name) for name in names}

    def draw(axis, name: str, pattern: str, start: float, line: str, label: str) -> None:
        points = curve(tests[name], pattern, start)
        if points:
            x, y, bars = zip(*((amount, value.mean, value.std or 0) for amount, value in points), strict=True)
            axis.errorbar(x, y, bars, fmt=line, color=_COLOURS[name.split()[0]], label=label, capsize=3)

    for (label, pattern, start), axis in zip(_PANELS, axes, strict=False):
        for name in names:
            draw(axis, name, pattern, start, "o-", name)
        axis.set_xlabel(label)
        axis.set_ylabel("verification accuracy, %")
        axis.grid(alpha=0.3)
    draw(axes[4], names[0], _ALIGNED, 0.0, "s--", f"{names[0]}, crops aligned first")
    for axis in axes[:5]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    axes[5].axis("off")
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=75)


def curve(tests: Mapping[str, Spread], pattern: str, start: float) -> list[tuple[float, Spread]]:
    """(amount, accuracy) of the tests whose name after the set's matches, and of the test that changes nothing."""
    found = {test: re.fullmatch(f"[^,]*, {pattern}", test) for test in tests}
    points = [(float(match[1]), tests[test]) for test, match in found.items() if match]
    if not points:
        return []
    unchanged = next(test for test, match in found.items() if match).rpartition(", ")[0]
    return sorted([(start, tests[unchanged]), *points])


def parts_of(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Runs by part of the study."""
    parts: dict[str, list[Result]] = {}
    for result in results:
        parts.setdefault(result.run["part"], []).append(result)
    return parts


def overview(results: Sequence[Result], tests: Sequence[str]) -> str:
    """A table of all networks of a part: some accuracies, the TPR of the first test, and whether keypoints are used."""
    rows = []
    for name in dict.fromkeys(result.run["name"] for result in results):
        runs = [result for result in results if result.run["name"] == name]
        found = accuracies(runs, name)
        shift = [run.run["keypoints"].get("keypoints/template_shift") for run in runs]
        rows.append([
            name, str(len(runs)), *(str(found[test]) for test in tests),
            str(spread([run.tpr(tests[0]) for run in runs])),
            "" if None in shift else f"{100 * statistics.fmean(shift):.0f}",
            "" if runs[0].run["tables"] is None else f"{statistics.fmean(run.run['tables'] for run in runs):.2f}",
            f"{statistics.fmean(run.run['loss'] for run in runs):.2f}",
        ])  # fmt: skip
    header = ["network", "seeds", *tests, "TPR at FPR 1 %", "shift by the template, %", "mean abs of tables", "loss"]
    return table(header, rows)


def main() -> None:
    """Write the tables and curves of all runs that have ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the runs")
    options = parser.parse_args()
    text, summary = [], {}
    for part, results in parts_of(read_results(options.out)).items():
        sets = [test for test in results[0].run["accuracy"] if "," not in test]
        text.append(f"## {part}\n\n{overview(results, sets)}")
        summary[part] = {
            name: {test: value._asdict() for test, value in accuracies(results, name).items()}
            for name in dict.fromkeys(result.run["name"] for result in results)
        }
        best = [name for name in COMPARED if name in summary[part]]
        if len(best) > 1:
            text.append(comparison(results, best, best[1], best[0]))
            text.append(keypoint_table(results, best[1], best[0], sets[0]))
            draw_curves(results, best, options.out / f"curves_{part}.png", f"{part}: mean and deviation over seeds")
    report = "\n\n".join(text) + "\n"
    write_atomically(options.out / "report.md", report.encode())
    write_atomically(options.out / "report.json", (json.dumps(summary, indent=2) + "\n").encode())
    print(report)


if __name__ == "__main__":
    main()
