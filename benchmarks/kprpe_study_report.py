"""Tables and curves of kprpe_study.py, from the measurements of its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insightface_kprpe.files import atomic_path, write_atomically

PLAIN, KPRPE = "ViT", "ViT + KPRPE"
KINDS = ("sets", "rotation", "scale", "shift", "drift", "noise")
AXES = {
    "rotation": "rotation of the test crops, degrees",
    "scale": "scale of the test crops, times",
    "shift": "shift of the test crops, share of the side",
    "drift": "error of the keypoints, alpha of Eq. 12",
    "noise": "error of the keypoints, same lengths, random directions",
}
_STYLE = {PLAIN: ("#0072B2", "o-"), "ViT + iRPE": ("#009E73", "s--"), KPRPE: ("#D55E00", "D-")}

Key = tuple[str, str]  # kind of test, its strength or set


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


def summarise(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[Key, Spread]]]:
    """Data -> network -> test -> accuracy over seeds, in percent."""
    values: dict[str, dict[str, dict[Key, list[float]]]] = {}
    for run in runs:
        tests = values.setdefault(run["data"], {}).setdefault(run["network"], {})
        for key, accuracy in _tests(run).items():
            tests.setdefault(key, []).append(accuracy)
    return {
        data: {name: {key: spread(each) for key, each in tests.items()} for name, tests in networks.items()}
        for data, networks in values.items()
    }


def gains(runs: Iterable[Mapping[str, Any]], data: str, network: str = KPRPE, than: str = PLAIN) -> dict[Key, Spread]:
    """By how many points one network is better than another, over the seeds that both have."""
    runs = [run for run in runs if run["data"] == data]
    first = {run["seed"]: _tests(run) for run in runs if run["network"] == network}
    second = {run["seed"]: _tests(run) for run in runs if run["network"] == than}
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    keys = [key for key in pairs[0][0] if key in pairs[0][1]] if pairs else []
    return {key: spread([a[key] - b[key] for a, b in pairs]) for key in keys}


def _tests(run: Mapping[str, Any]) -> dict[Key, float]:
    return {(kind, name): value for kind, part in run["accuracy"].items() for name, value in part.items()}


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """All tables."""
    summary = summarise(runs)
    parts = []
    for data, networks in summary.items():
        main = [name for name in networks if name in _STYLE]
        rows = [key for key in networks[main[0]] if key[0] in KINDS[:4] and key not in (("scale", "1"), ("shift", "0"))]
        gain = gains(runs, data)
        header = ["accuracy, %", *main, "KPRPE - ViT"]
        body = [[_test_name(key), *_cells(networks, main, key), _signed(gain.get(key))] for key in rows]
        parts.append(
            f"### {data.capitalize()} faces ({_seeds(networks[name] for name in main)})\n\n{table(header, body)}"
        )
        errors = [key for key in networks.get(KPRPE, {}) if key[0] in KINDS[4:]]
        if errors:
            alphas = list(dict.fromkeys(alpha for _, alpha in errors))
            body = [
                [alpha, *(str(networks[KPRPE].get((kind, alpha), "")) for kind in ("drift", "noise"))]
                for alpha in alphas
            ]
            header = ["alpha", "L + alpha L (Eq. 12)", "same lengths, random directions"]
            effect = _effect(run for run in runs if run["data"] == data and run["network"] == KPRPE)
            parts.append(f"### {data.capitalize()} faces, wrong keypoints ({KPRPE})\n\n{table(header, body)}{effect}")
        points = [name for name in networks if name.startswith(KPRPE)] + [name for name in networks if name == PLAIN]
        if len(points) > 2:
            columns = [key for key in rows if key[0] == "sets" or key[1] in ("30", "1.4", "0.2")]
            body = [[_points(name), *(str(networks[name].get(key, "")) for key in columns)] for name in points]
            title = f"### {data.capitalize()} faces, number of keypoints ({_seeds(networks[name] for name in points)})"
            parts.append(f"{title}\n\n{table(['keypoints', *map(_test_name, columns)], body)}")
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _effect(runs: Iterable[Mapping[str, Any]]) -> str:
    """How much embeddings depend on the keypoints at all, as a sentence."""
    runs = [run["keypoint_effect"] for run in runs if run.get("keypoint_effect")]
    if not runs:
        return ""
    means = [f"{statistics.fmean(run[name] for run in runs):.2f} % ({name})" for name in runs[0]]
    return f"\n\nWrong keypoints move the unit embedding by {', '.join(means)} of its length."


def _cells(networks: Mapping[str, Mapping[Key, Spread]], names: Sequence[str], key: Key) -> list[str]:
    return [str(networks[name].get(key, "")) for name in names]


def _signed(value: Spread | None) -> str:
    return "" if value is None else ("+" if value.mean >= 0 else "") + str(value)


def _test_name(key: Key) -> str:
    kind, name = key
    if key == ("rotation", "0"):
        return "the pairs to move, unmoved"
    return name if kind == "sets" else f"{kind} {name}"


def _points(network: str) -> str:
    return "none (ViT)" if network == PLAIN else network.split(", ")[1].split()[0] if ", " in network else "5"


def _seeds(networks: Iterable[Mapping[Key, Spread]]) -> str:
    counts = sorted({next(iter(tests.values())).count for tests in networks})
    return f"{' to '.join(str(count) for count in (counts[0], counts[-1])[: len(counts)])} seed{'s' * (counts[-1] > 1)}"


def draw_curves(summary: Mapping[str, Mapping[Key, Spread]], path: Path, title: str) -> None:
    """One panel a kind of test, one curve a network, bars of one standard deviation, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True)
    for axis, kinds in zip(axes.flat, (("rotation",), ("scale",), ("shift",), ("drift", "noise")), strict=True):
        for name, (colour, line) in _STYLE.items():
            for kind in kinds:
                points = [(float(k[1]), value) for k, value in summary.get(name, {}).items() if k[0] == kind]
                if not points:
                    continue
                x, y = [p[0] for p in points], [p[1].mean for p in points]
                label = f"{name}, {'Eq. 12' if kind == 'drift' else 'random directions'}" if len(kinds) > 1 else name
                style = "v:" if kind == "noise" else line
                axis.errorbar(x, y, [p[1].std or 0 for p in points], fmt=style, color=colour, label=label, capsize=3)
        axis.axhline(50, color="0.7", linewidth=1)
        axis.set_xlabel(AXES[kinds[0]] if len(kinds) == 1 else "error of the keypoints, alpha")
        axis.set_ylabel("verification accuracy, %")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def write_report(runs: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Write report.md, report.json and, where matplotlib is at hand, the curves; returns the tables."""
    if not runs:
        return "no run has ended\n"
    text, summary = markdown(runs), summarise(runs)
    write_atomically(out / "report.md", text.encode())
    content = {
        data: {
            "accuracy": {name: _nested(tests) for name, tests in networks.items()},
            "gain": _nested(gains(runs, data)),
        }
        for data, networks in summary.items()
    }
    content["cpu_seconds"] = round(sum(run["cpu_seconds"] for run in runs), 1)
    write_atomically(out / "report.json", (json.dumps(content, indent=2) + "\n").encode())
    for data, networks in summary.items():
        title = f"{data} faces: mean and deviation, {_seeds(networks[name] for name in networks if name in _STYLE)}"
        draw_curves(networks, out / f"curves_{data}.png", title)
    return text


def _nested(tests: Mapping[Key, Spread]) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for (kind, name), value in tests.items():
        result.setdefault(kind, {})[name] = value._asdict()
    return result
