import unicodedata

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from insightface_kprpe.data.landmark_dataset import LandmarkDataset, read_labels

BOX = (60, 40, 80, 100)
POINTS = [(85, 75), (115, 78), (101, 95), (88, 118), (113, 116)]
LINE = " ".join(str(value) for value in (*BOX, *(v for x, y in POINTS for v in (x, y, 0.0)), 0.9))
BOX_LINE = "10 20 30 40 " + "-1 " * 15 + "0.3"


def picture(path, scale=1):
    """A gray image with a white dot at each of ``POINTS``."""
    image = np.full((200, 240, 3), 40, np.uint8)
    for x, y in POINTS:
        cv2.circle(image, (x, y), 2, (255, 255, 255), -1)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST))


@pytest.fixture
def folder(tmp_path):
    picture(tmp_path / "images" / "0--Parade" / "a.png")
    picture(tmp_path / "images" / "b.png")
    (tmp_path / "label.txt").write_text(f"# 0--Parade/a.png\n{LINE}\n{BOX_LINE}\n\n# b.png\n{LINE}\n5 5 0 9\n1 2 3 4\n")
    return tmp_path


def dots(image, size):
    """Centers of the white dots in a (3, S, S) crop, in the order of POINTS, in [0, 1]."""
    bright = (image.float().mean(0) > 128).numpy().astype(np.uint8)
    centers = cv2.connectedComponentsWithStats(bright)[3]
    return centers[1:] / size


def distance(found, points):
    """From each point to its nearest dot."""
    return np.linalg.norm(found[None] - np.asarray(points)[:, None], axis=-1).min(1)


def test_labels(folder):
    labels = read_labels(folder)
    assert len(labels) == 4  # the box without area is left out
    assert labels[0].picture == folder / "images" / "0--Parade" / "a.png" and labels[2].picture.name == "b.png"
    np.testing.assert_array_equal(labels[0].box, BOX)
    np.testing.assert_array_equal(labels[0].landmarks, POINTS)
    assert (labels[1].landmarks == -1).all() and (labels[3].landmarks == -1).all()
    assert len(LandmarkDataset(folder, labeled_only=True)) == 2


@pytest.mark.parametrize("options", [{}, {"size": 96, "padding": 0.3}, {"rotation": 25.0, "shift": (0.1, -0.05)}])
def test_labels_lie_on_the_pixels_they_were_on(folder, options):
    dataset = LandmarkDataset(folder, **options)
    sample = dataset[0]
    size = options.get("size", 160)
    assert sample.image.shape == (3, size, size) and sample.image.dtype == torch.uint8
    assert distance(dots(sample.image, size), sample.keypoints).max() * size < 0.5
    assert sample.keypoints.dtype == sample.bbox.dtype == torch.float32
    unlabeled = dataset[1]
    assert (unlabeled.keypoints == -1).all() and (unlabeled.bbox != -1).all()


def test_large_faces_are_averaged_down(tmp_path):
    picture(tmp_path / "big.png", scale=8)
    line = " ".join(str(8 * float(value)) for value in LINE.split()[:19])
    (tmp_path / "label.txt").write_text(f"# big.png\n{line}\n")
    sample = LandmarkDataset(tmp_path)[0]
    # a dot's center lies half a pixel, now four, right of and below its coordinate
    assert distance(dots(sample.image, 160), sample.keypoints.numpy() + 3.5 / 960).max() * 160 < 0.5
    assert len(torch.unique(sample.image)) > 10  # edges are blended, not sampled


def test_crop_is_a_padded_square_around_the_box(folder):
    x1, y1, x2, y2 = LandmarkDataset(folder)[0].bbox.tolist()
    assert (y1, y2) == pytest.approx((0.1 / 1.2, 1.1 / 1.2)) and (x2 - x1) / (y2 - y1) == pytest.approx(0.8)
    moved = LandmarkDataset(folder).recropped(shift=(0.2, 0.0))[0].bbox
    assert moved[0].item() == pytest.approx(x1 - 0.2)
    turned = LandmarkDataset(folder).recropped(rotation=90)[0].bbox
    assert (turned[2] - turned[0]).item() == pytest.approx(y2 - y1)


def test_outside_the_picture_is_black(folder):
    (folder / "label.txt").write_text("# b.png\n-50 -50 100 100\n")
    sample = LandmarkDataset(folder)[0]
    assert (sample.image[:, :40, :] == 0).all() and sample.image[:, 100:, 100:].min() > 0


def test_batches(folder):
    batch = next(iter(DataLoader(LandmarkDataset(folder), batch_size=4)))
    assert batch.image.shape == (4, 3, 160, 160) and batch.keypoints.shape == (4, 5, 2) and batch.bbox.shape == (4, 4)


