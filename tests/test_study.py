"""How the study of benchmarks/kprpe_study.py changes its tests and adds up its runs."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from insightface_kprpe.data.image_codec import encode_jpeg
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS

MODULES = ("study_data", "study_tests", "kprpe_study", "kprpe_study_report")


@pytest.fixture(scope="module")
def study():
    """The scripts of the study as modules."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(folder)
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def dots(study):
    """Two pairs of crops with a white dot on each keypoint."""
    images = np.zeros((4, 112, 112, 3), np.uint8)
    keypoints = np.tile(np.round(CANONICAL_KEYPOINTS * 112 - 0.5) + 0.5, (4, 1, 1)) / 112
    for image in images:
        for x, y in keypoints[0] * 112 - 0.5:
            image[int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = 255
    pairs = np.arange(4).reshape(2, 2)
    return study["study_tests"].SetOfPairs(
        "dots", images, keypoints.astype(np.float32), pairs, np.array([True, False]), pairs
    )


def distances(tested):
    """How far the dots are from the keypoints, in pixels."""
    for image, keypoints in zip(tested.images, tested.keypoints, strict=True):
        for x, y in keypoints * 112 - 0.5:
            column, row = round(float(x)), round(float(y))
            patch = image[row - 4 : row + 5, column - 4 : column + 5].astype(float).mean(-1)
            ys, xs = np.mgrid[-4:5, -4:5]
            yield np.hypot(
                column + (patch * xs).sum() / patch.sum() - x, row + (patch * ys).sum() / patch.sum() - y
            )  # fmt: skip


@pytest.mark.parametrize(("kind", "amount"), [("rotation", 30.0), ("scale", 1.2), ("shift", 0.1)])
def test_dots_stay_under_the_keypoints_of_moved_crops(study, dots, kind, amount):
    moved = study["study_tests"].move(dots, kind, amount)
    assert max(distances(moved)) < 0.3
    difference = moved.keypoints - dots.keypoints
    assert np.abs(difference).max() > 0.03
    if kind == "shift":
        assert np.linalg.norm(difference, axis=-1) == pytest.approx(0.1, abs=1e-5)


def test_matrices_turn_and_scale_by_the_amount_either_way(study):
    move_matrix = study["study_tests"].move_matrix
    turned = move_matrix(200, "rotation", 30.0, seed=0)
    angles = torch.atan2(turned[:, 1, 0], turned[:, 0, 0]).rad2deg()
    assert sorted({round(angle) for angle in angles.tolist()}) == [-30, 30]
    scaled = move_matrix(200, "scale", 1.5, seed=0)
    assert sorted({round(value, 3) for value in scaled[:, 0, 0].tolist()}) == [0.667, 1.5]


def test_moved_crops_are_aligned_again_by_their_keypoints(study, dots):
    again = study["study_tests"].align(study["study_tests"].move(dots, "rotation", 30.0))
    assert again.keypoints == pytest.approx(np.tile(CANONICAL_KEYPOINTS, (4, 1, 1)), abs=0.01)
    assert max(distances(again)) < 0.5


def test_wrong_keypoints(study, dots):
    wrong = study["study_tests"].wrong_keypoints(dots.keypoints + np.arange(4, dtype=np.float32)[:, None, None])
    right = dots.keypoints + np.arange(4)[:, None, None]
    assert wrong["keypoint drift 0.1"] == pytest.approx(1.1 * right, rel=1e-5)
    assert (wrong["keypoint noise 0.1"] - right).std() == pytest.approx(0.1, rel=0.4)
    assert sorted(wrong["another face's keypoints"][:, 0, 0]) == pytest.approx(sorted(right[:, 0, 0]), rel=1e-5)
    assert (wrong["the template's keypoints"] == CANONICAL_KEYPOINTS).all()


def test_shrunk_crops_lose_detail(study):
    noise = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3)).astype(np.uint8)
    shrunk = study["study_tests"].shrink(noise, 16)
    assert shrunk.shape == noise.shape and shrunk.std() < 0.3 * noise.std()
    flat = np.full((1, 112, 112, 3), 77, np.uint8)
    assert (study["study_tests"].shrink(flat, 16) == 77).all()


@pytest.fixture
def pairs_file(tmp_path):
    """Twenty pairs of three crops, the last as like the first as can be."""
    crops = np.random.default_rng(1).integers(0, 256, (3, 112, 112, 3)).astype(np.uint8)
    rows = np.array([[0, 0], [0, 1], [2, 2], [1, 2]] * 5)
    files = [encode_jpeg(crops[row]) for row in rows.reshape(-1)]
    write_verification_bin(tmp_path / "drawn_val_aligned.bin", files, rows[:, 0] == rows[:, 1])
    write_landmark_csv(tmp_path / "drawn_val_aligned_ldmk_5points.csv", np.tile(CANONICAL_KEYPOINTS, (40, 1, 1)))
    return tmp_path / "drawn_val_aligned.bin", rows


