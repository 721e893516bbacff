import logging
import os
import unicodedata

import cv2
import numpy as np
import pytest
import tiny_packs as tiny
from typer.testing import CliRunner

from insightface_kprpe import cli
from insightface_kprpe.app import enrollment, recognition
from insightface_kprpe.app.enrollment import enroll, people_of_folder, vanished
from insightface_kprpe.app.file_gallery import FileGallery
from insightface_kprpe.app.galleries import editing, reading

pytestmark = pytest.mark.usefixtures("unregistered")


@pytest.fixture
def app(tiny_app):
    return tiny_app


def photo(*cells, seed=0):
    return tiny.draw_picture(list(cells), seed=seed)


def write(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture)


@pytest.fixture
def people(tmp_path):
    folder = tmp_path / "people"
    write(folder / "Ann" / "0.png", photo((5, 5)))
    write(folder / "Ann" / "1.png", photo((7, 5), seed=1))
    write(folder / "Bob.png", photo((14, 20), seed=2))
    return folder


@pytest.fixture
def gallery(app, people, gallery_place):
    """One that holds the people, wherever it is kept."""
    with editing(gallery_place) as gallery:
        enroll(app, gallery, people_of_folder(people))
        yield gallery


def known(gallery, path):
    """What the gallery knows of a file."""
    (picture,) = gallery.from_sources([str(path.resolve())])
    return picture


def similarity(gallery, name, row):
    """Of an embedding to a person."""
    return dict(gallery.search(row[None], top=99)[0])[name]


def test_a_changed_file_is_embedded_anew(app, gallery, people):
    path = people / "Bob.png"
    (before,) = app.get(cv2.imread(str(path)))
    assert similarity(gallery, "Bob", before.embedding) == pytest.approx(1, abs=1e-5)
    write(path, photo((22, 22), seed=5))
    result = enroll(app, gallery, people_of_folder(people))
    assert result.changed == [path] and result.added == 1 and len(result.passed_over) == 2
    assert gallery.people() == {"Ann": 2, "Bob": 1}
    (after,) = app.get(cv2.imread(str(path)))
    assert similarity(gallery, "Bob", after.embedding) == pytest.approx(1, abs=1e-5)
    assert similarity(gallery, "Bob", before.embedding) < 0.9999
    assert enroll(app, gallery, people_of_folder(people)).added == 0


def test_the_same_size_and_time_is_not_read_again_but_a_new_time_is(app, gallery, people, monkeypatch):
    read = []
    content_of = enrollment.Content.of.__func__
    monkeypatch.setattr("insightface_kprpe.app.gallery.file_sha256", lambda path: read.append(path) or "other")
    assert enroll(app, gallery, people_of_folder(people)).added == 0 and not read
    path = people / "Ann" / "1.png"
    os.utime(path, ns=(1, 1))
    monkeypatch.undo()
    result = enroll(app, gallery, people_of_folder(people))  # only touched
    assert (result.added, result.changed, len(result.passed_over)) == (0, [], 3)
    assert known(gallery, path).content.time == 1
    assert content_of  # the shortcut is a class method


def test_files_that_change_places_are_told_apart(app, gallery, people):
    first, second = people / "Ann" / "0.png", people / "Bob.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    for path in (first, second):
        os.utime(path, ns=(7, 7))
    (ann,) = app.get(cv2.imread(str(second)))
    result = enroll(app, gallery, people_of_folder(people))
    assert sorted(result.changed) == [first, second] and gallery.people() == {"Ann": 2, "Bob": 1}
    assert similarity(gallery, "Bob", ann.embedding) == pytest.approx(1, abs=1e-5)


def test_a_moved_folder_adds_nothing(app, gallery, gallery_place, people, tmp_path):
    probes = np.random.default_rng(0).normal(0, 1, (3, tiny.DIM))
    before = gallery.search(probes, top=9)
    people.rename(tmp_path / "elsewhere")
    result = enroll(app, gallery, people_of_folder(tmp_path / "elsewhere"))
    assert result.added == 0 and len(result.moved) == 3
    assert result.moved[tmp_path / "elsewhere" / "Bob.png"] == str(people.resolve() / "Bob.png")
    with reading(gallery_place) as saved:
        assert saved.people() == {"Ann": 2, "Bob": 1} and saved.search(probes, top=9) == before
        assert len(saved.below(tmp_path / "elsewhere")) == 3 and saved.below(people) == []


