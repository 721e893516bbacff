"""Tables, JSON and curves of results; hardest pairs and the sheet that shows them."""

from __future__ import annotations

import json
import sys

import cv2
import numpy as np
import pytest

from insightface_kprpe.contact_sheet import CELL, arrange, face_cell
from insightface_kprpe.evaluation.curves import cmc_points, equal_error_rate, plot_roc, roc_points, thinned
from insightface_kprpe.evaluation.hardest import hardest_pairs, write_hardest_pairs
from insightface_kprpe.evaluation.metrics import tpr_at_fpr
from insightface_kprpe.evaluation.report import check_report_folder, format_markdown, format_text, grid, write_report
from insightface_kprpe.evaluation.result import Result
from insightface_kprpe.evaluation.search import Matches


def draw_scores(count=3000, seed=0, steps=None):
    rng = np.random.default_rng(seed)
    labels = rng.random(count) < 0.3
    scores = rng.normal(size=count) + 2 * labels
    return (scores if steps is None else np.round(scores * steps) / steps), labels


@pytest.fixture
def results():
    curve = roc_points(*draw_scores())
    settings = {"alignment": "five points", "flip": "added", "fusion": "average", "images": 469_375}
    return [
        Result(
            "kprpe",
            "IJB-C 1:1",
            {"tpr_at_fpr_1e-06": 0.90314, "tpr_at_fpr_0.0001": 0.971, "thresh_at_fpr_0.0001": 0.31234},
            settings,
            "average",
            curve,
        ),
        Result(
            "kprpe",
            "IJB-C 1:1",
            {"tpr_at_fpr_1e-06": np.float64("nan"), "tpr_at_fpr_0.0001": 0.97256, "thresh_at_fpr_0.0001": np.inf},
            settings | {"fusion": "landmark"},
            "landmark",
            curve,
        ),
        Result(
            "kprpe", "TinyFace", {"rank_1": 0.758, "rank_5": 0.7849, "probes": 3728}, cmc=np.linspace(0.75, 0.9, 20)
        ),
        Result("r100", "TinyFace", {"rank_1": 0.68}, cmc=np.linspace(0.68, 0.85, 20)),
    ]


def test_text(results):
    text = format_text(results)
    assert text == "\n".join(
        [
            "IJB-C 1:1",
            "+-------+----------+---------------+----------------+",
            "| model | variant  | TPR@FPR=1e-06 | TPR@FPR=0.0001 |",
            "+-------+----------+---------------+----------------+",
            "| kprpe | average  |         90.31 |          97.10 |",
            "| kprpe | landmark |             - |          97.26 |",
            "+-------+----------+---------------+----------------+",
            "Cosine thresholds",
            "+-------+----------+---------------+",
            "| model | variant  | at FPR=0.0001 |",
            "+-------+----------+---------------+",
            "| kprpe | average  |        0.3123 |",
            "| kprpe | landmark |          none |",
            "+-------+----------+---------------+",
            "  alignment: five points",
            "  flip: added",
            "  fusion (average): average",
            "  fusion (landmark): landmark",
            "  images: 469375",
            "",
            "TinyFace",
            "+-------+--------+--------+--------+",
            "| model | rank-1 | rank-5 | probes |",
            "+-------+--------+--------+--------+",
            "| kprpe |  75.80 |  78.49 |   3728 |",
            "| r100  |  68.00 |      - |      - |",
            "+-------+--------+--------+--------+",
        ]
    )


def test_markdown(results):
    text = format_markdown(results)
    assert "## IJB-C 1:1\n\n| model | variant | TPR@FPR=1e-06 | TPR@FPR=0.0001 |\n| --- | --- | ---: | ---: |\n" in text
    assert "\n| kprpe | landmark | - | 97.26 |\n\nCosine thresholds\n\n| model" in text
    assert "- fusion (average): average\n- fusion (landmark): landmark\n" in text
    assert text.endswith("| kprpe | 75.80 | 78.49 | 3728 |\n| r100 | 68.00 | - | - |\n")
    assert "| a/b | 1 |" in format_markdown([Result("a|b", "p", {"pairs": 1})])


def test_metrics_of_galleries_and_unknown_ones():
    text = format_text([Result("m", "p", {"G1 tpir_at_fpir_0.01": 0.5, "G1 rank_10": 0.6, "fold_std": 0.01})])
    assert "| model | G1 TPIR@FPIR=0.01 | G1 rank-10 | fold std |" in text


