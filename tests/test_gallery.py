import logging
import os
import signal
import threading
import zipfile

import cv2
import numpy as np
import pytest
import tiny_packs as tiny
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.app import enrollment, recognition
from insightface_kprpe.app.gallery import Gallery, Match, editing
from insightface_kprpe.app.pictures import read_picture, write_picture
from insightface_kprpe.data.picture_files import list_pictures
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def unregistered():
    yield
    ik.unregister()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def gallery():
    gallery = Gallery("model")
    gallery.add(["Ann", "Bob", "Ann"], np.float32([[2, 0, 0], [0, 3, 0], [0, 0, 1]]), [0.9, 0.5, 0.3], ["a", "b", "c"])
    return gallery


def test_search_names_the_most_similar_person(gallery):
    """Ann is the mean of her images, weighted by quality."""
    names, templates = gallery.templates
    assert names.tolist() == ["Ann", "Bob"]
    np.testing.assert_allclose(templates, unit(np.array([[0.9, 0, 0.3], [0, 1, 0]])), atol=1e-6)
    (ann, bob), (only,) = (
        gallery.search(np.float32([[5, 1, 0]]), top=5)[0],
        gallery.search(np.float32([[0, 2, 0.1]]))[0],
    )
    assert (ann.name, bob.name, only.name) == ("Ann", "Bob", "Bob")
    assert ann.similarity == pytest.approx(5 * 0.9 / np.sqrt(26 * 0.9), rel=1e-5)
    assert bob.similarity == pytest.approx(1 / np.sqrt(26), rel=1e-5)
    assert gallery.people() == {"Ann": 2, "Bob": 1}


def test_search_is_a_matrix_product_in_order():
    people = 500
    gallery, rows = Gallery(), rng.normal(0, 1, (people, 32)).astype(np.float32)
    gallery.add([f"p{i:03}" for i in range(people)], rows, np.ones(people), ["x"] * people)
    probes = rng.normal(0, 1, (7, 32)).astype(np.float32)
    scores = unit(probes) @ unit(rows).T
    for found, row in zip(gallery.search(probes, top=3), scores, strict=True):
        best = np.argsort(-row)[:3]
        assert [match.name for match in found] == [f"p{i:03}" for i in best]
        np.testing.assert_allclose([match.similarity for match in found], row[best], atol=1e-5)


def test_removing_and_adding_change_what_is_found(gallery):
    gallery.search(np.float32([[1, 0, 0]]))
    assert gallery.remove("Ann") == 2
    assert gallery.search(np.float32([[1, 0.1, 0]]))[0][0].name == "Bob"
    gallery.add(["Cid"], np.float32([[1, 0, 0]]), [1.0], ["d"])
    assert gallery.search(np.float32([[1, 0.1, 0]]))[0][0].name == "Cid"
    with pytest.raises(ValueError, match="nobody in the gallery is named 'Ann'"):
        gallery.remove("Ann")
    with pytest.raises(ValueError, match=r"embeddings must be \(B, 3\)"):
        gallery.add(["Dee"], np.ones((1, 4)), [1.0], ["e"])
    with pytest.raises(ValueError, match=r"embeddings must be \(B, 3\)"):
        gallery.search(np.ones((1, 4)))
    assert Gallery().search(np.ones((2, 4))) == [[], []]


def test_save_and_load(gallery, tmp_path):
    gallery.save(tmp_path / "people.npz")
    again = Gallery.load(tmp_path / "people.npz")
    for field in ("model", "names", "sources", "embeddings", "qualities"):
        np.testing.assert_array_equal(getattr(again, field), getattr(gallery, field))
    assert [path.name for path in tmp_path.iterdir()] == ["people.npz"]


@pytest.mark.parametrize("content", [b"", b"no gallery", b"PK\x03\x04 nor this", b"\x80\x04N."])
def test_other_files_are_no_galleries(tmp_path, content):
    (tmp_path / "people.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not a gallery, or is damaged") as error:
        Gallery.load(tmp_path / "people.npz")
    assert "pickle" not in str(error.value)
    np.savez(tmp_path / "pickled.npz", names=np.array([{}], dtype=object), model="")
    with pytest.raises(ValueError, match="is not a gallery"):
        Gallery.load(tmp_path / "pickled.npz")
    with pytest.raises(FileNotFoundError, match="gallery not found"):
        Gallery.load(tmp_path / "absent.npz")


