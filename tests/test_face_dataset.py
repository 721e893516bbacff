import logging

import cv2
import numpy as np
import pytest
import torch

from insightface_kprpe.data.face_dataset import open_faces, to_network_input
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    return [cv2.resize(rng.integers(0, 255, (7, 7, 3), dtype=np.uint8), (112, 112)) for _ in range(6)]


@pytest.fixture
def keypoints():
    return (CANONICAL_KEYPOINTS + np.random.default_rng(1).normal(0, 0.03, (6, 5, 2))).astype(np.float32).round(5)


@pytest.fixture
def folder(tmp_path, pictures):
    for i, picture in enumerate(pictures):
        person = tmp_path / "faces" / ("anna", "bert", "cleo")[i // 2]
        person.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(person / f"{i}.png"), picture[..., ::-1])
    (tmp_path / "faces" / "empty").mkdir()
    return tmp_path / "faces"


@pytest.fixture
def record(tmp_path, pictures):
    encoded = [cv2.imencode(".png", picture[..., ::-1])[1].tobytes() for picture in pictures]
    write_face_records(tmp_path / "rec" / "train", zip(encoded, [0, 0, 1, 1, 2, 2], strict=True))
    return tmp_path / "rec"


@pytest.mark.parametrize("kind", ["folder", "record"])
def test_images_labels_and_landmarks(kind, pictures, keypoints, request):
    path = request.getfixturevalue(kind)
    write_landmark_csv(path / "ldmk_5points.csv", keypoints)
    dataset = open_faces(path)
    assert len(dataset) == 6 and dataset.num_classes == 3
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for i, (image, label, points) in enumerate(dataset):
        assert image.shape == (3, 112, 112) and image.dtype == torch.uint8
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pictures[i])
        assert label == i // 2
        np.testing.assert_allclose(points, keypoints[i], atol=1e-5)
        if i == 5:
            break


def test_without_landmarks_the_template_and_one_warning(record, caplog):
    with caplog.at_level(logging.WARNING, "insightface_kprpe"):
        dataset = open_faces(record)
        points = [dataset[i][2] for i in range(3)]
        assert not caplog.messages  # not every network cares
        dataset.warn_without_landmarks()
        open_faces("synthetic", 2, 4).warn_without_landmarks()  # has them
    assert sum("canonical template" in message for message in caplog.messages) == 1
    np.testing.assert_allclose(points[2], CANONICAL_KEYPOINTS)


def test_other_sizes_are_resized(folder):
    cv2.imwrite(str(folder / "anna" / "0.png"), np.full((50, 50, 3), 77, np.uint8))
    image, _, _ = open_faces(folder)[0]
    assert image.shape == (3, 112, 112) and (image == 77).all()


def test_synthetic_people_are_the_same_each_time():
    first, second = open_faces("synthetic", 4, 12, seed=3), open_faces("synthetic", 4, 12, seed=3)
    assert len(first) == 12 and first.num_classes == 4
    for a, b in zip(first[5], second[5], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert not torch.equal(first[5][0], open_faces("synthetic", 4, 12, seed=4)[5][0])


def test_bad_sources_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match="does not exist"):
        open_faces(tmp_path / "nothing")
    with pytest.raises(ValueError, match="without images"):
        open_faces(folder / "empty")
    (folder / "bert" / "2.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"2\.png.*remove or replace"):
        open_faces(folder)[2]
    write_landmark_csv(folder / "ldmk_5points.csv", np.full((3, 5, 2), 0.5, np.float32))
    with pytest.raises(ValueError, match="6"):
        open_faces(folder)


def test_network_input_range():
    images = to_network_input(torch.tensor([0, 255], dtype=torch.uint8))
    assert images.tolist() == [-1.0, 1.0]
