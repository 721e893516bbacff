"""How the study of benchmarks/kprpe_study.py moves its test and adds up its runs."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from insightface_kprpe.backbones.interface import Backbone
from insightface_kprpe.data.verification_pairs import VerificationPairs
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    for name in ("kprpe_study", "kprpe_study_report"):
        sys.modules.pop(name, None)
    import kprpe_study

    return kprpe_study


@pytest.fixture
def report(study):
    import kprpe_study_report

    return kprpe_study_report


@pytest.fixture
def dots():
    """Two pairs of crops with a white dot on each keypoint."""
    images = np.zeros((4, 112, 112, 3), np.uint8)
    keypoints = np.tile(np.round(CANONICAL_KEYPOINTS * 112 - 0.5) + 0.5, (4, 1, 1)) / 112
    for image in images:
        for x, y in keypoints[0] * 112 - 0.5:
            image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = 255
    return VerificationPairs("dots", images, keypoints.astype(np.float32), np.array([True, False]))


@pytest.mark.parametrize(("kind", "amount"), [("rotation", 30.0), ("scale", 1.2), ("shift", 0.1)])
def test_dots_stay_under_the_keypoints_of_moved_crops(study, dots, kind, amount):
    moved = study.move(dots, kind, amount)
    for image, keypoints in zip(moved.images, moved.keypoints, strict=True):
        for x, y in keypoints * 112 - 0.5:
            column, row = round(float(x)), round(float(y))
            patch = image[row - 4 : row + 5, column - 4 : column + 5].astype(float).mean(-1)
            ys, xs = np.mgrid[-4:5, -4:5]
            found = column + (patch * xs).sum() / patch.sum(), row + (patch * ys).sum() / patch.sum()
            assert np.hypot(found[0] - x, found[1] - y) < 0.3
    difference = moved.keypoints - dots.keypoints
    assert np.abs(difference).max() > 0.03
    if kind == "shift":
        assert np.linalg.norm(difference, axis=-1) == pytest.approx(0.1, abs=1e-5)


def test_matrices_turn_and_scale_by_the_amount_either_way(study):
    turned = study.move_matrix(200, "rotation", 30.0, seed=0)
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
    assert sorted({round(angle) for angle in angles.tolist()}) == [-30, 30]
    scaled = study.move_matrix(200, "scale", 1.5, seed=0)
    assert sorted({round(value, 3) for value in scaled[:, 0, 0].tolist()}) == [0.667, 1.5]
    assert torch.equal(turned, study.move_matrix(200, "rotation", 30.0, seed=0))


def test_keypoint_errors_are_as_long_as_equation_12_says(study, dots):
    drift, noise = (study.mislead(dots, kind, 0.1).keypoints - dots.keypoints for kind in ("drift", "noise"))
    assert drift == pytest.approx(0.1 * dots.keypoints, abs=1e-6)
    lengths = np.linalg.norm(dots.keypoints, axis=-1)
    assert np.linalg.norm(noise, axis=-1) == pytest.approx(0.1 * lengths, abs=1e-5)
    assert np.abs(noise - drift).max() > 0.05


def test_effect_of_keypoints_is_the_distance_of_unit_embeddings(study, dots):
    class Net(Backbone):
        img_size, num_features, needs_keypoints = 112, 10, True

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images, keypoints):
            return torch.stack([torch.ones(len(images)), 5.0 * (keypoints.abs().sum((1, 2)) == 0)], 1)

    effect = study.keypoint_effect(Net(), dots, 2)
    assert effect["noise 0.1"] == 0.0
    turned = np.array([1, 5]) / 26**0.5 - np.array([1, 0])
    assert effect["all in the corner"] == pytest.approx(100 * np.linalg.norm(turned), rel=1e-5)
    assert study.keypoint_effect(torch.nn.Linear(1, 1), dots, 2) == {}


def test_chosen_pairs_are_whole_pairs(study):
    images = np.arange(40).reshape(40, 1, 1, 1).repeat(3, -1).astype(np.uint8)
    tested = VerificationPairs("x", images, np.zeros((40, 5, 2), np.float32), np.arange(20) % 2 == 0)
    chosen = study.choose_pairs(tested, 6)
    numbers = chosen.images[:, 0, 0, 0].reshape(-1, 2)
    assert (numbers[:, 1] == numbers[:, 0] + 1).all() and (numbers[:, 0] % 2 == 0).all()
    assert (chosen.is_same == (numbers[:, 0] // 2 % 2 == 0)).all()


def result(network, seed, aligned, turned, data="real"):
    accuracy = {"sets": {"val": aligned}, "rotation": {"0": aligned, "30": turned}}
    if network.startswith("ViT + KPRPE"):
        accuracy["drift"] = accuracy["noise"] = {"0": aligned, "0.1": turned}
    effect = {"noise 0.1": float(seed), "all in the corner": 8.0} if "KPRPE" in network else {}
    result = {"data": data, "network": network, "seed": seed, "accuracy": accuracy, "keypoint_effect": effect}
    return {**result, "cpu_seconds": 1.0}


RUNS = [
    result("ViT", 0, 70.0, 60.0), result("ViT", 1, 72.0, 50.0), result("ViT", 2, 99.0, 99.0),
    result("ViT + iRPE", 0, 71.0, 61.0),
    result("ViT + KPRPE", 0, 71.0, 65.0), result("ViT + KPRPE", 1, 72.0, 59.0),
    result("ViT + KPRPE, 2 points", 0, 70.0, 62.0),
]  # fmt: skip


def test_mean_and_deviation_over_seeds(report):
    summary = report.summarise(RUNS)["real"]
    assert summary["ViT + KPRPE"]["rotation", "30"] == pytest.approx((62.0, 18**0.5, 2))
    assert str(summary["ViT + KPRPE"]["rotation", "30"]) == "62.0 +- 4.2"
    assert summary["ViT + iRPE"]["sets", "val"] == (71.0, None, 1)
    assert str(summary["ViT + iRPE"]["sets", "val"]) == "71.0"


def test_gains_compare_the_same_seeds(report):
    gain = report.gains(RUNS, "real")  # ViT's third seed has no partner
    assert gain["rotation", "30"] == pytest.approx((7.0, 8**0.5, 2))
    assert gain["sets", "val"].mean == 0.5
    assert report.gains(RUNS, "drawn") == {}


def test_tables(report):
    text = report.markdown(RUNS)
    assert "| rotation 30 | 69.7 +- 25.9 | 61.0 | 62.0 +- 4.2 | +7.0 +- 2.8 |" in text
    assert "### Real faces (1 to 3 seeds)" in text
    assert "| 0.1 | 62.0 +- 4.2 | 62.0 +- 4.2 |" in text
    assert "move the unit embedding by 0.50 % (noise 0.1), 8.00 % (all in the corner) of its length." in text
    assert "| 2 | 70.0 | 62.0 |" in text and "| none (ViT) |" in text


def test_report_files(report, tmp_path):
    pytest.importorskip("matplotlib")
    report.write_report(RUNS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "curves_real.png"}
    assert (tmp_path / "curves_real.png").stat().st_size < 150_000
    assert report.write_report([], tmp_path) == "no run has ended\n"


def test_finished_runs_of_other_settings_are_refused(study, tmp_path):
    arguments = ["--rec", "a", "--val", "b.bin", "--out", str(tmp_path), "--seeds", "1"]
    options = study.parse_arguments(arguments)
    runs = study.plan_runs(options)
    assert len({run.folder for run in runs}) == len(runs) == 3 + 3 + 9
    (tmp_path / runs[0].folder).mkdir()
    (tmp_path / runs[0].folder / "study.json").write_text('{"settings": {"rec": "a", "num_epoch": 5}}')
    assert len(list(study.finished(runs, tmp_path))) == 1
    with pytest.raises(ValueError, match="use another folder"):
        list(study.finished(study.plan_runs(study.parse_arguments([*arguments, "--epochs", "6"])), tmp_path))