def write_gallery(path, save=np.savez, **changed):
    fields = {
        "model": np.array("model"),
        "names": np.array(["Ann", "Bob"]),
        "sources": np.array(["a", "b"]),
        "embeddings": np.float32([[1, 0], [0, 1]]),
        "qualities": np.float32([1, 0.5]),
    }
    save(path, **(fields | changed))
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"names": np.array("Ann")}, r"names must be \(2,\), one for each embedding, got \(\) <U3"),
        ({"names": np.array([["Ann"], ["Bob"]])}, r"names must be \(2,\)"),
        ({"names": np.array([1, 2])}, "names must be .* int64"),
        ({"sources": np.array(["a"])}, r"sources must be \(2,\)"),
        ({"embeddings": np.float32(1)}, "names must be"),
        ({"embeddings": np.float32([1, 1])}, r"embeddings must be \(N, D\) float32, got \(2,\)"),
        ({"embeddings": np.float64([[1, 0], [0, 1]])}, r"embeddings must be \(N, D\) float32"),
        (
            {"embeddings": np.float32([[1, 0], [0, np.nan]])},
            "embedding 1 must be finite and of length 1, got length nan",
        ),
        (
            {"embeddings": np.float32([[np.inf, 0], [0, 1]])},
            "embedding 0 must be finite and of length 1, got length inf",
        ),
        ({"embeddings": np.float32([[1, 0], [0, 0]])}, "embedding 1 must be finite and of length 1, got length 0"),
        ({"qualities": np.float32([1, np.nan])}, r"qualities must be in \[0, 1\]"),
        ({"qualities": np.float32([1, 7])}, r"qualities must be in \[0, 1\]"),
        ({"save": np.savez_compressed}, r"model\.npy is compressed"),
    ],
)
def test_damaged_galleries_say_what_is_wrong(tmp_path, changed, message):
    path = write_gallery(tmp_path / "people.npz", **changed)
    with pytest.raises(ValueError, match=r"people\.npz is not a gallery, or is damaged: " + message):
        Gallery.load(path)


