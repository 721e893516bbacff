import json
import sys

import cv2
import numpy as np
import pytest
import torch

from insightface_kprpe.data.landmark_dataset import LandmarkDataset
from insightface_kprpe.evaluation.landmarks import (
    POINT_NAMES,
    evaluate_landmarks,
    nme,
    plot_curves,
    robustness,
    summarize,
    write_report,
)


@pytest.fixture
def dataset(tmp_path):
    """Three faces of one size in one noise image; a face's points are fixed fractions of its box."""
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "p.png"), rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    lines = ["# p.png"]
    for x, y in ((20, 30), (100, 80), (150, 120)):
        points = [
            (x + fx * 80, y + fy * 100) for fx, fy in ((0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8))
        ]
        lines.append(" ".join(map(str, (x, y, 80, 100, *(v for point in points for v in (*point, 0.0)), 0.5))))
    (tmp_path / "label.txt").write_text("\n".join([*lines, "5 5 40 40"]) + "\n")
    return LandmarkDataset(tmp_path, labeled_only=True)


@pytest.fixture
def truth(dataset):
    """A model that knows where the points of these faces are in their standard crop."""
    keypoints = dataset[0].keypoints

    def predict(images):
        assert images.shape[1:] == (3, 160, 160) and images.abs().max() <= 1
        return keypoints.expand(len(images), 5, 2), torch.full((len(images),), 0.75)

    return predict


def test_nme_of_known_errors():
    truth = np.zeros((2, 5, 2)) + 50
    keypoints = truth.copy()
    keypoints[0, 2] += (3, 4)
    keypoints[1] += (0, 10)
    errors = nme(keypoints, truth, np.array([[0, 0, 25, 100], [10, 10, 110, 110]]))
    np.testing.assert_allclose(errors, [[0, 0, 0.1, 0, 0], [0.1] * 5])
    result = summarize(errors, np.array([0.5, 1.0]))
    assert result.nme == pytest.approx(0.06) and result.score == 0.75 and result.images == 2
    np.testing.assert_allclose(result.point_errors, [0.05, 0.05, 0.1, 0.05, 0.05])
    assert result.failure_rate == 0  # 0.1 itself is not a failure
    assert result.curve[0] == 0 and result.curve[30] == 0.5 and result.curve[-1] == 1
    assert result.auc == pytest.approx(0.405, abs=0.005)


def test_failures_and_nothing_wrong():
    boxes = np.tile([0.0, 0, 1, 1], (4, 1))
    errors = nme(np.zeros((4, 5, 2)), np.full((4, 5, 2), [0.3, 0.0]), boxes)
    assert summarize(errors, np.ones(4)).failure_rate == 1 and summarize(errors, np.ones(4)).auc == 0
    assert summarize(errors * 0, np.ones(4)).auc == 1


def test_evaluation_takes_any_callable(dataset, truth):
    result = evaluate_landmarks(truth, dataset, batch_size=2)
    assert result.nme < 1e-6 and result.images == 3 and result.score == 0.75
    arrays = evaluate_landmarks(lambda images: tuple(value.numpy() + 0.1 for value in truth(images)), dataset)
    x1, y1, x2, y2 = dataset[0].bbox
    assert arrays.nme == pytest.approx(float(0.1 * 2**0.5 / ((x2 - x1) * (y2 - y1)).sqrt()), rel=1e-4)


def test_robustness_degrades_and_recrops(dataset, truth):
    seen = []

    def predict(images):
        seen.append(images)
        return truth(images)

    table = robustness(predict, dataset, batch_size=3)
    names = list(table)
    assert names[0] == "clean" and {"blur 2 px", "down-sampled to 16 px", "rotated -15 degrees"} <= set(names)
    clean, by_name = seen[0], dict(zip(names, seen, strict=True))
    assert by_name["blur 4 px"].std() < 0.5 * clean.std() and by_name["down-sampled to 24 px"].std() < 0.5 * clean.std()
    # this model does not look: it is right about images that only got worse, wrong where the crop moved
    assert table["blur 4 px"].nme < 1e-6
    shifted = table["shifted x +20%, y +20%"].nme
    box = dataset[0].bbox
    assert shifted == pytest.approx(float(0.2 * 2**0.5 / (box[2:] - box[:2]).prod().sqrt()), rel=1e-3)
    assert table["rotated +15 degrees"].nme > 0.03 and dataset.rotation == 0


def test_report(dataset, truth, tmp_path):
    results = {"good": evaluate_landmarks(truth, dataset), "other": evaluate_landmarks(truth, dataset)}
    write_report(results, tmp_path / "new" / "report", {"good": {"clean": results["good"]}})
    document = json.loads((tmp_path / "new" / "report" / "landmarks.json").read_text())
    assert document["models"]["good"]["nme"] < 1e-6 and list(document["robustness"]["good"]) == ["clean"]
    assert tuple(document["models"]["other"]["point_errors"]) == POINT_NAMES
    assert document["models"]["good"]["curve"][-1] == 100  # percent
    assert len(document["models"]["good"]["curve"]) == len(document["curve_thresholds"]) == 101
    assert cv2.imread(str(tmp_path / "new" / "report" / "landmarks.png")).shape[1] == 900
    assert len(list((tmp_path / "new" / "report").iterdir())) == 2


def test_curves_name_the_extra_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[plots\]"):
        plot_curves({}, tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


def test_bad_input():
    boxes, points = np.tile([0.0, 0, 1, 1], (2, 1)), np.zeros((2, 5, 2))
    with pytest.raises(ValueError, match=r"got \(2, 10\)"):
        nme(points.reshape(2, 10), points, boxes)
    with pytest.raises(ValueError, match="box 1 has none"):
        nme(points, points, boxes * [[1], [0]])
    with pytest.raises(ValueError, match="NaN or Inf for 1 of 2 faces"):
        nme(points + np.array([0, np.nan])[:, None, None], points, boxes)
