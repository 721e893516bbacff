"""TinyFace identification against the reference numbers, and its file lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from insightface_kprpe.evaluation import tinyface
from insightface_kprpe.evaluation.tinyface import DISTRACTOR_ID, identification, read_tinyface


def test_golden(golden):
    truth = golden("tinyface.npz")
    result = identification(truth["probe"], truth["gallery"], truth["probe_id"], truth["gallery_id"])
    assert list(result) == ["rank_1", "rank_5", "rank_20"]
    np.testing.assert_allclose(list(result.values()), truth["rank_1_5_20"], rtol=1e-6)


def test_by_hand():
    gallery = np.eye(4)
    probe = np.array([[1, 0.5, 0, 0], [1, 0.5, 0, 0], [0, 0, 0, 1]])
    # The second probe's image comes second; the third's identity is not in the gallery and does not count.
    assert identification(probe, gallery, [10, 11, 12], [10, 11, -1, -2], ranks=(1, 2)) == {"rank_1": 0.5, "rank_2": 1}


def test_ties_count_against_the_mate_and_distractors_take_places():
    gallery = np.array([[1, 0], [1, 0], [1, 0.0], [0, 1]])
    result = identification(
        np.array([[1, 0.0], [1, 0]]), gallery, [5, 6], [5, DISTRACTOR_ID, DISTRACTOR_ID, 6], (1, 3, 4)
    )
    assert result == {"rank_1": 0, "rank_3": 0.5, "rank_4": 1}
    several = identification(np.array([[1, 0.2]]), gallery, [5], [5, 5, 5, 6], (1,))  # the best of three mates counts
    assert several == {"rank_1": 1}


def test_no_common_identity():
    with pytest.raises(ValueError, match="same identity labels"):
        identification(np.eye(2), np.eye(2), [1, 2], [3, 4])


def make_set(folder, suffix=".png"):
    for sub, names in {
        "Probe": ["3_1", "12_2"],
        "Gallery_Match": ["3_2", "12_1", "12_3"],
        "Gallery_Distractor": ["0", "1"],
    }.items():
        (folder / sub).mkdir(parents=True)
        for name in names:
            (folder / sub / (name + suffix)).touch()
        (folder / sub / "Thumbs.db").touch()


def test_reads_folders(tmp_path):
    make_set(tmp_path / "Testing_Set")
    found = read_tinyface(tmp_path)
    assert found.probe_ids.tolist() == [12, 3]
    assert [path.name for path in found.gallery_paths] == ["12_1.png", "12_3.png", "3_2.png", "0.png", "1.png"]
    assert found.gallery_ids.tolist() == [12, 12, 3, DISTRACTOR_ID, DISTRACTOR_ID]
    assert read_tinyface(tmp_path / "Testing_Set")[0] == found.probe_paths


@pytest.fixture
def lists(tmp_path):
    """A set whose .mat lists call .jpg what lies there as .png; the function writes a list again with other content."""
    savemat = pytest.importorskip("scipy.io").savemat
    make_set(tmp_path)

    def write(name, key, images, ids, **options):
        cells = np.array([[image] for image in images], dtype=object)
        content = {f"{key}_set": cells, f"{key}_ids": np.array(ids)[:, None]}
        savemat(tmp_path / f"{name}_img_ID_pairs.mat", content, **options)

    write("probe", "probe", ["12_2.jpg", "3_1.jpg"], [7, 3])  # the lists decide, not the names of the files
    write("gallery_match", "gallery", ["3_2.jpg", "12_1.jpg", "gone.jpg"], [3, 12, 12])
    return write


def test_reads_official_lists(lists, tmp_path):
    found = read_tinyface(tmp_path)
    assert [path.name for path in found.probe_paths] == ["12_2.png", "3_1.png"]
    assert found.probe_ids.tolist() == [7, 3] and found.probe_ids.dtype == np.int64
    assert [path.name for path in found.gallery_paths] == ["3_2.png", "12_1.png", "gone.jpg", "0.png", "1.png"]
    assert found.gallery_ids.tolist() == [3, 12, 12, DISTRACTOR_ID, DISTRACTOR_ID]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"gallery_set": [["12_2.jpg"]], "gallery_ids": [12]}, "probe_set and probe_ids not found"),
        ({"probe_set": [["12_2.jpg"], ["3_1.jpg"]], "probe_ids": [12]}, "one identity per image, got 1 for 2"),
        ({"probe_set": [["12_2.jpg"], [7]], "probe_ids": [12, 3]}, "probe_set must be a cell array"),
        ({"probe_set": [["12_2.jpg"], ["3_1.jpg"]], "probe_ids": [12, 3.5]}, "probe_ids must be whole numbers"),
        ({"probe_set": [["12_2.jpg"], ["3_1.jpg"]], "probe_ids": [12, float("nan")]}, "must be whole numbers"),
    ],
)
def test_list_that_does_not_fit(monkeypatch, variables, message):
    """What SciPy gives of a file, without its start-up time."""
    monkeypatch.setattr(tinyface, "_PRINT_MAT", f"print({json.dumps(json.dumps(variables))})")
    with pytest.raises(ValueError, match=rf"probe\.mat is not a list .*: .*{message}"):
        tinyface._read_mat_list(Path("probe.mat"), "probe_set", "probe_ids")


def test_lists_equal_what_scipy_reads(lists, tmp_path):
    names, ids = [f"{'é' * (n % 2)}{n}_{n * n}.jpg" for n in range(300)], np.arange(300) * 977
    for values, compressed in ((ids, False), ((ids % 200).astype(np.uint8), True)):
        lists("probe", "probe", names, values, do_compression=compressed)
        found = tinyface._read_mat_list(tmp_path / "probe_img_ID_pairs.mat", "probe_set", "probe_ids")
        expected = pytest.importorskip("scipy.io").loadmat(tmp_path / "probe_img_ID_pairs.mat")
        assert found[0] == [str(cell[0]) for cell in expected["probe_set"].ravel()] == names
        assert found[1].tolist() == expected["probe_ids"].ravel().tolist()


def test_a_list_that_takes_for_ever_is_given_up(monkeypatch):
    monkeypatch.setattr(tinyface, "_PRINT_MAT", "import time; time.sleep(600)")
    monkeypatch.setattr(tinyface, "_MAT_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"probe\.mat could not be read in 0\.1 seconds"):
        tinyface._read_mat_list(Path("probe.mat"), "probe_set", "probe_ids")


def test_damaged_lists_are_named(lists, tmp_path):
    path = tmp_path / "probe_img_ID_pairs.mat"
    whole = path.read_bytes()
    crashing = whole[:144] + b"\6" + whole[145:]  # SciPy reads where there is no memory
    for damaged in (whole[:-9], crashing):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"probe_img_ID_pairs\.mat is not a list in MATLAB's format"):
            tinyface._read_mat_list(path, "probe_set", "probe_ids")


def test_lists_name_the_extra_that_they_need(lists, tmp_path, monkeypatch):
    monkeypatch.setattr(tinyface.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[tinyface\]"):
        read_tinyface(tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images"):
        read_tinyface(tmp_path)
    make_set(tmp_path)
    (tmp_path / "Probe" / "face.png").touch()
    with pytest.raises(ValueError, match="must be ID_n"):
        read_tinyface(tmp_path)


def test_real_layout(shared):
    found = read_tinyface(shared / "data" / "faces" / "tinyface")
    assert len(found.probe_paths) == len(found.probe_ids) == 580
    assert len(found.gallery_paths) == len(found.gallery_ids) == 850
    assert set(found.probe_ids) <= set(found.gallery_ids)
    assert (found.gallery_ids == DISTRACTOR_ID).sum() == 600