def test_a_gallery_that_claims_more_than_it_holds_is_not_unpacked(tmp_path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 512)}
    archive = zipfile.ZipFile(write_gallery(tmp_path / "people.npz"), "a")
    with archive, archive.open("embeddings.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"embeddings\.npy does not hold \(1000000000, 512\) of float32"):
        Gallery.load(tmp_path / "people.npz")


def test_galleries_at_impossible_places_are_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a file \(gallery\), got a folder"):
        Gallery.load(tmp_path)
    with pytest.raises(ValueError, match=r"loop \(gallery\) cannot be read"):
        Gallery.load(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="gallery not found: .* a part of the path is a file"):
        Gallery.load(tmp_path / "file" / "people.npz")


def test_what_cannot_be_compared_is_not_added(gallery):
    for row, message in ((np.nan, "must be finite"), (0, "must not be zero")):
        with pytest.raises(ValueError, match=message):
            gallery.add(["Eve"], np.float32([[row, 0, 0]]), [1.0], ["e"])
    with pytest.raises(ValueError, match=r"qualities must be in \[0, 1\]"):
        gallery.add(["Eve"], np.float32([[1, 0, 0]]), [1.5], ["e"])
    assert gallery.people() == {"Ann": 2, "Bob": 1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")
def test_a_kill_while_saving_leaves_the_old_gallery(gallery, tmp_path):
    gallery.save(tmp_path / "people.npz")
    child = os.fork()
    if not child:
        try:
            write = np.savez

            def killed(file, **fields):
                write(file, **fields)
                file.truncate(100)
                os.kill(os.getpid(), signal.SIGKILL)

            np.savez = killed
            gallery.remove("Ann")
            gallery.save(tmp_path / "people.npz")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert Gallery.load(tmp_path / "people.npz").people() == {"Ann": 2, "Bob": 1}
    assert len(list(tmp_path.iterdir())) == 2  # with the half-written one, under another name


def test_two_writers_take_turns(tmp_path, caplog):
    """The second sees what the first has saved, instead of writing over it."""
    path, second_waits = tmp_path / "people.npz", threading.Event()

    def add(name):
        with editing(path) as gallery:
            gallery.add([name], np.ones((1, 4)), [1.0], [name])
            gallery.save(path)

    class Signal(logging.Handler):
        def emit(self, record):
            second_waits.set()

    handler = Signal()
    logging.getLogger("insightface_kprpe.app.gallery").addHandler(handler)
    try:
        with editing(path) as gallery:
            other = threading.Thread(target=add, args=("Bob",))
            other.start()
            assert second_waits.wait(60)
            gallery.add(["Ann"], np.ones((1, 4)), [1.0], ["Ann"])
            gallery.save(path)
        other.join()
    finally:
        logging.getLogger("insightface_kprpe.app.gallery").removeHandler(handler)
    assert Gallery.load(path).people() == {"Ann": 1, "Bob": 1}
    assert "being changed by another process" in caplog.text


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
    gallery = Gallery()
    saved = []
    monkeypatch.setattr(enrollment, "_PICTURES_AT_A_TIME", 3)
    monkeypatch.setattr(enrollment, "_PICTURES_A_SAVE", 4)
    monkeypatch.setattr(Gallery, "save", lambda self, path: saved.append(len(self.names)))
    pictures = enrollment.people_of_folder(people)
    (people / "Bob" / "torn.png").write_bytes((people / "Bob" / "0.png").read_bytes()[:30])
    unreadable = (
        "could not be read as an image: 30 bytes of PNG are not a readable image: damaged, or in a format that the "
    )
    unreadable += f"installed OpenCV {cv2.__version__} does not read; remove or replace it"
    left_out = {people / "Ann" / "dark.png": "no face found", people / "Bob" / "torn.png": unreadable}
    pictures.append(("Bob", people / "Bob" / "torn.png"))
    first = enrollment.enroll(app, gallery, pictures, tmp_path / "index")
    assert first == enrollment.Enrolled(added=7, left_out=left_out)
    assert saved == [5, 7] and gallery.people() == {"Ann": 3, "Bob": 3, "Cid": 1}
    passed_over = {path: name for name, path in pictures if path not in left_out}
    again = enrollment.enroll(app, gallery, pictures, tmp_path / "index")
    assert again == enrollment.Enrolled(passed_over=passed_over, left_out=left_out)
    assert len(gallery.names) == 7 and saved == [5, 7]  # none twice

    photo = read_picture(people / "Bob" / "1.png")
    (face,) = recognition.recognize(app, gallery, photo, threshold=0.5)
    assert face.name == "Bob" and face.nearest.similarity > 0.9 and face.quality == face.face.quality > 0.5
    (stranger,) = recognition.recognize(app, gallery, photo, threshold=1.01)
    assert stranger.name is None and stranger.nearest == face.nearest
    assert recognition.recognize(app, gallery, photo[:0]) == []
    (alone,) = recognition.recognize(app, Gallery(), photo)
    assert alone.name is None and alone.nearest is None


def test_a_gallery_belongs_to_a_model(people, tmp_path):
    gallery = Gallery()
    enrollment.enroll(recognition.open_pack("tiny", tmp_path, **tiny.CPU), gallery, [("Cid", people / "Cid.png")])
    unaligned = recognition.open_pack("tiny", tmp_path, aligned=False, **tiny.CPU)
    tiny.write_pack(tmp_path, "plain", twin=False)
    plain = recognition.open_pack("plain", tmp_path, **tiny.CPU)
    for other in (unaligned, plain):
        with pytest.raises(ValueError, match="made with another recognition model"):
            recognition.recognize(other, gallery, read_picture(people / "Cid.png"))
    (face,) = recognition.recognize(plain, Gallery(), read_picture(people / "Cid.png"))
    assert face.face.quality is None and 0.5 < face.quality < 1


def test_the_packs_own_threshold(people, tmp_path):
    import json

    app = recognition.open_pack("tiny", tmp_path, **tiny.CPU)
    assert recognition.measured_threshold(app) is None
    record = {
        "sha256": "",
        "source": "",
        "licence": "MIT",
        "evaluation": {"set": "lfw", "pairs": 6000, "accuracy": 99.0, "thresholds": {"0.001": 0.3, "0.0001": 0.42}},
    }
    files = {"keypoints/recognition.onnx": record}
    manifest = tmp_path / "models" / "tiny" / "pack.json"
    manifest.write_text(json.dumps({"name": "tiny", "files": files}))
    assert recognition.measured_threshold(app) == 0.42


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


def test_command_line(people, tmp_path):
    index, pack = tmp_path / "people.npz", ("--pack", "tiny", "--root", tmp_path)
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
    assert "Bob removed (3 images), 2 people left" in call("gallery", "remove", index, "Bob").output
    result = call("recognize", index, people / "Bob" / "1.png", "--threshold", "1.01", *pack)
    assert "unknown" in result.output and "(nearest: " in result.output
    with pytest.raises(FileNotFoundError, match="pack not found.* which holds tiny; --root"):
        call("recognize", index, people / "Cid.png", "--pack", "absent", "--root", tmp_path)
    with pytest.raises(ValueError, match="named must end in one of"):  # before anything is opened
        call(
            "recognize", index, people / "Cid.png", "--out", tmp_path / "named", "--pack", "absent", "--root", tmp_path
        )
    with pytest.raises(FileNotFoundError, match="images not found"):
        call("gallery", "add", index, tmp_path / "absent", "--name", "Eve", *pack)
