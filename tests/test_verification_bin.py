"""Verification sets: every way of writing them is read, and no pickle gets to run anything."""

import os
import pickle
import struct

import cv2
import numpy as np
import pytest

from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.verification_bin import read_verification_bin, write_verification_bin
from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS

IMAGES = [cv2.imencode(".jpg", np.full((112, 112, 3), value, np.uint8))[1].tobytes() for value in (0, 80, 160, 240)]
IS_SAME = [True, False]


def check(path):
    pairs = read_verification_bin(path)
    assert pairs.images == IMAGES
    assert pairs.is_same.dtype == bool
    assert pairs.is_same.tolist() == IS_SAME
    return pairs


@pytest.mark.parametrize(("name", "pairs"), [("ytf_val", 1200), ("ytf_val_unaligned", 800)])
def test_real_sets(shared, name, pairs):
    found = read_verification_bin(shared / "data" / "faces" / f"{name}.bin")
    assert found.name == name
    assert len(found.images) == 2 * pairs
    assert found.is_same.sum() == pairs // 2
    for i in (0, pairs, 2 * pairs - 1):
        image = found.image(i)
        assert image.shape == (112, 112, 3) and image.dtype == np.uint8
        assert image[..., 0].mean() > image[..., 2].mean()  # skin is red, not blue


def test_round_trip(tmp_path):
    write_verification_bin(tmp_path / "mine.bin", IMAGES, np.array(IS_SAME))
    pairs = check(tmp_path / "mine.bin")
    assert pairs.name == "mine"
    assert (pairs.image(2) == 160).all()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.bin"]


def test_insightface_reads_what_is_written(tmp_path):
    write_verification_bin(tmp_path / "mine.bin", IMAGES, IS_SAME)
    with open(tmp_path / "mine.bin", "rb") as file:
        images, is_same = pickle.load(file, encoding="bytes")  # as its loaders do
    assert images == IMAGES and is_same == IS_SAME
    assert all(type(image) is bytes for image in images) and all(type(answer) is bool for answer in is_same)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "image_type", [bytes, bytearray, lambda b: np.frombuffer(b, np.uint8), lambda b: np.array(list(b), np.uint8)]
)
@pytest.mark.parametrize("answer_type", [list, np.array, lambda a: list(np.array(a)), lambda a: list(map(int, a))])
def test_every_protocol_and_type(tmp_path, protocol, image_type, answer_type):
    content = [image_type(image) for image in IMAGES], answer_type(IS_SAME)
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content, protocol))
    check(tmp_path / "a.bin")


def python2_string(data: bytes) -> bytes:
    return b"T" + len(data).to_bytes(4, "little") + data  # BINSTRING


def python2_array(data: bytes) -> bytes:
    """What ``cPickle.dumps(numpy.frombuffer(data, 'u1'), 2)`` of Python 2 holds."""
    dtype = b"cnumpy\ndtype\n" + b"(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return array + b"(K\x01(J" + len(data).to_bytes(4, "little") + b"t" + dtype + b"\x89" + python2_string(data) + b"tb"


@pytest.mark.parametrize("item", [python2_string, python2_array])
def test_python2(tmp_path, item):
    content = b"\x80\x02](" + b"".join(item(image) for image in IMAGES) + b"e](\x88\x89e\x86."
    (tmp_path / "old.bin").write_bytes(content)
    check(tmp_path / "old.bin")


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch attacked",), r"\w+\.system"),
        (eval, ("open('attacked', 'w')",), r"\w+\.eval"),
        (getattr, (os, "system"), r"\w+\.getattr"),
        (np.load, ("x",), r"numpy.*\.load"),
    ],
)
def test_forbidden_globals_are_named_and_not_called(tmp_path, monkeypatch, protocol, function, arguments, name):
    monkeypatch.chdir(tmp_path)
    arguments = tuple("os" if argument is os else argument for argument in arguments)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(([Attack(function, *arguments)], [True]), protocol))
    with pytest.raises(ValueError, match=rf"evil\.bin is not a verification set: it asks for {name}, which"):
        read_verification_bin(tmp_path / "evil.bin")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("call", [(bytes, 1 << 40), (bytearray, 1 << 40)])
