"""Curves of several models in one figure: ROC, DET and CMC as PNG, and the points they are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path
from .metrics import split_scores
from .result import Result
from .search import Matches, rank_k

CURVE_POINTS = 2000  # more than a figure can show
# Readable on white, in grayscale, and with red-green color blindness (Okabe and Ito, without yellow).
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
_DPI = 150
_LINES = ("-", "--", ":", "-.")
# The legend of a ROC gives the TPR at the first of these that was measured.
_LEGEND_FPRS = ("0.0001", "0.001", "0.01", "0.1")


def roc_points(scores: np.ndarray, labels: np.ndarray, count: int = CURVE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Exact points of a ROC at about equal distances on a logarithmic axis, the first false positives one by one.

    Args:
        scores: (N,) float, higher is more alike.
        labels: (N,) bool or 0/1, 1 for the same person.
        count: how many points at most.

    Returns:
        False positive rates, from 0 to 1, and for each one the highest true positive rate that does not exceed it, both
        fractions and ascending: what ``Result.roc`` takes.

    Raises:
        ValueError: as for ``metrics.tpr_at_fpr``.
    """
    positives, negatives = (np.sort(part) for part in split_scores(scores, labels))
    steps = np.geomspace(1, len(negatives), count - 1).round().astype(np.int64)
    allowed = np.append(0, np.unique(steps))[:-1]  # false positives; all of them are added below
    rejected = np.unique(negatives[len(negatives) - 1 - allowed])[::-1]  # the best scores that must not be accepted
    fpr, tpr = (1 - np.searchsorted(part, rejected, side="right") / len(part) for part in (negatives, positives))
    return np.append(fpr, 1.0), np.append(tpr, 1.0)


def cmc_points(matches: Matches, count: int = 50) -> np.ndarray:
    """(count,) share of the probes with a mate that find it among the first 1, 2, ...: what ``Result.cmc`` takes."""
    return np.array(list(rank_k(matches, range(1, count + 1)).values()))


def thinned(fpr: np.ndarray, tpr: np.ndarray, count: int = CURVE_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``count`` points of a curve, about equally far from each other on a logarithmic FPR axis.

    Args:
        fpr: (N,) fractions, ascending.
        tpr: (N,) fractions, ascending.
        count: how many points to keep; the first and the last are kept always.
    """
    fpr, tpr = np.asarray(fpr, dtype=np.float64), np.asarray(tpr, dtype=np.float64)
    if len(fpr) <= count:
        return fpr, tpr
    smallest = fpr[fpr > 0].min(initial=1.0)
    # The last point at or below each step: of those with the same FPR, the one with the highest TPR.
    steps = np.append(fpr[0], np.geomspace(smallest, fpr[-1], count - 3))
    chosen = np.searchsorted(fpr, steps, side="right") - 1
    chosen = np.unique(np.concatenate([[0], chosen, [len(fpr) - 1]]))
    return fpr[chosen], tpr[chosen]


def equal_error_rate(fpr: np.ndarray, tpr: np.ndarray) -> float:
    """The equal error rate, at the nearest point of the curve."""
    fpr, fnr = np.asarray(fpr), 1 - np.asarray(tpr)
    nearest = int(np.abs(fpr - fnr).argmin())
    return float((fpr[nearest] + fnr[nearest]) / 2)


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure of this width and height, made without touching pyplot's state.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'insightface-kprpe[plots]'") from error
    return Figure(figsize=inches, layout="constrained")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure as PNG; an existing file is replaced only by a whole one."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def figure_pixels(figure: Any) -> np.ndarray:
    """A matplotlib figure as (H, W, 3) uint8 RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def plot_roc(results: Sequence[Result], path: str | Path, title: str = "") -> None:
    """Draw true over false positive rates of the results that have a ROC, the latter on a logarithmic axis.

    Args:
        results: those with ``Result.roc``.
        path: the PNG to write.
        title: above the axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _axes(results, title, "false positive rate", "true positive rate (%)")
    lowest_fpr = 0.1
    for result, style in _styled(results):
        fpr, tpr = thinned(*result.roc)
        lowest_fpr = min(lowest_fpr, fpr[fpr > 0].min(initial=1.0))
        fprs = (fpr for fpr in _LEGEND_FPRS if f"tpr_at_fpr_{fpr}" in result.metrics)
        key = next((f"{100 * result.metrics[f'tpr_at_fpr_{fpr}']:.2f} % at FPR {float(fpr):g}" for fpr in fprs), "")
        axes.plot(fpr, 100 * tpr, label=_label(result, key), drawstyle="steps-post", **style)
    axes.set(xscale="log", xlim=(_decade(lowest_fpr), 1))
    axes.set_ylim(top=100.5)
    _finish(figure, path)


def plot_det(results: Sequence[Result], path: str | Path, title: str = "") -> None:
    """Draw false negative over false positive rates, both logarithmic, with the equal error rate of each result.

    Args:
        results: those with ``Result.roc``.
        path: the PNG to write.
        title: above the axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _axes(results, title, "false positive rate", "false negative rate")
    lowest_fpr = lowest_fnr = 0.1
    for result, style in _styled(results):
        fpr, tpr = thinned(*result.roc)
        drawn = (fpr > 0) & (tpr < 1)
        lowest_fpr = min(lowest_fpr, fpr[drawn].min(initial=1.0))
        lowest_fnr = min(lowest_fnr, (1 - tpr[drawn]).min(initial=1.0))
        label = _label(result, f"EER {100 * equal_error_rate(*result.roc):.2f} %")
        axes.plot(fpr[drawn], 1 - tpr[drawn], label=label, drawstyle="steps-post", **style)
    axes.axline((0.01, 0.01), (0.1, 0.1), color="0.7", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlim=(_decade(lowest_fpr), 1), ylim=(_decade(lowest_fnr), 1))
    _finish(figure, path)


def plot_cmc(results: Sequence[Result], path: str | Path, title: str = "") -> None:
    """Draw the identification rate over the rank.

    Args:
        results: those with ``Result.cmc``.
        path: the PNG to write.
        title: above the axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _axes(results, title, "rank", "identification rate (%)")
    for result, style in _styled(results):
        label = _label(result, f"rank-1 {100 * result.cmc[0]:.2f} %")
        marker = "o" if len(result.cmc) <= 50 else ""
        axes.plot(
            np.arange(1, len(result.cmc) + 1), 100 * result.cmc, label=label, marker=marker, markersize=3, **style
        )
    axes.set_ylim(top=100.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(figure, path)


def _axes(results: Sequence[Result], title: str, xlabel: str, ylabel: str) -> tuple[Any, Any]:
    figure = new_figure((6.5, 4.8 + 0.19 * len(results)))  # one line of the legend each
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3, which="major")
    return figure, axes


def _styled(results: Sequence[Result]) -> list[tuple[Result, dict]]:
    """Each result with its own color and line style, so that both of two coinciding curves can be seen."""
    return [
        (result, {"color": _COLORS[i % len(_COLORS)], "linestyle": _LINES[i % len(_LINES)], "linewidth": 1.4})
        for i, result in enumerate(results)
    ]


def _label(result: Result, key: str) -> str:
    return f"{result.name}: {key}" if key else result.name


def _decade(value: float) -> float:
    return float(10.0 ** np.floor(np.log10(value) + 1e-9))


def _finish(figure: Any, path: str | Path) -> None:
    figure.legend(loc="outside lower center", fontsize="small")
    save_figure(figure, path)
