"""Landmark files: each row finds its image, and a wrong row is named."""

import numpy as np
import pytest

from insightface_kprpe.data.landmark_csv import read_keypoints, read_landmark_csv, write_landmark_csv
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, MIRROR_ORDER

HEADER = "idx," + ",".join(f"ldmk_{i}" for i in range(10))
ROW = "0.3,0.4,0.7,0.4,0.5,0.6,0.35,0.8,0.65,0.8"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rec/ldmk_5points.csv", 3820),
        ("ytf_val_ldmk_5points.csv", 2400),
        ("ytf_val_unaligned_ldmk_5points.csv", 1600),
    ],
)
def test_real_files(shared, name, count):
    path = shared / "data" / "faces" / name
    keypoints, scores = read_landmark_csv(path, count)
    assert keypoints.shape == (count, 5, 2) and keypoints.dtype == np.float32
    assert scores is None
    expected = np.loadtxt(path, delimiter=",", skiprows=1)[:, 1:]
    np.testing.assert_allclose(keypoints.reshape(count, 10), expected, atol=1e-7)
    assert (keypoints[:, :2, 1].mean(1) < keypoints[:, 3:, 1].mean(1)).mean() > 0.99  # eyes stand above mouths


@pytest.mark.parametrize("scored", [True, False])
def test_round_trip(tmp_path, scored):
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(-0.2, 1.2, (70000, 5, 2)).astype(np.float32)
    scores = rng.random(70000, dtype=np.float32) if scored else None
    write_landmark_csv(tmp_path / "a.csv", keypoints, scores)
    found, read_scores = read_landmark_csv(tmp_path / "a.csv", 70000)
    np.testing.assert_allclose(found, keypoints, atol=1e-6)
    assert (read_scores is None) is not scored
    if scored:
        assert read_scores.dtype == np.float32
        np.testing.assert_allclose(read_scores, scores, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_rows_are_placed_by_index(tmp_path):
    (tmp_path / "a.csv").write_text(f"{HEADER},score\n2,{ROW},0.2\n0,{ROW},0\n1,{ROW.replace('0.3,', '0.1,')},1\n")
    keypoints, scores = read_landmark_csv(tmp_path / "a.csv", 3)
    np.testing.assert_allclose(scores, [0, 1, 0.2])
    np.testing.assert_allclose(keypoints[:, 0, 0], [0.3, 0.1, 0.3])


def test_one_row_windows_line_ends_and_byte_order_mark(tmp_path):
    (tmp_path / "a.csv").write_bytes(f"\ufeff{HEADER}\r\n0,{ROW}\r\n".encode())
    keypoints, _ = read_landmark_csv(tmp_path / "a.csv", 1)
    np.testing.assert_allclose(keypoints[0, 4], [0.65, 0.8])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: columns must be idx,ldmk_0,"),
        (f"idx,{ROW}\n0,{ROW}\n", "line 1: columns must be"),
        (f"{HEADER},confidence\n0,{ROW},1\n", "line 1: columns must be .* got .*"),
        (f"{HEADER}\n", "must have rows for 2 images, got 0; idx 0 is missing"),
        (f"{HEADER}\n0,{ROW}\n", "must have rows for 2 images, got 1; idx 1 is missing"),
        (f"{HEADER}\n0,{ROW}\n0,{ROW}\n", "line 3: idx 0 is already in line 2"),
        (f"{HEADER}\n1,{ROW}\n2,{ROW}\n", r"line 3: idx must be in 0\.\.1, the image's index in its set, got 2"),
        (f"{HEADER}\n0,{ROW}\n-1,{ROW}\n", r"line 3: idx must be in 0\.\.1"),
        (f"{HEADER}\n0,{ROW}\n1,{ROW},0.5\n", "line 3: expected idx and 10 numbers, got '1,0.3"),
        (f"{HEADER}\n0,{ROW}\n1,0.3,0.4,0", "line 3: expected idx and 10 numbers, got '1,0.3,0.4,0'"),
        (f"{HEADER}\n0,{ROW}\n1.5,{ROW}\n", "line 3: expected idx and 10 numbers"),
        (f"{HEADER}\n0,{ROW}\n1,{ROW.replace('0.7', 'x')}\n", "line 3: expected idx and 10 numbers"),
        (f"{HEADER}\n0,{ROW}\n1,{ROW.replace('0.7', 'nan')}\n", "line 3: landmarks must be finite .* got 0.3 0.4 nan"),
        (f"{HEADER}\n0,{ROW}\n1,{ROW.replace('0.7', '-inf')}\n", "line 3: landmarks must be finite"),
        (f"{HEADER}\n0,38.3,51.7,73.5,51.5,56,71.7,41.5,92.4,70.7,92.2\n1,{ROW}\n", "line 2: .* divide pixels by"),
        (f"{HEADER},score\n0,{ROW},0.5\n1,{ROW},1.5\n", r"line 3: score must be in \[0, 1\], got 1.5"),
        (f"{HEADER},score\n0,{ROW},0.5\n1,{ROW},nan\n", r"line 3: score must be in \[0, 1\], got nan"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.csv: {message}"):
        read_landmark_csv(tmp_path / "a.csv", 2)


@pytest.mark.parametrize(
    ("keypoints", "scores", "message"),
    [
        (np.zeros((3, 10)), None, r"keypoints must be \(N, 5, 2\) and scores \(N,\), got \(3, 10\) and None"),
        (np.zeros((3, 5, 2)), np.zeros(2), r"got \(3, 5, 2\) and \(2,\)"),
        (np.zeros((3, 5, 2)), np.zeros((3, 1)), r"got \(3, 5, 2\) and \(3, 1\)"),
        (np.full((3, 5, 2), np.nan), None, "must be finite"),
        (np.full((3, 5, 2), 56.0), None, "divide pixels"),
        (np.zeros((3, 5, 2)), np.array([0, 1, 2]), "line 4: score must be"),
    ],
)
def test_bad_landmarks_are_not_written(tmp_path, keypoints, scores, message):
    with pytest.raises(ValueError, match=message):
        write_landmark_csv(tmp_path / "a.csv", keypoints, scores)
    assert not list(tmp_path.iterdir())


def test_numbers_that_say_unknown_are_named_and_replaced(tmp_path, caplog):
    face = CANONICAL_KEYPOINTS + 0.02
    rows = np.stack([face, np.zeros((5, 2)), np.full((5, 2), -1.0), face, np.full((5, 2), 0.5), face])
    write_landmark_csv(tmp_path / "a.csv", rows, np.array([1, 1, 1, 0.2, 1, 1]))
    keypoints, absent = read_keypoints(tmp_path / "a.csv", 6)
    assert absent.tolist() == [False, True, True, True, True, False]
    np.testing.assert_allclose(keypoints[absent], np.tile(CANONICAL_KEYPOINTS, (4, 1, 1)))
    np.testing.assert_allclose(keypoints[~absent], [face, face], atol=1e-6)
    assert caplog.messages == [
        f"{tmp_path / 'a.csv'}: 3 of 6 rows are not landmarks of a face (first: idx 1); the canonical template is used "
        "instead"
    ]


def test_left_and_right_exchanged_is_suspected(tmp_path, caplog):
    write_landmark_csv(tmp_path / "a.csv", np.tile(CANONICAL_KEYPOINTS[list(MIRROR_ORDER)], (3, 1, 1)))
    assert read_keypoints(tmp_path / "a.csv", 3)[1].all()
    assert "are left and right, as seen in the image, swapped in 3 of them?" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{HEADER}\n0,{ROW}\n1,{ROW}".encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
        (f"{HEADER},ë\n".encode("latin-1"), "line 1: byte 0xeb is not UTF-8"),
        (f"{HEADER}\n0,{ROW}\n1,ë{ROW}\n".encode("latin-1"), "line 3: expected idx and 10 numbers"),
        (b"\0" * 100, "line 1: columns must be"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv: {message}"):
        read_landmark_csv(tmp_path / "a.csv", 2)


def test_a_folder_in_the_place_of_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"must be a file \(landmark file\), got a folder"):
        read_landmark_csv(tmp_path, 2)