def test_settings_that_differ_name_their_results():
    results = [
        Result(model, "p", {}, {"flip": "added", "crop": crop}) for model, crop in zip("abc", "xyx", strict=True)
    ]
    assert format_text(results).splitlines()[1:] == ["  flip: added", "  crop (a; c): x", "  crop (b): y"]


def test_grid_needs_rows_of_one_length():
    with pytest.raises(ValueError, match="zip"):
        grid([["a", "b"], ["c"]])


def test_report_files(results, tmp_path):
    folder = tmp_path / "new" / "report"
    files = write_report(results, folder)
    names = ["report.txt", "report.md", "report.json"]
    names += ["roc_ijb_c_1_1.png", "det_ijb_c_1_1.png", "cmc_tinyface.png"]
    assert files == [folder / name for name in names] and sorted(folder.iterdir()) == sorted(files)
    assert (folder / "report.txt").read_text() == format_text(results) + "\n"
    assert (folder / "report.md").read_text() == format_markdown(results)
    document = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)["results"]
    assert document[0]["metrics"]["tpr_at_fpr_1e-06"] == 90.314 and document[0]["settings"]["images"] == 469_375
    assert document[1]["metrics"] == {
        "tpr_at_fpr_1e-06": None,
        "tpr_at_fpr_0.0001": 97.256,
        "thresh_at_fpr_0.0001": None,
    }
    np.testing.assert_allclose(document[0]["roc"]["tpr"], results[0].roc[1])
    np.testing.assert_allclose(document[3]["cmc"], 100 * results[3].cmc)
    for name in names[3:]:
        picture = cv2.imread(str(folder / name))
        assert picture.shape == (777, 975, 3)
        blue, vermilion = (
            (np.abs(picture.astype(int) - color).max(-1) < 8).sum() for color in ((178, 114, 0), (0, 94, 213))
        )
        assert blue > 300 and vermilion > 300  # two curves
    with pytest.raises(ValueError, match="at least one result"):
        write_report([], folder)


