"""The report of a run, from metrics written by hand."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest

from insightface_kprpe.training.run_report import read_metrics, report_run, smoothed, summary


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "<my run>"
    folder.mkdir()
    rows = [
        {"step": step, "loss": 10.0 / step, "lr": 0.1, "images_per_second": 100.0 * step, "epoch": 0}
        for step in range(1, 41)
    ]
    rows += [{"step": 20, "accuracy/lfw": 90.0}, {"step": 30, "accuracy/lfw": 95.0}, {"step": 40, "accuracy/lfw": 93.0}]
    rows += [
        {"step": step, "correlation/norm_sharpness": -0.5, "norm/mean": 20.0, "norm/std": 2.0} for step in (10, 20)
    ]
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 41, "lo')  # a kill cut the last one short
    (folder / "config.json").write_text(json.dumps({"network": "vit_n", "notes": "<b>"}))
    return folder


def test_metrics_by_name(run):
    series = read_metrics(run / "metrics.jsonl")
    steps, values = series["loss"]
    assert steps.tolist() == list(range(1, 41)) and values[4] == 2.0
    assert series["accuracy/lfw"][0].tolist() == [20, 30, 40]
    assert series["norm/mean"][1].tolist() == [20.0, 20.0]


def test_summary(run):
    rows = dict(summary(read_metrics(run / "metrics.jsonl")))
    assert rows["loss, first and last"] == "10.000, 0.250"
    assert rows["images / s, median"] == "2,050"
    assert rows["accuracy on lfw, last"] == "93.00 %; best 95.00 % at step 30"
    assert rows["correlation of norm and sharpness"] == "-0.50 (mean of the last 2)"


def test_pictures_and_a_page_that_needs_nothing_else(run, tmp_path):
    pytest.importorskip("matplotlib")
    files = report_run(run, tmp_path / "out")
    names = ["loss.png", "learning_rate.png", "norms.png", "correlation.png", "speed.png", "verification.png"]
    assert [path.name for path in files] == [*names, "report.html"]
    for path in files[:-1]:
        assert cv2.imread(str(path)).std() > 1
    page = files[-1].read_text()
    assert "&lt;my run&gt;" in page and "<my run>" not in page and "&lt;b&gt;" in page
    assert len(re.findall("<img [^>]*data:image/png;base64,", page)) == len(names)
    assert not re.search('(src|href)="(?!data:)', page)
    assert report_run(run)[-1] == run / "report" / "report.html"


def test_smoothed_is_the_mean_of_a_window():
    values = np.array([4.0, 0.0, 2.0, 6.0])
    assert smoothed(values, 2).tolist() == [4.0, 2.0, 1.0, 4.0]
    assert smoothed(values, 10).tolist() == [4.0, 2.0, 2.0, 3.0]


def test_bad_input(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(FileNotFoundError, match="RUN must be the output folder of a training run"):
        report_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no metrics yet"):
        report_run(tmp_path)