def test_allowed_names_do_only_what_is_needed(tmp_path, call):
    (tmp_path / "bomb.bin").write_bytes(pickle.dumps(([Attack(*call)], [True]), 2))
    with pytest.raises(ValueError, match=r"bomb\.bin .* bytes cannot come from int"):
        read_verification_bin(tmp_path / "bomb.bin")


def test_a_file_that_numbers_its_objects_by_millions_takes_no_memory_for_them(tmp_path):
    resource = pytest.importorskip("resource")
    write_verification_bin(tmp_path / "a.bin", [b"a", b"b"], [True])
    whole = (tmp_path / "a.bin").read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[:-1] + b"r" + struct.pack("<I", 1 << 26) + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_verification_bin(tmp_path / "a.bin").images == [b"a", b"b"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB; pickle's own takes 1 GiB


def test_truncated_file_at_any_place(tmp_path):
    write_verification_bin(tmp_path / "whole.bin", IMAGES, IS_SAME)
    content = (tmp_path / "whole.bin").read_bytes()
    for end in [0, 1, 2, *range(3, len(content), 53), len(content) - 1]:
        (tmp_path / "cut.bin").write_bytes(content[:end])
        with pytest.raises(ValueError, match=r"cut\.bin is not a verification set"):
            read_verification_bin(tmp_path / "cut.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "expected a pair .* got dict"),
        ((IMAGES, IS_SAME, 1), "expected a pair"),
        ((IMAGES[:3], IS_SAME), "two images per is_same, got 3 and 2"),
        (([], []), "two images per is_same, got 0 and 0"),
        ((7, IS_SAME), "images must be a list, got int"),
        (([b"", *IMAGES[1:]], IS_SAME), "image 0 must be a compressed image"),
        (([*IMAGES[:3], "text"], IS_SAME), "image 3 must be a compressed image as bytes, got 'text'"),
        ((IMAGES, [True, 2]), "is_same must be a list of True and False"),
        ((IMAGES, np.array([0.0, 1.0])), "expected True and False, got an array of 'f8'"),
    ],
)
def test_wrong_structure(tmp_path, content, message):
    (tmp_path / "a.bin").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match=rf"a\.bin.*{message}"):
        read_verification_bin(tmp_path / "a.bin")


def test_damaged_image_is_named_when_asked_for(tmp_path):
    write_verification_bin(tmp_path / "a.bin", [*IMAGES[:3], IMAGES[3][:-40]], IS_SAME)
    pairs = read_verification_bin(tmp_path / "a.bin")
    assert pairs.image(0).shape == (112, 112, 3)
    with pytest.raises(ValueError, match="set a: image 3: the JPEG is truncated"):
        pairs.image(3)


def test_bad_sets_are_not_written(tmp_path):
    for images, is_same in ((IMAGES, [True]), (IMAGES[:1], IS_SAME), ([], [])):
        with pytest.raises(ValueError, match="two images per is_same"):
            write_verification_bin(tmp_path / "a.bin", images, is_same)
    with pytest.raises(ValueError, match="image 1 must be a compressed image as bytes"):
        write_verification_bin(tmp_path / "a.bin", [IMAGES[0], np.zeros((112, 112, 3))], [True])
    assert not list(tmp_path.iterdir())


def test_the_share_of_faces_without_landmarks_is_told(tmp_path):
    image = cv2.imencode(".png", np.zeros((112, 112, 3), np.uint8))[1].tobytes()
    write_verification_bin(tmp_path / "pairs.bin", [image] * 4, [True, False])
    keypoints = np.tile(CANONICAL_KEYPOINTS, (4, 1, 1)) + 0.01
    write_landmark_csv(tmp_path / "pairs_ldmk_5points.csv", keypoints)
    assert open_verification(str(tmp_path / "pairs.bin")).keypoint_source == "pairs_ldmk_5points.csv"
    keypoints[1] = 0
    write_landmark_csv(tmp_path / "pairs_ldmk_5points.csv", keypoints)
    pairs = open_verification(str(tmp_path / "pairs.bin"))
    assert pairs.keypoint_source == "pairs_ldmk_5points.csv, the canonical template for 1 of 4"
    np.testing.assert_allclose(pairs.keypoints[1], CANONICAL_KEYPOINTS)
