"""A report on a run: curves of its metrics as PNG, and all of them in one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..documents import json_lines, read_json_object
from ..evaluation.curves import new_figure, save_figure
from ..files import write_atomically
from .run_folder import METRICS, writing

WINDOW = 25  # logged steps that a smoothed curve averages
_SIZE = (7.5, 3.6)  # inches

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # metric: its steps and values


class Panel(NamedTuple):
    """One figure: which metrics it shows, and how.

    Attributes:
        title: above the axes.
        ylabel: what the metrics are, and in what unit.
        metrics: name in the file: name in the legend.
        smooth: draw the mean over a window, and the raw values faintly.
        band: metric that is drawn as a band around another: {metric: its deviation}.
    """

    title: str
    ylabel: str
    metrics: Mapping[str, str]
    smooth: bool = False
    band: Mapping[str, str] = {}


PANELS = {
    "loss": Panel("Loss", "loss", {"loss": "mean of the logged steps"}),
    "learning_rate": Panel("Learning rate", "learning rate", {"lr": "lr"}),
    "norms": Panel(
        "Norms of the embeddings",
        "norm, +- one deviation",
        {"norm/mean": "batch", "norm/running_mean": "AdaFace's running statistics"},
        band={"norm/mean": "norm/std", "norm/running_mean": "norm/running_std"},
    ),
    "margins": Panel(
        "AdaFace's margin",
        "mean over the batch",
        {"margin/mean": "margin added to the cosine", "margin/quality_mean": "quality, the factor of the margin"},
    ),
    "correlation": Panel(
        "Does the norm reflect quality? Below 0, the relation is reversed",
        "correlation with the norm",
        {
            "correlation/norm_sharpness": "sharpness of the image",
            "correlation/norm_alignment": "how well it is aligned",
        },
        smooth=True,
    ),
    "keypoints": Panel(
        "Does the network use its keypoints?",
        "share",
        {
            "keypoints/attention_share": "share of attention that they determine",
            "keypoints/template_shift": "change of the embedding if replaced by the template's",
        },
    ),
    "speed": Panel("Speed", "images / s", {"images_per_second": "all ranks"}),
}


def report_run(run: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draw the metrics of a run, also of one that is still training.

    Args:
        run: its folder, with ``metrics.jsonl``.
        out: where to write; None: the folder ``report`` in it.

    Returns:
        The files: a PNG for each kind of metric that was logged, and last ``report.html``, which holds them all.

    Raises:
        FileNotFoundError: the folder has no ``metrics.jsonl``.
        ValueError: nothing was logged yet, or ``config.json`` is damaged.
        ImportError: matplotlib is not installed.
        TrainingError: the report could not be written.
    """
    new_figure(_SIZE)  # raises before anything is read or written
    run = Path(run)
    out = run / "report" if out is None else Path(out)
    series, settings = read_metrics(run / METRICS), _read_settings(run / "config.json")
    with writing("the report", out):
        return _write_report(run.resolve().name, series, settings, out)


def _write_report(name: str, series: Series, settings: Mapping[str, Any], out: Path) -> list[Path]:
    pictures = []
    accuracies = {name: name.removeprefix("accuracy/") for name in series if name.startswith("accuracy/")}
    panels = {**PANELS, "verification": Panel("Verification", "accuracy, %", accuracies)}
    for kind, panel in panels.items():
        if any(metric in series for metric in panel.metrics):
            pictures.append(out / f"{kind}.png")
            _draw(panel, series, pictures[-1])
    page = _page(name, summary(series), pictures, settings)
    write_atomically(out / "report.html", page.encode())
    return [*pictures, out / "report.html"]


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to draw the report without the config") from error


def read_metrics(path: Path) -> Series:
    """The metrics of a ``metrics.jsonl`` by name, without entries that are not numbers and a line cut short by a kill.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no metrics.
    """
    if not path.is_file():
        raise FileNotFoundError(f"RUN must be the output folder of a training run, with {METRICS}, got {path.parent}")
    points: dict[str, dict[int, float]] = {}
    for _, row in json_lines(path):
        if not _is_number(row.get("step")):
            continue
        for name, value in row.items():
            if name != "step" and _is_number(value):
                points.setdefault(name, {})[int(row["step"])] = float(value)
    if not points:
        raise ValueError(f"{path} holds no metrics yet; try again after the first `frequent` steps")
    return {name: (np.array(list(by_step)), np.array(list(by_step.values()))) for name, by_step in points.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # which NaN is not


def summary(series: Series) -> list[tuple[str, str]]:
    """Summary of a run: names and values."""
    rows = [("steps logged", f"{max(int(steps[-1]) for steps, _ in series.values()):,}")]
    if "loss" in series:
        rows.append(("loss, first and last", f"{series['loss'][1][0]:.3f}, {series['loss'][1][-1]:.3f}"))
    if "images_per_second" in series:
        rows.append(("images / s, median", f"{np.median(series['images_per_second'][1]):,.0f}"))
    for name, (steps, values) in series.items():
        if name.startswith("accuracy/"):
            best = f"{values[-1]:.2f} %; best {values.max():.2f} % at step {steps[values.argmax()]:,}"
            rows.append((f"accuracy on {name.removeprefix('accuracy/')}, last", best))
        elif name.startswith("correlation/"):
            last = values[-WINDOW:]
            what = name.removeprefix("correlation/norm_")
            rows.append((f"correlation of norm and {what}", f"{last.mean():+.2f} (mean of the last {len(last)})"))
    return rows


def smoothed(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Mean of each value and those before it, at most ``window`` in all."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _draw(panel: Panel, series: Series, path: Path) -> None:
    figure = new_figure(_SIZE)
    axes = figure.subplots()
    axes.set(title=panel.title, xlabel="optimizer step", ylabel=panel.ylabel)
    axes.grid(alpha=0.3)
    for number, (metric, label) in enumerate(panel.metrics.items()):
        if metric not in series:
            continue
        steps, values = series[metric]
        style = {"color": f"C{number}", "marker": "o" if len(steps) <= 30 else "", "markersize": 3}
        if panel.smooth:
            axes.plot(steps, values, color=f"C{number}", alpha=0.2)
            values = smoothed(values)
        axes.plot(steps, values, label=label, linewidth=1.4, **style)
        if panel.band.get(metric) in series and len(series[panel.band[metric]][0]) == len(steps):
            _, deviation = series[panel.band[metric]]
            axes.fill_between(steps, values - deviation, values + deviation, color=f"C{number}", alpha=0.15)
    if panel.smooth:
        axes.axhline(0, color="0.5", linewidth=0.8)
    if panel.band:  # AdaFace's deviation starts at 100, and would leave the rest flat
        axes.set_ylim(0, 1.5 * max(series[metric][1].max() for metric in panel.metrics if metric in series))
    axes.legend(fontsize="small")
    save_figure(figure, path)


def _page(name: str, rows: Sequence[tuple[str, str]], pictures: Sequence[Path], settings: Mapping[str, Any]) -> str:
    images = "\n".join(
        f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in pictures
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; margin: 1em 0 }}
td {{ border-bottom: 1px solid #ddd; padding: .2em 1.5em .2em 0; vertical-align: top }}
img {{ width: 570px; max-width: 100%; margin: 0 4px 12px 0 }}
</style></head><body>
<h1>{html.escape(name)}</h1>
{_rows(rows)}
{images}
<details><summary>Config</summary>
{_rows([(key, json.dumps(value)) for key, value in settings.items()])}
</details>
</body></html>
"""


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return "<table>\n" + "\n".join(cells) + "\n</table>"