def test_each_crop_is_embedded_once_and_every_pair_scored(study, pairs_file):
    path, rows = pairs_file
    tested = study["study_tests"].SetOfPairs.open(path)
    assert len(tested.images) == 3 and (tested.pairs == rows).all()
    assert (tested.people == np.repeat(np.arange(20), 2).reshape(-1, 2)).all()

    def embed(images, keypoints):
        return images[:, :, ::16, ::16].flatten(1)

    accuracy, scores = study["study_tests"].measure(embed, [tested, tested], uses_keypoints=True)
    assert accuracy["drawn_val_aligned"] == 100.0
    assert scores["drawn_val_aligned"][tested.is_same] == pytest.approx(1.0)
    changes = {"rotation 30", "16 px", "keypoint noise 0.1", "the template's keypoints"}
    assert {f"drawn_val_aligned, {change}" for change in changes} <= accuracy.keys()
    assert (scores["drawn_val_aligned/is_same"] == tested.is_same).all()
    plain = study["study_tests"].measure(embed, [tested, tested], uses_keypoints=False)[0]
    assert "drawn_val_aligned, aligned first, keypoint noise 0.1" in plain.keys() - accuracy.keys()


def test_pairs_of_different_people_are_of_different_families(study):
    person = np.repeat(np.arange(6), 3)
    family = person // 2
    pairs, is_same = study["study_data"].draw_pairs(np.arange(18), person, family, 40)
    first, second = pairs.reshape(-1, 2).T
    assert (person[first] == person[second]).tolist() == is_same.tolist() and is_same.sum() == 20
    assert (family[first[~is_same]] != family[second[~is_same]]).all()
    assert (first != second).all()


@pytest.mark.parametrize("cut", ["whole", "box", "loose", "aligned"])
def test_keypoints_move_with_the_cut(study, cut):
    picture = np.zeros((170, 170, 3), np.uint8)
    landmarks_px = (CANONICAL_KEYPOINTS * 80 + 45).round().astype(np.float32)
    for x, y in landmarks_px:
        cv2.circle(picture, (int(x), int(y)), 3, (255, 255, 255), -1)
    box = np.array([50.0, 40.0, 120.0, 130.0])
    loose = functools.partial(study["study_data"].loose, rng=np.random.default_rng(5))
    crop, keypoints = {**study["study_data"].CUTS, "loose": loose}[cut](picture, box, landmarks_px)
    assert crop.shape == (112, 112, 3)
    for x, y in keypoints * 112 - 0.5:
        assert crop[round(float(y)), round(float(x))].min() > 150


def result(study, name, seed, right, part="real"):
    """A run that judges the first ``right`` of 20 pairs rightly, of ten people."""
    is_same = np.arange(20) % 2 == 0
    judged = np.where(np.arange(20) < right, is_same, ~is_same)
    people = np.stack([np.arange(20) // 2, np.where(is_same, np.arange(20) // 2, (np.arange(20) // 2 + 1) % 10)], 1)
    run = {"part": part, "name": name, "seed": seed, "keypoints": {}, "tables": None, "loss": 1.0,
           "accuracy": {"val": 5.0 * right, "val, rotation 30": 60.0}}  # fmt: skip
    extra = "the template's keypoints" if name.startswith("KPRPE") else "aligned first"
    run["accuracy"][f"val, {extra}"] = 33.0
    scores = {"val": np.where(judged, 0.9, -0.9), "val/is_same": is_same, "val/people": people}
    return study["kprpe_study_report"].Result(run, {**scores, "val, rotation 30": scores["val"]})


def test_mean_and_deviation_over_seeds(study):
    report = study["kprpe_study_report"]
    runs = [result(study, "ViT", 0, 14), result(study, "ViT", 1, 16)]
    assert report.accuracies(runs, "ViT")["val"] == pytest.approx((75.0, 50**0.5, 2))
    assert str(report.spread([70.0])) == "70.0" and str(report.spread([70.0, 72.0])) == "71.0 +- 1.4"


def test_gains_compare_the_same_seeds_and_draw_people(study):
    report = study["kprpe_study_report"]
    runs = [result(study, "ViT", 0, 10), result(study, "ViT", 2, 20), result(study, "KPRPE x30", 0, 20)]
    found, low, high = report.gain(runs, "KPRPE x30", "ViT", "val")
    assert found.count == 1 and found.mean > 20
    assert low < found.mean < high and low < high
    same, low, high = report.gain([*runs, result(study, "KPRPE x30", 2, 20)], "KPRPE x30", "KPRPE x30", "val")
    assert (same.mean, low, high) == (0, 0, 0)


def test_report_files(study, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    report = study["kprpe_study_report"]
    for name in ("ViT lr 0.002", "KPRPE x30"):
        for seed in (0, 1):
            one = result(study, name, seed, 14 + seed)
            folder = tmp_path / "real" / f"{name}{seed}"
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps(one.run))
            np.savez(folder / "scores.npz", **one.scores)
    monkeypatch.setattr(sys, "argv", ["report", "--out", str(tmp_path)])
    report.main()
    text = capsys.readouterr().out
    assert "72.5 +- 3.5" in text and "+0.0 +- 0.0 (+0.0 to +0.0)" in text
    assert "| as they are | 72.5 +- 3.5 | 33.0 +- 0.0 | 72.5 +- 3.5 |" in text
    assert "| the template's keypoints |  |  | 33.0 +- 0.0 |" in text
    assert {"report.md", "report.json", "curves_real.png"} <= {path.name for path in tmp_path.iterdir()}


def test_runs_of_all_parts_have_folders_of_their_own(study):
    parts = study["kprpe_study"].PARTS
    runs = {run for part in parts.values() for run in map(repr, part)}
    folders = {run.folder for part in parts.values() for run in part}
    assert len(folders) == len(runs)