def test_without_matplotlib_tables_are_written(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[plots\]"):
        write_report(results, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.txt"]
    assert len(write_report([Result("m", "p", {"accuracy": 0.99})], tmp_path)) == 3


def test_what_a_report_needs_is_checked_before(tmp_path, monkeypatch):
    check_report_folder(tmp_path / "new" / "report")
    assert not list((tmp_path / "new" / "report").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        check_report_folder(tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[plots\]"):
        check_report_folder(tmp_path)


def test_curves_of_perfect_and_single_point_results(tmp_path):
    perfect = roc_points([0.9, 0.8, 0.1], [1, 1, 0])
    np.testing.assert_array_equal(perfect, [[0, 1], [1, 1]])
    results = [Result(f"model {n}", "p", {}, roc=perfect, cmc=np.array([1.0])) for n in range(9)]
    assert len(write_report(results, tmp_path)) == 6


@pytest.mark.parametrize("steps", [None, 10])
def test_roc_points_are_exact(steps):
    scores, labels = draw_scores(steps=steps)
    fpr, tpr = roc_points(scores, labels, 200)
    assert len(fpr) <= 201 and (np.diff(fpr) > 0).all() and (np.diff(tpr) >= 0).all()
    assert fpr[0] == 0 and fpr[-1] == tpr[-1] == 1
    points = tpr_at_fpr(scores, labels, np.minimum(fpr + 1e-12, 1))  # the highest TPR that goes with each rate
    np.testing.assert_allclose(fpr, [point.fpr for point in points], atol=1e-12)
    np.testing.assert_allclose(tpr, [point.tpr for point in points], atol=1e-12)
    if steps is None:  # the strict end is complete
        np.testing.assert_allclose(fpr[:20] * (~labels).sum(), np.arange(20))


def test_thinned_keeps_the_strict_end():
    fpr = np.arange(1_000_001) / 1_000_000
    tpr = np.sqrt(fpr)
    thin_fpr, thin_tpr = thinned(fpr, tpr)
    assert len(thin_fpr) <= 2000 and thin_fpr[0] == 0 and thin_fpr[-1] == 1
    np.testing.assert_allclose(thin_fpr[:60] * 1e6, np.arange(60))
    np.testing.assert_allclose(thin_tpr, np.sqrt(thin_fpr))
    assert np.diff(np.log(thin_fpr[60:])).max() < 0.02
    assert thinned(fpr[:5], tpr[:5])[0].tolist() == fpr[:5].tolist()
    repeated = np.repeat([0.0, 0.01, 1.0], 1000)  # many points at one rate: the last is the highest
    assert thinned(repeated, np.linspace(0, 1, 3000), 50)[1][1:-1] == pytest.approx([999 / 2999, 1999 / 2999])


def test_equal_error_rate_and_cmc():
    assert equal_error_rate([0, 0.1, 1], [0.5, 0.9, 1]) == pytest.approx(0.1)
    matches = Matches(np.ones(5), np.zeros(5), np.array([1, 3, 1, 2, 0]))
    np.testing.assert_allclose(cmc_points(matches, 4), [0.5, 0.75, 1, 1])


def test_plot_needs_a_folder_that_can_be_made(results, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        plot_roc(results[:1], tmp_path / "file" / "roc.png")


def test_hardest_pairs():
    scores = np.array([0.9, 0.2, 0.8, 0.1, 0.5, 0.9, -0.3])
    is_same = np.array([1, 1, 0, 0, 0, 0, 1])
    found = hardest_pairs(scores, is_same, 2)
    assert found.false_accepts.tolist() == [5, 2] and found.false_rejects.tolist() == [6, 1]
    assert hardest_pairs(scores, is_same, 99).false_accepts.tolist() == [5, 2, 4, 3]
    tied = hardest_pairs(np.zeros(7), is_same, 2)
    assert tied.false_accepts.tolist() == [2, 3] and tied.false_rejects.tolist() == [0, 1]
    with pytest.raises(ValueError, match="1 or more pairs"):
        hardest_pairs(scores, is_same, 0)
    with pytest.raises(ValueError, match="positive ones only"):
        hardest_pairs(scores, np.ones(7), 1)
    with pytest.raises(ValueError, match="finite"):
        hardest_pairs(scores * np.nan, is_same, 1)


def test_sheet_of_hardest_pairs(tmp_path):
    images = [np.full((112, 112, 3), (n, 0, 255 - n), np.uint8) for n in range(0, 200, 20)]  # RGB
    scores, is_same = np.array([0.1, 0.9, 0.2, 0.8, 0.3]), np.array([1, 1, 1, 0, 0])
    keypoints = np.full((10, 5, 2), 0.5)
    read = []

    def reader(index):
        read.append(index)
        return images[index]

    pairs = np.arange(10).reshape(5, 2)
    found = write_hardest_pairs(tmp_path / "sheet.png", reader, pairs, scores, is_same, 2, columns=2)
    assert found.false_accepts.tolist() == [3, 4] and found.false_rejects.tolist() == [0, 2]
    assert sorted(read) == [0, 1, 4, 5, 6, 7, 8, 9]
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (24 + CELL), 4 * CELL, 3)
    order = [6, 7, 8, 9, 0, 1, 4, 5]  # false accepts, then false rejects
    for place, index in enumerate(order):
        row, column = divmod(place, 4)
        center = sheet[24 + CELL // 2 + row * (24 + CELL), column * CELL + CELL // 2]
        assert center.tolist() == images[index][0, 0, ::-1].tolist()
    plain = sheet.copy()
    write_hardest_pairs(tmp_path / "sheet.png", images, pairs, scores, is_same, 2, keypoints, columns=2)
    drawn = cv2.imread(str(tmp_path / "sheet.png"))
    assert drawn[24 + CELL // 2, CELL // 2].tolist() != plain[24 + CELL // 2, CELL // 2].tolist()
    with pytest.raises(ValueError, match=r"pairs must be \(5, 2\)"):
        write_hardest_pairs(tmp_path / "sheet.png", images, pairs[:4], scores, is_same)


def test_cells_and_captions():
    wide = np.full((10, 40, 3), (200, 100, 50), np.uint8)
    cell = face_cell(wide)
    assert cell.shape == (CELL, CELL, 3) and cell[CELL // 2, 5].tolist() == [50, 100, 200] and not cell[20].any()
    assert (face_cell(wide, caption="7  0.5")[CELL - 20 :] > 200).any()
    assert arrange([cell] * 3, 2).shape == (2 * CELL, 2 * CELL, 3) and not arrange([cell] * 3, 2)[CELL:, CELL:].any()