def test_a_picture_named_twice_has_its_last_labels(folder, caplog):
    (folder / "label.txt").write_text(f"# b.png\n1 2 3 4\n5 6 7 8\n# b.png\n{LINE}\n")
    labels = read_labels(folder)
    assert len(labels) == 1 and labels[0].box[0] == BOX[0]
    assert "1 images are listed more than once" in caplog.text


def test_real_labels(shared):
    dataset = LandmarkDataset(shared / "data" / "faces" / "landmarks" / "val", labeled_only=True)
    keypoints = torch.stack([dataset[index].keypoints for index in range(0, len(dataset), 40)])
    assert len(dataset) > 400 and ((keypoints > 0) & (keypoints < 1)).all()
    assert (keypoints[:, 1, 0] > keypoints[:, 0, 0]).all() and (keypoints[:, 3, 1] > keypoints[:, 0, 1]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 4\n", "line 1: a face before the first"),
        ("# b.png\n1 2 3 4 5\n", r"line 2: a face is 4, 19 or 20 numbers .* got '1 2 3 4 5'"),
        ("# b.png\n1 2 three 4\n", "line 2: a face is"),
        ("# b.png\n1 2 nan 4\n", "line 2: a face is"),
        (f"# b.png\n{' '.join(LINE.split()[:6] + LINE.split()[7:])}\n", "line 2: the flag after each point must be"),
        (f"# b.png\n{' '.join([*BOX_LINE.split()[:-2], '0.3'])}\n", "line 2: the flag after each point must be"),
        ("0--Parade/a.png\n1\n1 2 3 4 0 0 0 0 0 0\n", "line 1: .* is it WIDER FACE's own wider_face_"),
        ("# b.png\n", "no faces in"),
        ("# b.png\n1 2 0 4\n", "no faces in"),
    ],
)
def test_malformed_labels(folder, text, message):
    (folder / "label.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(folder)


def test_missing_files(folder):
    with pytest.raises(FileNotFoundError, match="label file not found"):
        LandmarkDataset(folder / "images")
    (folder / "label.txt").write_text("\n# c.png\n1 2 3 4\n")
    with pytest.raises(FileNotFoundError, match=r"line 2: image 'c.png' found neither"):
        LandmarkDataset(folder)


def test_unreadable_picture_and_no_landmarks(folder):
    (folder / "images" / "b.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"b\.png is not a readable image; restore the file"):
        LandmarkDataset(folder)
    (folder / "label.txt").write_text("# 0--Parade/a.png\n1 2 3 4\n")
    with pytest.raises(ValueError, match="no face has landmarks"):
        LandmarkDataset(folder, labeled_only=True)


def line(box, points):
    return " ".join(str(value) for value in (*box, *(v for x, y in points for v in (x, y, 0)), 0.9))


ASIDE = [(x + 300, y) for x, y in POINTS]


@pytest.mark.parametrize("points", [[(0, 0)] * 5, [(100, 90)] * 5, [POINTS[i] for i in (1, 0, 2, 4, 3)], ASIDE])
def test_landmarks_that_cannot_be_the_faces_are_none(folder, points, caplog):
    (folder / "label.txt").write_text(f"# b.png\n{LINE}\n{line(BOX, points)}\n")
    known, unknown = read_labels(folder)
    assert (known.landmarks == POINTS).all() and (unknown.landmarks == -1).all()
    assert "1 faces have impossible landmarks (first: line 3); treated as faces without" in caplog.text


def test_boxes_outside_their_picture_are_left_out(folder, caplog):
    (folder / "label.txt").write_text("# b.png\n1 2 3 4\n500 20 30 30\n-60 20 30 30\n-20 20 30 30\n")
    assert [label.box[0] for label in read_labels(folder)] == [1, -20]
    assert "left out 2 boxes outside their image (first: line 3)" in caplog.text


def test_names_in_either_form_of_unicode(folder):
    for written, on_disk in (("NFC", "NFD"), ("NFD", "NFC")):
        written, on_disk = (unicodedata.normalize(form, f"Zoë{written}.png") for form in (written, on_disk))
        picture(folder / "images" / on_disk)
        (folder / "label.txt").write_text(f"\ufeff# {written}\n1 2 3 4\n", encoding="utf-8")
        assert len(read_labels(folder)) == 1


def test_a_label_file_in_latin_1_is_named_with_its_line(folder):
    (folder / "label.txt").write_bytes("# b.png\n1 2 3 4\n# Zoë.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"label\.txt: line 3: byte 0xeb is not UTF-8 .* save the file as UTF-8"):
        read_labels(folder)
