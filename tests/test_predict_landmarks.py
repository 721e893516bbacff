import cv2
import numpy as np
import pytest
import torch
from distributed import run_on_ranks
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.data.crops import open_crops
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.landmark_csv import read_landmark_csv
from insightface_kprpe.data.record_writer import write_face_records
from insightface_kprpe.data.synthetic import SyntheticFaces
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.data.verification_pairs import open_verification
from insightface_kprpe.dfa import DFA
from insightface_kprpe.dfa.aligner import canonical_keypoints, fit_to_square
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS
from insightface_kprpe.inference import predicted_landmarks as landmarks
from insightface_kprpe.inference import stores
from insightface_kprpe.inference.predicted_landmarks import contact_sheet, predict_landmarks

COUNT = 10


class BrightFaces(DFA):
    """Finds a face in bright crops, and in dark ones something that it does not believe in itself."""

    def locate(self, images):
        keypoints, _, bbox = super().locate(images)
        brightness = fit_to_square(images, self.image_size).mean((1, 2, 3))
        return keypoints + 0.1 * brightness[:, None, None], (brightness + 1) / 2, bbox


@pytest.fixture(scope="module")
def dfa():
    torch.manual_seed(0)
    return BrightFaces().eval()


@pytest.fixture(scope="module")
def images():
    """Drawn faces, RGB, the odd ones dark."""
    faces = SyntheticFaces(COUNT, 1)
    return [np.clip(faces[i][0].astype(int) + (-90 if i % 2 else 60), 0, 255).astype(np.uint8) for i in range(COUNT)]


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def make(kind, folder, images):
    """A set of crops; returns what to open, and where its landmarks belong."""
    if kind == "bin":
        write_verification_bin(folder / "lfw.bin", [png(image) for image in images], [True] * (len(images) // 2))
        return folder / "lfw.bin", folder / "lfw_ldmk_5points.csv"
    if kind in ("rec", "rec file"):
        write_face_records(folder / "train", ((png(image), i // 2) for i, image in enumerate(images)))
        return folder if kind == "rec" else folder / "train.rec", folder / "ldmk_5points.csv"
    for i, image in enumerate(images):
        path = folder / (f"person{i // 2}/{i}.png" if kind == "people" else f"{i}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(image))
    return folder, folder / "ldmk_5points.csv"


def directly(dfa, image):
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        keypoints, score, _ = dfa.locate(tensor)
    return keypoints[0].numpy(), score.item()


@pytest.mark.parametrize("kind", ["rec", "rec file", "bin", "people", "images"])
def test_every_kind_of_source_gets_its_landmarks_beside_it(tmp_path, dfa, images, kind):
    source, expected = make(kind, tmp_path, images)
    file = predict_landmarks(open_crops(source), dfa, batch_size=4)
    assert file == expected
    keypoints, scores = read_landmark_csv(file, COUNT)
    for i, image in enumerate(images):
        points, score = directly(dfa, image)
        np.testing.assert_allclose(keypoints[i], points, atol=1e-5)
        assert scores[i] == pytest.approx(score, abs=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_data_sets_and_evaluators_use_what_is_believed(tmp_path, dfa, images):
    """And the template where the score is below the threshold."""
    (tmp_path / "rec").mkdir()
    found = []
    for source in (make("rec", tmp_path / "rec", images)[0], make("bin", tmp_path, images)[0]):
        keypoints, scores = read_landmark_csv(predict_landmarks(open_crops(source), dfa), COUNT)
        assert 0 < (scores < 0.5).sum() < COUNT
        found.append(np.where((scores >= 0.5)[:, None, None], keypoints, CANONICAL_KEYPOINTS))
    dataset = open_faces(tmp_path / "rec")
    np.testing.assert_allclose(np.stack([dataset[i][2] for i in range(COUNT)]), found[0])
    np.testing.assert_allclose(open_verification(str(tmp_path / "lfw.bin")).keypoints, found[1])


def test_crops_of_all_sizes_and_shapes(tmp_path, images):
    dfa = DFA().eval()
    sizes = [(112, 112), (50, 140), (300, 200), (1, 1), (2, 90), (160, 160), (33, 31), (64, 64), (17, 19), (112, 96)]
    crops = [cv2.resize(image, size) for image, size in zip(images, sizes, strict=True)]
    source, _ = make("images", tmp_path, crops)
    keypoints, scores = read_landmark_csv(predict_landmarks(open_crops(source), dfa), COUNT)
    for i, crop in enumerate(crops):
        points, score = directly(dfa, crop)
        np.testing.assert_allclose(keypoints[i], points, atol=1e-4)
        assert scores[i] == pytest.approx(score, abs=1e-4)


def test_landmarks_far_outside_a_narrow_crop_are_no_face():
    points, score = torch.full((5, 2), 0.1), torch.tensor(0.9)
    row = landmarks._row(points, score, 10, 200)  # x = -7.6 of the crop
    np.testing.assert_allclose(row[:10].reshape(5, 2), canonical_keypoints(10, 200))
    assert row[10] == 0
    assert landmarks._row(points, score, 200, 200)[10] == pytest.approx(0.9)


def test_an_existing_file_is_not_written_over(tmp_path, dfa, images):
    source, file = make("rec", tmp_path, images)
    file.write_text("by hand")
    with pytest.raises(ValueError, match="already exists"):
        predict_landmarks(open_crops(source), dfa)
    predict_landmarks(open_crops(source), dfa, tmp_path / "mine.csv")
    left = file.with_name(f".{file.name}.0123.parts")  # as by a kill after the file was written
    left.mkdir()
    with pytest.raises(ValueError, match="already exists"):
        predict_landmarks(open_crops(source), dfa)
    assert not left.exists()
    assert file.read_text() == "by hand" and (tmp_path / "mine.csv").is_file()


class Interrupted(Exception):
    pass


def interrupt_at(crops, index):
    def read(i):
        if i == index:
            raise Interrupted
        return crops.read(i)

    return crops._replace(read=read)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, dfa, images, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK", 3)
    crops = open_crops(make("images", tmp_path, images)[0])
    whole = read_landmark_csv(predict_landmarks(crops, dfa, tmp_path / "whole.csv"), COUNT)
    with pytest.raises(Interrupted):
        predict_landmarks(interrupt_at(crops, 7), dfa, tmp_path / "parts.csv", batch_size=2)
    assert not (tmp_path / "parts.csv").exists()
    read = []
    counting = crops._replace(read=lambda i: read.append(i) or crops.read(i))
    parts = read_landmark_csv(predict_landmarks(counting, dfa, tmp_path / "parts.csv"), COUNT)
    assert read == [6, 7, 8, 9]  # the third chunk again, and the fourth
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not list(tmp_path.glob(".*"))


def test_an_image_that_changed_meanwhile_is_looked_at_again(tmp_path, dfa, images, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK", 3)
    source, _ = make("images", tmp_path, images)
    crops = open_crops(source)
    with pytest.raises(Interrupted):
        predict_landmarks(interrupt_at(crops, 7), dfa)
    (source / "1.png").write_bytes(png(images[0]))
    keypoints, _ = read_landmark_csv(predict_landmarks(crops, dfa), COUNT)
    np.testing.assert_allclose(keypoints[1], directly(dfa, images[0])[0], atol=1e-5)


def test_other_weights_do_not_go_on(tmp_path, dfa, images, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK", 3)
    crops = open_crops(make("images", tmp_path, images)[0])
    with pytest.raises(Interrupted):
        predict_landmarks(interrupt_at(crops, 7), dfa)
    other = BrightFaces().eval()
    keypoints, _ = read_landmark_csv(predict_landmarks(crops, other), COUNT)
    np.testing.assert_allclose(keypoints[0], directly(other, images[0])[0], atol=1e-5)
    assert not list(tmp_path.glob(".*"))  # what the other weights left is gone too


def predict_on_rank(rank, folder, state):
    stores.BLOCK = 3
    predict_landmarks(open_crops(folder), BrightFaces(state), batch_size=2)
    return rank


@pytest.mark.slow
def test_ranks_share_the_work(tmp_path, dfa, images):
    crops = open_crops(make("images", tmp_path, images)[0])
    alone = read_landmark_csv(predict_landmarks(crops, dfa, tmp_path / "alone.csv"), COUNT)
    run_on_ranks(predict_on_rank, 2, tmp_path, dfa.state_dict())
    for found, expected in zip(read_landmark_csv(crops.landmark_file, COUNT), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_reader_processes(tmp_path, dfa, images):
    crops = open_crops(make("rec", tmp_path, images)[0])
    keypoints, _ = read_landmark_csv(predict_landmarks(crops, dfa, batch_size=3, num_workers=1), COUNT)
    np.testing.assert_allclose(keypoints[5], directly(dfa, images[5])[0], atol=1e-5)


@pytest.mark.parametrize(("name", "message"), [("absent", r"must be a \.rec or \.bin file"), ("", "which has neither")])
def test_bad_sources_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        open_crops(tmp_path / name)


def test_damaged_images_are_named(tmp_path, dfa, images):
    source, _ = make("images", tmp_path, images)
    (source / "4.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"4\.png.*remove or replace it"):
        predict_landmarks(open_crops(source), dfa)


def test_the_contact_sheet_shows_faces_with_their_points(tmp_path, images):
    crops = open_crops(make("images", tmp_path, [np.zeros((60, 120, 3), np.uint8)] * COUNT)[0])
    keypoints = np.broadcast_to(np.float32([[0.2, 0.3], [0.8, 0.3], [0.5, 0.5], [0.3, 0.8], [0.7, 0.8]]), (COUNT, 5, 2))
    sheet = contact_sheet(crops, keypoints, np.ones(COUNT), 5)
    cell = 144
    assert (
        sheet.shape == (2 * cell, 3 * cell, 3) and (sheet[cell:, 2 * cell :] == 0).all()
    )  # five faces, one free place
    for x, y in keypoints[0]:
        column, row = round(float(x) * cell), round(cell / 4 + float(y) * cell / 2)
        assert sheet[row, column].max() > 200 and sheet[row, cell + column].max() > 200
    assert contact_sheet(crops, keypoints, np.ones(COUNT), 99).shape[0] == 3 * cell


def test_command_line(tmp_path, images):
    source, file = make("bin", tmp_path, images)
    torch.save(DFA().state_dict(), tmp_path / "dfa.pt")
    arguments = [
        "landmarks",
        str(source),
        "--weights",
        str(tmp_path / "dfa.pt"),
        "--overlay",
        "4",
        "--num-workers",
        "0",
    ]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert f"{file}: {COUNT} faces" in result.output and file.is_file()
    assert cv2.imread(str(file.with_suffix(".png"))).shape == (288, 288, 3)
