"""TinyFace identification against the reference numbers, and its file lists."""

from __future__ import annotations

import numpy as np
import pytest

from insightface_kprpe.evaluation.tinyface import DISTRACTOR_ID, identification, read_tinyface


def test_golden(golden):
    truth = golden("tinyface.npz")
    result = identification(truth["probe"], truth["gallery"], truth["probe_id"], truth["gallery_id"])
    assert list(result) == ["rank_1", "rank_5", "rank_20"]
    np.testing.assert_allclose(list(result.values()), 100 * truth["rank_1_5_20"], rtol=1e-6)


def test_by_hand():
    gallery = np.eye(4)
    probe = np.array([[1, 0.5, 0, 0], [1, 0.5, 0, 0], [0, 0, 0, 1]])
    # The second probe's image comes second; the third's identity is not in the gallery and does not count.
    assert identification(probe, gallery, [10, 11, 12], [10, 11, -1, -2], ranks=(1, 2)) == {"rank_1": 50, "rank_2": 100}


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


def test_reads_official_lists(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    make_set(tmp_path)  # .png copies of what the lists call .jpg
    for name, key, images, ids in (
        ("probe", "probe", ["12_2.jpg", "3_1.jpg"], [12, 3]),
        ("gallery_match", "gallery", ["3_2.jpg", "12_1.jpg", "gone.jpg"], [3, 12, 12]),
    ):
        cells = np.array([[image] for image in images], dtype=object)
        savemat(tmp_path / f"{name}_img_ID_pairs.mat", {f"{key}_set": cells, f"{key}_ids": np.array(ids)[:, None]})
    found = read_tinyface(tmp_path)
    assert [path.name for path in found.probe_paths] == ["12_2.png", "3_1.png"]
    assert found.probe_ids.tolist() == [12, 3]
    assert [path.name for path in found.gallery_paths[:3]] == ["3_2.png", "12_1.png", "gone.jpg"]
    savemat(tmp_path / "probe_img_ID_pairs.mat", {"images": cells})
    with pytest.raises(ValueError, match=r"probe_set and probe_ids, got \['images'\]"):
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