def test_a_picture_moved_to_another_person_is_theirs(app, gallery, people):
    (people / "Cid").mkdir()
    (people / "Ann" / "1.png").rename(people / "Cid" / "1.png")
    assert len(enroll(app, gallery, people_of_folder(people)).moved) == 1
    assert gallery.people() == {"Ann": 1, "Bob": 1, "Cid": 1}


def test_copies_are_passed_over(app, gallery, people):
    for copy in ("Ann/copy.png", "Dee/copy.png"):
        (people / copy).parent.mkdir(exist_ok=True)
        (people / copy).write_bytes((people / "Ann" / "0.png").read_bytes())
    result = enroll(app, gallery, people_of_folder(people))
    assert (result.added, len(result.passed_over), result.nobody) == (0, 5, ["Dee"])
    fresh = FileGallery()
    assert enroll(app, fresh, people_of_folder(people)).added == 3


def test_what_vanished_is_told(app, gallery, people, tmp_path):
    (people / "Ann" / "0.png").unlink()
    gallery.add(["Eve"], np.ones((1, tiny.DIM)), [1.0], ["/no/such/folder/eve.png"])
    assert [picture.source for picture in vanished(gallery, people)] == [str(people.resolve() / "Ann" / "0.png")]
    assert vanished(gallery, tmp_path / "people2") == []


def test_a_changed_file_without_a_face_loses_its_row(app, gallery, people):
    write(people / "Bob.png", photo(seed=9))
    result = enroll(app, gallery, people_of_folder(people))
    assert result.left_out == {people / "Bob.png": "no face found"} and result.changed == [people / "Bob.png"]
    assert gallery.people() == {"Ann": 2} and result.nobody == ["Bob"]


def test_an_old_gallery_learns_the_content(app, people, tmp_path):
    gallery = FileGallery()
    enroll(app, gallery, people_of_folder(people))
    fields = {name: getattr(gallery, name) for name in ("names", "sources", "embeddings", "qualities")}
    np.savez(tmp_path / "old.npz", model=np.array(gallery.model), **fields)
    old = FileGallery.load(tmp_path / "old.npz")
    assert old.digests.tolist() == [""] * 3
    assert len(enroll(app, old, people_of_folder(people)).changed) == 3
    assert enroll(app, old, people_of_folder(people)).added == 0 and old.people() == {"Ann": 2, "Bob": 1}


def test_doubtful_pictures_are_named(app, people, monkeypatch):
    write(people / "Ann" / "group.png", photo((4, 4), (15, 15), (25, 25), seed=4))
    monkeypatch.setattr(enrollment, "LOW_QUALITY", 1.01)
    doubts = enroll(app, FileGallery(), people_of_folder(people)).doubts
    assert doubts[people / "Ann" / "group.png"].startswith("3 faces, using the largest; quality 0.")
    assert doubts[people / "Bob.png"].endswith("perhaps no face, or one in profile")


