import cv2
import numpy as np
import pytest
import tiny_packs as tiny
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app import enrollment, recognition
from insightface_kprpe.app.file_gallery import FileGallery
from insightface_kprpe.app.gallery import Match
from insightface_kprpe.app.pictures import read_picture, write_picture
from insightface_kprpe.data.picture_files import list_pictures
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112

rng = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("unregistered")


PEOPLE = {"Ann": (5, 5), "Bob": (14, 20), "Cid": (25, 9)}


@pytest.fixture
def people(tmp_path):
    """Whom the tiny recognizer tells apart by color: folders, a single image, and one without a face."""
    for number, (name, cell) in enumerate(PEOPLE.items()):
        for picture in range(1 if name == "Cid" else 3):
            image = tiny.draw_picture([cell], seed=picture)
            image[..., number] //= 4
            cells = np.s_[8 * cell[1] : 8 * cell[1] + 8, 8 * cell[0] : 8 * cell[0] + 8]
            image[cells] = 240
            path = tmp_path / "people" / (f"{name}.png" if name == "Cid" else f"{name}/{picture}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    cv2.imwrite(str(tmp_path / "people" / "Ann" / "dark.png"), tiny.draw_picture([], seed=9))
    (tmp_path / "people" / ".hidden").mkdir()
    (tmp_path / "people" / ".hidden" / "x.png").write_bytes(b"")
    (tmp_path / "people" / "notes.txt").write_text("no image")
    tiny.write_pack(tmp_path)
    return tmp_path / "people"


def test_people_of_a_folder(people, tmp_path):
    found = enrollment.people_of_folder(people)
    assert [(name, path.name) for name, path in found] == [
        ("Ann", "0.png"), ("Ann", "1.png"), ("Ann", "2.png"), ("Ann", "dark.png"),
        ("Bob", "0.png"), ("Bob", "1.png"), ("Bob", "2.png"), ("Cid", "Cid.png"),
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        enrollment.people_of_folder(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="folder of people not found"):
        enrollment.people_of_folder(tmp_path / "absent")


def test_enrolled_people_are_named(people, tmp_path, monkeypatch):
    app = recognition.open_pack("tiny", tmp_path, **tiny.CPU)
    gallery = FileGallery()
    saved = []
    monkeypatch.setattr(enrollment, "_PICTURES_AT_A_TIME", 3)
    monkeypatch.setattr(enrollment, "_PICTURES_A_SAVE", 4)
    monkeypatch.setattr(FileGallery, "commit", lambda self: saved.append(len(self.names)))
    pictures = enrollment.people_of_folder(people)
    (people / "Bob" / "torn.png").write_bytes((people / "Bob" / "0.png").read_bytes()[:30])
    unreadable = (
        "could not be read as an image: 30 bytes of PNG are not a readable image: damaged, or in a format that the "
    )
    unreadable += f"installed OpenCV {cv2.__version__} does not read; remove or replace it"
    left_out = {people / "Ann" / "dark.png": "no face found", people / "Bob" / "torn.png": unreadable}
    pictures.append(("Bob", people / "Bob" / "torn.png"))
    first = enrollment.enroll(app, gallery, pictures)
    assert first == enrollment.Enrolled(added=7, left_out=left_out)
    assert saved == [5, 7] and gallery.people() == {"Ann": 3, "Bob": 3, "Cid": 1}
    passed_over = {path: name for name, path in pictures if path not in left_out}
    again = enrollment.enroll(app, gallery, pictures)
    assert again == enrollment.Enrolled(passed_over=passed_over, left_out=left_out)
    assert len(gallery.names) == 7 and saved == [5, 7]  # none twice

    photo = read_picture(people / "Bob" / "1.png")
    (face,) = recognition.recognize(app, gallery, photo, threshold=0.5)
    assert face.name == "Bob" and face.nearest.similarity > 0.9 and face.quality == face.face.quality > 0.5
    (stranger,) = recognition.recognize(app, gallery, photo, threshold=1.01)
    assert stranger.name is None and stranger.nearest == face.nearest
    assert recognition.recognize(app, gallery, photo[:0]) == []
    (alone,) = recognition.recognize(app, FileGallery(), photo)
    assert alone.name is None and alone.nearest is None


def test_a_gallery_belongs_to_a_model(people, tmp_path):
    gallery = FileGallery()
    enrollment.enroll(recognition.open_pack("tiny", tmp_path, **tiny.CPU), gallery, [("Cid", people / "Cid.png")])
    unaligned = recognition.open_pack("tiny", tmp_path, aligned=False, **tiny.CPU)
    tiny.write_pack(tmp_path, "plain", twin=False)
    plain = recognition.open_pack("plain", tmp_path, **tiny.CPU)
    for other in (unaligned, plain):
        with pytest.raises(ValueError, match="made with another recognition model"):
            recognition.recognize(other, gallery, read_picture(people / "Cid.png"))
    (face,) = recognition.recognize(plain, FileGallery(), read_picture(people / "Cid.png"))
    assert face.face.quality is None and 0.5 < face.quality < 1


def test_the_packs_own_threshold(people, tmp_path):
    import json

    app = recognition.open_pack("tiny", tmp_path, **tiny.CPU)
    assert recognition.measured_evaluation(app) is None
    record = {
        "sha256": "",
        "source": "",
        "licence": "MIT",
        "evaluation": {"set": "lfw", "pairs": 6000, "accuracy": 99.0, "thresholds": {"0.001": 0.3, "0.0001": 0.42}},
    }
    files = {"keypoints/recognition.onnx": record}
    manifest = tmp_path / "models" / "tiny" / "pack.json"
    manifest.write_text(json.dumps({"name": "tiny", "files": files}))
    assert recognition.smallest_rate(recognition.measured_evaluation(app)) == ("0.0001", 0.42)


def test_annotations_are_drawn_inside(people, tmp_path):
    from insightface.app.common import Face

    photo = np.zeros((120, 160, 3), np.uint8)
    face = Face(bbox=np.array([100.0, 2, 170, 90]), kps=ARCFACE_TEMPLATE_112 * 0.5 + (90, 10))
    match = Match("Zoë Ångström", 0.5)
    drawn = recognition.annotate(photo, [recognition.NamedFace("Zoë Ångström", match, 0.7, face)])
    assert drawn.shape == photo.shape and not photo.any()
    unknown = recognition.annotate(photo, [recognition.NamedFace(None, None, 0.7, Face(bbox=face.bbox))])
    assert (drawn[:, :, 1] == 220).sum() > 500 and (unknown == 190).all(-1).sum() > 500
    near = Face(bbox=np.array([60.0, 2, 95, 118]))  # whose box crosses the first one's label
    both = [
        recognition.NamedFace(None, None, 0.7, Face(bbox=np.array([10.0, 40, 70, 90]))),
        recognition.NamedFace("Al", None, 0.7, near),
    ]
    alone = recognition.annotate(photo, both[:1])
    label = np.s_[32:39, 15:75]  # below the other's label
    np.testing.assert_array_equal(recognition.annotate(photo, both)[label], alone[label])
    assert recognition._drawable("Zoë Ångström") == "Zoe Angstrom"


def test_pictures_from_and_to_files(tmp_path):
    image = rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)
    write_picture(tmp_path / "größe.PNG", image)
    np.testing.assert_array_equal(read_picture(tmp_path / "größe.PNG"), image)
    assert list_pictures(tmp_path) == [tmp_path / "größe.PNG"]
    for name in ("out.txt", "out", "out.gif"):
        with pytest.raises(ValueError, match=name + r" must end in one of \.jpg, .*\.tiff"):
            write_picture(tmp_path / name, image)
    for content in (b"", b"no image"):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(ValueError, match="could not be read as an image"):
            read_picture(tmp_path / "bad.jpg")
    with pytest.raises(FileNotFoundError, match="image not found"):
        read_picture(tmp_path / "absent.jpg")


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_command_line(people, gallery_place, tmp_path):
    index, pack = gallery_place, ("--pack", "tiny", "--root", tmp_path)
    result = call("gallery", "add", index, people, *pack)
    assert "7 images added, 3 people\n" in result.output and "dark.png: left out, no face found" in result.output
    result = call("gallery", "add", index, people / "Cid.png", "--name", "Dee", *pack)
    assert "0 images added, 3 people, 1 skipped: already in the gallery (as Cid)\n" in result.output
    result = call("gallery", "add", tmp_path / "one.npz", people / "Cid.png", "--name", "Dee", *pack)
    assert "1 image added, 1 person\n" in result.output
    with pytest.raises(ValueError, match="none of its images could be added"):
        call("gallery", "add", tmp_path / "none.npz", people / "Ann" / "dark.png", "--name", "Dee", *pack)
    assert not (tmp_path / "none.npz").exists()
    assert [line.split() for line in call("gallery", "list", index).output.splitlines()[:3]] == [
        ["3", "Ann"], ["3", "Bob"], ["1", "Cid"],
    ]  # fmt: skip
    for known in (people, index):
        result = call("recognize", known, people / "Bob" / "1.png", "--out", tmp_path / "named.png", *pack)
        assert "1 face, gallery of 3 people, threshold 0.300" in result.output
        assert "  1  Bob " in result.output and "quality" in result.output
        assert (read_picture(tmp_path / "named.png") != read_picture(people / "Bob" / "1.png")).any()
    (people / "Bob" / "broken.jpg").write_text("no image")
    result = call("recognize", index, people / "Bob", "--out", tmp_path / "named", *pack)
    assert result.output.count("  1  Bob ") == 3 and "broken.jpg could not be read" in result.output
    assert len(list((tmp_path / "named").iterdir())) == 3
    with pytest.raises(ValueError, match="is a URL"):
        call("recognize", index, "https://example.org/a.jpg", *pack)
    assert "Bob removed (3 images), 2 people left" in call("gallery", "remove", index, "Bob").output
    result = call("recognize", index, people / "Bob" / "1.png", "--threshold", "1.01", *pack)
    assert "unknown" in result.output and "(nearest: " in result.output
    with pytest.raises(FileNotFoundError, match="pack not found.* which holds tiny; "):
        call("recognize", index, people / "Cid.png", "--pack", "absent", "--root", tmp_path)
    with pytest.raises(ValueError, match="named must end in one of"):  # before anything is opened
        call(
            "recognize", index, people / "Cid.png", "--out", tmp_path / "named", "--pack", "absent", "--root", tmp_path
        )
    with pytest.raises(FileNotFoundError, match="images not found"):
        call("gallery", "add", index, tmp_path / "absent", "--name", "Eve", *pack)
