import json

import cv2
import numpy as np
import pytest
import tiny_packs as tiny
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app.comparison import choose_threshold, compare, side_by_side
from insightface_kprpe.app.recognition import face_quality, open_pack

pytestmark = pytest.mark.usefixtures("unregistered")


@pytest.fixture
def app(tiny_app):
    return tiny_app


@pytest.fixture
def photos(tmp_path):
    paths = []
    for number, cells in enumerate([[(5, 5)], [(7, 5), (20, 22)], [(14, 20)], []]):
        paths.append(tmp_path / "photos" / f"{number}.png")
        paths[-1].parent.mkdir(exist_ok=True)
        cv2.imwrite(str(paths[-1]), tiny.draw_picture(cells, seed=number))
    return paths


def unit(face):
    return face.embedding / np.linalg.norm(face.embedding)


def test_two_photos(app, photos):
    compared = compare(app, photos[0], str(photos[2]), 0.1)
    (one,), (other,) = (app.get(cv2.imread(str(photos[i]))) for i in (0, 2))
    assert compared.similarity == pytest.approx(float(unit(one) @ unit(other)), abs=1e-5)
    assert compared.is_same == (compared.similarity >= 0.1) and compared.similarities.shape == (1, 1)
    assert compared.first[0].quality == pytest.approx(face_quality(one)) and compared.first[0].others == 0
    assert compare(app, photos[0], photos[0]).similarity == pytest.approx(1)
    as_array = compare(app, cv2.imread(str(photos[0])), photos[2], 0.1)
    assert as_array.similarity == pytest.approx(compared.similarity, abs=1e-6)
    assert as_array.first[0].name == "first" and compared.first[0].name == str(photos[0])


def test_the_threshold_decides(app, photos):
    similarity = compare(app, photos[0], photos[2]).similarity
    assert not compare(app, photos[0], photos[2], similarity + 0.001).is_same
    assert compare(app, photos[0], photos[2], similarity - 0.001).is_same
    with pytest.raises(ValueError, match="threshold must be a cosine"):
        compare(app, photos[0], photos[2], float("nan"))


def test_the_largest_of_several_faces_counts(app, photos):
    (face,) = compare(app, photos[1], photos[0]).first
    faces = app.get(cv2.imread(str(photos[1])))
    areas = [np.prod(found.bbox[2:] - found.bbox[:2]) for found in faces]
    assert face.others == 1 and len(faces) == 2
    np.testing.assert_allclose(face.face.embedding, faces[int(np.argmax(areas))].embedding, atol=1e-4)


def test_folders_are_people(app, photos, tmp_path):
    compared = compare(app, photos[0].parent, [photos[2], photos[0]])
    assert compared.left_out == {str(photos[3]): "no face found"}
    assert compared.similarities.shape == (3, 2) and compared.similarities[0, 1] == pytest.approx(1, abs=1e-5)
    rows = np.stack([face.face.normed_embedding * face.quality for face in compared.first])
    mean = rows.sum(0) / np.linalg.norm(rows.sum(0))
    rows = np.stack([face.face.normed_embedding * face.quality for face in compared.second])
    other = rows.sum(0) / np.linalg.norm(rows.sum(0))
    assert compared.similarity == pytest.approx(float(mean @ other), abs=1e-5)
    (tmp_path / "photos" / "4.png").write_text("no picture")
    left_out = compare(app, photos[0].parent, photos[0]).left_out
    assert left_out[str(tmp_path / "photos" / "4.png")].startswith("could not be read")


def test_what_cannot_be_compared(app, photos, tmp_path):
    with pytest.raises(ValueError, match="no face found in .*3.png"):
        compare(app, photos[3], photos[0])
    with pytest.raises(ValueError, match="URL, and nothing is downloaded"):
        compare(app, "https://example.org/a.jpg", photos[0])
    with pytest.raises(FileNotFoundError, match="picture or folder not found"):
        compare(app, tmp_path / "none.jpg", photos[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        compare(app, tmp_path / "empty", photos[0])


def test_crops_are_taken_as_they_are(app):
    crops = np.random.default_rng(0).integers(0, 255, (2, 112, 112, 3), dtype=np.uint8)
    one, other = (row / np.linalg.norm(row) for row in app.embed_aligned(list(crops)))
    compared = compare(app, crops[0], crops[1], are_crops=True)
    assert compared.similarity == pytest.approx(float(one @ other), abs=1e-5)


def test_thresholds_say_what_they_mean(app, tmp_path):
    assert choose_threshold(app).value == 0.3 and "customary" in choose_threshold(app).meaning
    assert "not measured" in choose_threshold(app, 0.2).meaning
    folder = tmp_path / "root" / "models" / "tiny"
    evaluation = {"set": "lfw", "pairs": 6000, "accuracy": 99.0, "thresholds": {"0.001": 0.3, "0.0001": 0.42}}
    record = {"sha256": "", "source": "", "licence": "", "evaluation": evaluation}
    files = {"keypoints/recognition.onnx": record}
    (folder / "pack.json").write_text(json.dumps({"name": "tiny", "files": files}))
    meaning = "at most 0.0001 of different people score higher, of 6000 pairs of lfw"
    assert choose_threshold(app) == (0.42, meaning, True)
    assert choose_threshold(app, 0.35).meaning.startswith("as asked for: at most 0.001 of different")
    assert choose_threshold(app, 0.1).meaning.startswith("as asked for: more than was measured")


def test_pictures_of_both(app, photos):
    single = side_by_side(compare(app, photos[0], photos[2]))
    assert single.dtype == np.uint8 and single.shape[1] == 2 * (432 + 8) and single.shape[0] == 24 + 432 + 144
    many = side_by_side(compare(app, photos[0].parent, photos[2]))
    assert many.shape[1] == 288 + 432 + 16 and many.any()


def test_the_verb(app, photos, tmp_path):
    def run(*arguments):
        arguments = ["compare", *map(str, arguments), "--pack", "tiny", "--root", str(tmp_path / "root")]
        return CliRunner().invoke(cli.app, arguments)

    result = run(photos[0], photos[1], "--out", tmp_path / "both.png", "--threshold", 0.9)
    assert result.exit_code == 0, result.output
    assert "similarity " in result.output and "(2 faces, the largest taken)" in result.output
    assert "threshold 0.900: as asked for" in result.output and cv2.imread(str(tmp_path / "both.png")).any()
    result = run(photos[0].parent, photos[0])
    assert "similarity of each photo of A (row) to each of B" in result.output and "3.png: left out" in result.output
    assert "is a URL" in str(run("http://example.org/a.jpg", photos[0]).exception)
    assert "must end in one of" in str(run(photos[0], photos[1], "--out", tmp_path / "x.pdf").exception)


def test_the_crop_that_is_shown_is_the_one_that_was_embedded(app, photos, tmp_path):
    unaligned = open_pack("tiny", tmp_path / "root", aligned=False, **tiny.CPU)
    for analysis in (app, unaligned):
        (side,) = compare(analysis, photos[0], photos[2]).first
        again = analysis.models["recognition"].embed_aligned(side.crop[None], side.crop_keypoints[None])[0]
        np.testing.assert_allclose(again, side.face.embedding, rtol=1e-4, atol=1e-4)