def test_one_name_in_two_forms_is_one_person(app, gallery, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    for i, name in enumerate((composed, decomposed)):
        write(tmp_path / f"{i}.png", photo((4 + 9 * i, 4), seed=20 + i))
        enroll(app, gallery, [(name, tmp_path / f"{i}.png")])
    assert gallery.people()[composed] == 2
    assert gallery.remove(decomposed) == 2


def test_pictures_that_fail_when_read_do_not_stop_the_others(app, people, monkeypatch):
    (people / "Ann" / "2.png").symlink_to(people / "nowhere.png")
    (people / "Bob.png").write_bytes(b"no image")
    result = enroll(app, FileGallery(), people_of_folder(people))
    assert result.added == 2
    assert result.left_out[people / "Ann" / "2.png"] == "cannot be read: No such file or directory"
    assert result.left_out[people / "Bob.png"].startswith("could not be read as an image: 8 bytes")


@pytest.fixture
def crop():
    return np.random.default_rng(3).integers(0, 90, (112, 112, 3), dtype=np.uint8)


def test_crops_are_taken_as_aligned(app, people, crop, tmp_path):
    folder = tmp_path / "crops"
    write(folder / "Ann" / "0.png", crop)
    write(folder / "Bob" / "0.png", cv2.resize(crop[::-1], (224, 224), interpolation=cv2.INTER_NEAREST))
    write(folder / "Bob" / "flat.png", crop[:50])
    gallery = FileGallery()
    assert set(enroll(app, gallery, people_of_folder(folder)).left_out.values()) == {"no face found"}
    result = enroll(app, gallery, people_of_folder(folder), are_crops=True)
    assert result.added == 2
    assert result.left_out == {
        folder / "Bob" / "flat.png": "an aligned crop must be a square, got one of 112 x 50 pixels"
    }
    expected = app.embed_aligned([crop])[0]
    np.testing.assert_allclose(gallery.embeddings[0], expected / np.linalg.norm(expected), atol=1e-6)
    (face,) = recognition.recognize(app, gallery, crop, is_crop=True)
    assert face.name == "Ann" and face.nearest.similarity == pytest.approx(1, abs=1e-5) and face.quality > 0.99


def test_faces_that_fill_their_picture_are_found(app):
    """The tiny detector sees nothing in an image of its face alone, as real ones often do."""
    seen = []
    detect = app.det_model.detect

    def blind_to_tight_faces(img, *args, **kwargs):
        seen.append(img.shape)
        boxes, landmarks = detect(img, *args, **kwargs)
        if img[:8].any():  # no dark border above
            return boxes[:0], landmarks[:0]
        return boxes, landmarks

    app.det_model.detect = blind_to_tight_faces
    picture = photo(seed=3)
    picture[112:128, 112:128] = 240
    wider = cv2.copyMakeBorder(picture, 128, 128, 128, 128, cv2.BORDER_CONSTANT)
    (expected,) = app.get(wider)
    del seen[:]
    (face,), (same,) = app.get(picture), app.get_batch([picture])[0]
    assert seen == [(256, 256, 3), (512, 512, 3)] * 2
    np.testing.assert_allclose(face.bbox, expected.bbox - 128, atol=1e-3)
    np.testing.assert_allclose(face.kps, expected.kps - 128, atol=1e-3)
    np.testing.assert_allclose(face.embedding, expected.embedding, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(same.embedding, face.embedding, atol=1e-4)
    large = cv2.resize(picture, (2560, 2560), interpolation=cv2.INTER_NEAREST)
    (found,) = app.get(large)
    assert seen[-1] == (2560, 2560, 3)  # with a border around the half of it
    np.testing.assert_allclose(found.bbox, 10 * face.bbox, rtol=0.05)
    assert app.get(photo(seed=5)) == []


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_command_line(app, people, gallery_place, tmp_path, caplog):
    index, pack = gallery_place, ("--pack", "tiny", "--root", tmp_path / "root")
    with caplog.at_level(logging.WARNING):
        call("gallery", "add", index, people, *pack)
    write(people / "Bob.png", photo((3, 3), (20, 20), seed=12))
    (people / "Ann" / "1.png").rename(people / "Ann" / "one.png")
    (people / "Ann" / "0.png").unlink()
    output = call("gallery", "add", index, people, *pack).output
    assert "Bob.png: changed, embedded again\n" in output
    assert f"one.png: moved from {people.resolve() / 'Ann' / '1.png'}\n" in output
    assert "Bob.png: 2 faces, using the largest\n" in output
    assert "0.png: no longer exists, still in the gallery; --prune removes it\n" in output
    assert "1 image added (1 changed), 1 moved, 2 people\n" in output
    output = call("gallery", "add", index, people, "--prune", *pack).output
    assert "0.png: no longer exists, removed\n" in output
    assert "0 images added, 2 people, 1 removed, 2 skipped: already in the gallery\n" in output
    with reading(index) as gallery:
        assert gallery.people() == {"Ann": 1, "Bob": 1}


def test_crops_on_the_command_line(app, crop, tmp_path):
    pack = ("--pack", "tiny", "--root", tmp_path / "root", "--crops")
    write(tmp_path / "crops" / "Ann.png", crop)
    index = tmp_path / "index.npz"
    assert "1 image added" in call("gallery", "add", index, tmp_path / "crops", *pack).output
    for gallery in (index, tmp_path / "crops"):
        assert "  1  Ann " in call("recognize", gallery, tmp_path / "crops" / "Ann.png", *pack).output
