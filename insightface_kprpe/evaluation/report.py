"""Tables and curves of results, several models side by side."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import check_writable, write_atomically
from .curves import new_figure, plot_cmc, plot_det, plot_roc, thinned
from .result import Result

REPORT_BYTES = 1 << 20  # about the size of a report with its curves

_COLUMN_NAMES = (
    (r"tpr_at_fpr_(\S+)", r"TPR@FPR=\1"),
    (r"tpir_at_fpir_(\S+)", r"TPIR@FPIR=\1"),
    (r"tpir_at_far_(\S+)", r"TPIR@FAR=\1"),
    (r"val_at_far_(\S+)", r"VAL@FAR=\1"),
    (r"val_std", r"VAL std"),
    (r"thresh_at_far_(\S+)", r"at FAR=\1"),
    (r"thresh_at_fpr_(\S+)", r"at FPR=\1"),
    (r"thresh_at_fpir_(\S+)", r"at FPIR=\1"),
    (r"rank_(\d+)", r"rank-\1"),
)


def format_text(results: Sequence[Result]) -> str:
    """Tables for a terminal: for each protocol one of rates, one of thresholds, and the settings behind them.

    Args:
        results: of any models and protocols; those of one protocol are in one table, in order.
    """
    blocks = []
    for protocol, group in _by_protocol(results).items():
        lines = [protocol]
        for title, table in _tables(group):
            lines += [title] if title else []
            lines.append(grid(table, _text_columns(group)))
        lines += [f"  {key}: {value}" for key, value in _settings(group)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def format_markdown(results: Sequence[Result]) -> str:
    """The same as Markdown, for pages and pull requests; arguments as for ``format_text``."""
    blocks = []
    for protocol, group in _by_protocol(results).items():
        blocks.append(f"## {protocol}")
        for title, (head, *rows) in _tables(group):
            blocks += [title] if title else []
            rule = ["---" if n < _text_columns(group) else "---:" for n in range(len(head))]
            lines = [head, rule, *rows]
            blocks.append("\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines))
        blocks.append("\n".join(f"- {key}: {value}" for key, value in _settings(group)))
    return "\n\n".join(block for block in blocks if block) + "\n"


def format_arcface_torch(results: Sequence[Result], target: str) -> str:
    """The 1:1 results as arcface_torch's ``eval_ijbc.py`` prints them: one line per method, TPR in percent at each FPR.

    Args:
        results: of any protocols; those of 1:1 are shown.
        target: "IJBC" or "IJBB", part of a method's name.
    """
    rates = {}
    for result in results:
        if result.protocol.endswith("1:1"):
            prefix = "tpr_at_fpr_"
            rates[f"{result.name}-{target}"] = {k[len(prefix) :]: v for k, v in result.percent.items() if prefix in k}
    heads = list(next(iter(rates.values())))
    return grid([["Methods", *heads], *([name, *(f"{row[h]:.2f}" for h in heads)] for name, row in rates.items())])


def grid(table: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Cells in a frame, with the first row as header.

    Args:
        table: rows of equally many cells.
        text_columns: this many columns are left-aligned; the others, numbers, right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rule = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    lines = []
    for row in table:
        cells = [f"{cell:{'<' if n < text_columns else '>'}{widths[n]}}" for n, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def check_report_folder(folder: str | Path) -> None:
    """Check, before a long evaluation, that ``write_report`` will be able to write and draw.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the folder cannot be made or written to.
    """
    new_figure((1, 1))
    check_writable(Path(folder) / "report.json", REPORT_BYTES)


def write_report(results: Sequence[Result], folder: str | Path) -> list[Path]:
    """Write ``report.txt``, ``report.md``, ``report.json`` and the curves ``roc_*.png``, ``det_*.png``, ``cmc_*.png``.

    Each protocol has its own curves, with all models in one figure. ``report.json`` holds everything in the results,
    with rates in percent except for those of the ROC.

    Args:
        results: of any models and protocols.
        folder: created if missing; a previous report is replaced.

    Returns:
        The files.

    Raises:
        ValueError: there are no results.
        ImportError: there are curves to draw and matplotlib is not installed; the other files are then written.
    """
    if not results:
        raise ValueError("results must hold at least one result to report, got none")
    folder = Path(folder)
    document = {"results": [_as_json(result) for result in results]}
    texts = {
        "report.txt": format_text(results) + "\n",
        "report.md": format_markdown(results),
        "report.json": json.dumps(document, indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, text.encode())
    written = [folder / name for name in texts]
    for protocol, group in _by_protocol(results).items():
        slug = re.sub(r"[^a-z0-9]+", "_", protocol.lower()).strip("_")
        with_roc = [result for result in group if result.roc is not None]
        with_cmc = [result for result in group if result.cmc is not None]
        for kind, plot, chosen in (
            ("roc", plot_roc, with_roc),
            ("det", plot_det, with_roc),
            ("cmc", plot_cmc, with_cmc),
        ):
            if chosen:
                written.append(folder / f"{kind}_{slug}.png")
                plot(chosen, written[-1], protocol)
    return written


def _by_protocol(results: Sequence[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.protocol, []).append(result)
    return groups


def _tables(group: Sequence[Result]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows, the head first: the rates of one protocol and, below them, the thresholds."""
    names = list(dict.fromkeys(name for result in group for name in result.metrics))
    tables = []
    for title, columns in (
        ("", [name for name in names if "thresh" not in name]),
        ("Cosine thresholds", [name for name in names if "thresh" in name]),
    ):
        if not columns:
            continue
        rows = [["model", "variant"][: _text_columns(group)] + [_column_name(name) for name in columns]]
        for result in group:
            percent = result.percent
            cells = [_number(name, percent.get(name)) for name in columns]
            rows.append([result.model, result.variant][: _text_columns(group)] + cells)
        tables.append((title, rows))
    return tables


def _text_columns(group: Sequence[Result]) -> int:
    return 2 if any(result.variant for result in group) else 1


def _column_name(metric: str) -> str:
    for pattern, name in _COLUMN_NAMES:
        metric = re.sub(pattern, name, metric)
    return metric.replace("_", " ")


def _number(name: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if "thresh" in name:
        return f"{value:.4f}" if math.isfinite(value) else "none"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _settings(group: Sequence[Result]) -> list[tuple[str, str]]:
    """Each setting once if all results share it, else each of its values with the results that it belongs to."""
    one_model = len({result.model for result in group}) == 1
    lines = []
    for key in dict.fromkeys(key for result in group for key in result.settings):
        owners: dict[str, list[str]] = {}
        for result in group:
            name = result.variant if one_model and result.variant else result.name
            owners.setdefault(str(result.settings.get(key, "-")), []).append(name)
        for value, names in owners.items():
            lines.append((key if len(owners) == 1 else f"{key} ({'; '.join(names)})", value))
    return lines


def _as_json(result: Result) -> dict[str, Any]:
    document = {
        "model": result.model,
        "variant": result.variant,
        "protocol": result.protocol,
        "metrics": {name: _plain(value) for name, value in result.percent.items()},
        "settings": {key: _plain(value) for key, value in result.settings.items()},
    }
    if result.roc is not None:
        fpr, tpr = thinned(*result.roc)
        document["roc"] = {"fpr": fpr.tolist(), "tpr": tpr.tolist()}
    if result.cmc is not None:
        document["cmc"] = (100 * np.asarray(result.cmc)).tolist()
    return document


def _plain(value: Any) -> Any:
    """A value for JSON: plain numbers, text for anything else; null for a number that is not finite."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str)) or value is None else str(value)
