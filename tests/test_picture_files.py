import io
import logging
import unicodedata

import cv2
import numpy as np
import pytest
from PIL import Image

from insightface_kprpe.app.enrollment import people_of_folder
from insightface_kprpe.data import picture_files
from insightface_kprpe.data.crops import open_crops
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.image_codec import decode_image
from insightface_kprpe.data.image_header import image_kind, image_size
from insightface_kprpe.data.picture_files import list_people, list_pictures, read_image_file
from insightface_kprpe.data.record_tools import pack_folder

COLORS = ((200, 30, 40), (20, 180, 60), (50, 60, 220))


def drawn(size=(40, 24), color=COLORS[0]):
    """(H, W, 3) RGB, plain, so that every kind of compression keeps it."""
    return np.full((size[1], size[0], 3), color, np.uint8)


def encoded(form, image=None, **options):
    file = io.BytesIO()
    Image.fromarray(drawn() if image is None else image).save(file, form, **options)
    return file.getvalue()


def heic(image):
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(image)).save(file, quality=95)
    return file.getvalue()


FORMS = {"JPEG": ".jfif", "PNG": ".png", "GIF": ".gif", "BMP": ".bmp", "WebP": ".webp", "TIFF": ".tif", "AVIF": ".avif"}


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_is_told_measured_and_read(form, tmp_path):
    if FORMS[form] not in picture_files.readable_suffixes():
        pytest.skip(f"the installed OpenCV reads no {form}")
    data = encoded(form.upper())
    assert image_kind(data) == form and image_size(data) == (40, 24)
    path = tmp_path / f"a{FORMS[form].upper()}"
    path.write_bytes(data)
    assert list_pictures(tmp_path) == [path]
    assert np.abs(read_image_file(path).astype(int) - drawn()).max() < 12


def test_heic_is_read_with_its_extra(tmp_path):
    data = heic(drawn((64, 48)))
    assert image_kind(data) == "HEIC" and image_size(data) >= (64, 48)
    (tmp_path / "IMG_1.HEIC").write_bytes(data)
    (picture,) = list_pictures(tmp_path)
    assert np.abs(read_image_file(picture).astype(int) - drawn((64, 48))).max() < 12


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (encoded("WEBP", lossless=True), (40, 24)),
        (encoded("WEBP", np.dstack([drawn(), drawn()[..., :1] // 2])), (40, 24)),  # with alpha: the extended form
        (encoded("JPEG", progressive=True, exif=Image.Exif()), (40, 24)),
        (b"MM\0*\0\0\0\x08\0\x02" + bytes.fromhex("0100000300000001 00070000 0101000400000001 00000009"), (7, 9)),
        (b"BM" + bytes(12) + (12).to_bytes(4, "little") + bytes.fromhex("05000600"), (5, 6)),
        (b"BM" + bytes(12) + (40).to_bytes(4, "little") + bytes.fromhex("05000000faffffff"), (5, 6)),
        (b"\xff\xd8\xff\xe0\x00", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"MM\0*\xff\xff\xff\xff", None),
        (b"", None),
    ],
)
def test_sizes_in_unusual_heads(data, size):
    assert image_size(data) == size


def test_of_a_gif_the_first_frame(tmp_path):
    if ".gif" not in picture_files.readable_suffixes():
        pytest.skip("the installed OpenCV reads no GIF")
    frames = [Image.fromarray(drawn(color=color)) for color in COLORS]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.abs(read_image_file(tmp_path / "a.gif").astype(int) - COLORS[0]).max() < 12


def test_a_photo_is_turned_as_its_entry_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", exif=exif))
    assert read_image_file(tmp_path / "a.jpg").shape == (40, 24, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_the_size_is_judged_before_anything_is_decoded(form, monkeypatch):
    huge = bytearray(encoded(form))
    if form == "PNG":
        huge[16:24] = (30_000).to_bytes(4, "big") * 2
    else:
        at = huge.index(b"\xff\xc0")
        huge[at + 5 : at + 9] = (30_000).to_bytes(2, "big") * 2
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match="30000 x 30000 pixels exceed the limit of 200 megapixels; set INSIGHT"):
        decode_image(bytes(huge))


def test_the_limit_can_be_changed(monkeypatch):
    monkeypatch.setenv("INSIGHTFACE_KPRPE_MAX_MEGAPIXELS", "0.0009")
    with pytest.raises(ValueError, match=r"40 x 24 pixels exceed the limit of 0\.0009 megapixels"):
        decode_image(encoded("PNG"))
    monkeypatch.setenv("INSIGHTFACE_KPRPE_MAX_MEGAPIXELS", "0.001")
    decode_image(encoded("PNG"))
    monkeypatch.setenv("INSIGHTFACE_KPRPE_MAX_MEGAPIXELS", "nan")
    with pytest.raises(ValueError, match="exceed the limit of nan megapixels"):
        decode_image(encoded("PNG"))
    monkeypatch.setenv("INSIGHTFACE_KPRPE_MAX_MEGAPIXELS", "many")
    with pytest.raises(ValueError, match="INSIGHTFACE_KPRPE_MAX_MEGAPIXELS must be a number, got 'many'"):
        decode_image(encoded("PNG"))


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded("PNG", drawn((112, 112))))


HIDDEN = (".ipynb_checkpoints/0.png", "Ann/.ipynb_checkpoints/0.png", "__MACOSX/Ann/._0.png", "Ann/._0.png",
          "@eaDir/0.png", "#recycle/0.png", "System Volume Information/0.png", "Ann/Thumbs.db",
          ".DS_Store")  # fmt: skip


@pytest.fixture
def people(tmp_path):
    """Ann and Bob; Cleo and Dora have nothing that can be read; all kinds of things that systems leave behind."""
    folder = tmp_path / "people"
    write(folder, "Ann/0.png", "Ann/deep/1.png", "Bob/0.png", *HIDDEN)
    write(folder, "Cleo/0.mov", "Ann/film.mov", "Dora/a.CR2", "Ann/README", "ldmk_5points.csv", "notes.txt")
    (folder / "ldmk_5points.csv").unlink()
    (folder / "Eve").mkdir()
    return folder


KEPT = ["Ann/0.png", "Ann/deep/1.png", "Bob/0.png"]


def test_all_verbs_list_the_same_pictures(people, caplog, tmp_path):
    relative = [str(path.relative_to(people)) for path in open_crops(people).paths]
    assert relative == KEPT
    dataset = open_faces(people)
    assert [str(path.relative_to(people)) for path in dataset.source.paths] == KEPT
    assert dataset.labels.tolist() == [0, 0, 1]
    assert [(name, str(path.relative_to(people))) for name, path in people_of_folder(people)] == [
        ("Ann", "Ann/0.png"), ("Ann", "Ann/deep/1.png"), ("Bob", "Bob/0.png"),
    ]  # fmt: skip
    assert [str(path.relative_to(people)) for path in list_pictures(people)] == KEPT
    assert pack_folder(people, tmp_path / "out").images == 3


def test_what_is_not_read_is_counted_and_named(people, caplog):
    with caplog.at_level(logging.WARNING):
        list_people(people)
    kinds, nobody = caplog.messages
    assert kinds.endswith(
        "left out, not readable images: 1 without suffix (Ann/README), 1 .cr2 (Dora/a.CR2), "
        "2 .mov (Ann/film.mov, Cleo/0.mov)"
    )
    assert nobody.endswith("no images of 3 people: Cleo, Dora, Eve")


def test_pictures_beside_the_people_are_theirs_or_named(people, caplog):
    write(people, "Zoe.png", "Ann.png")
    assert list(list_people(people)) == ["Ann", "Bob"]
    assert "left out: 2 images next to the people's folders (Ann.png, Zoe.png)" in caplog.text
    caplog.clear()
    found = list_people(people, single=True)
    assert list(found) == ["Ann", "Bob", "Zoe"] and len(found["Ann"]) == 3
    assert "left out: 2" not in caplog.text and "1 .txt (notes.txt)" in caplog.text


def test_heic_without_its_extra_is_named_with_the_remedy(tmp_path, caplog, monkeypatch):
    write(tmp_path, "Ann/0.png", "Bob/IMG_1.HEIC")
    monkeypatch.setattr(picture_files, "readable_suffixes", lambda: picture_files._ALWAYS)
    assert list(list_people(tmp_path)) == ["Ann"]
    assert "1 .heic (Bob/IMG_1.HEIC); HEIC needs: pip install 'insightface-kprpe[heif]'" in caplog.text
    assert "no images of 1 people: Bob" in caplog.text


def test_kinds_that_an_old_opencv_does_not_read_are_named(tmp_path, caplog, monkeypatch):
    write(tmp_path, "Ann/0.png", "Ann/1.avif")
    monkeypatch.setattr(picture_files, "readable_suffixes", lambda: picture_files._ALWAYS)
    assert [path.name for path in list_pictures(tmp_path)] == ["0.png"]
    assert "1 .avif (Ann/1.avif); the installed OpenCV" in caplog.text and "does not read .avif" in caplog.text


def test_composed_and_decomposed_names_are_one_person(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))
    write(tmp_path, f"{composed}/0.png", f"{decomposed}/1.png", "Zo/0.png", "Zoé/0.png")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system keeps one form of a name only")
    found = list_people(tmp_path)
    assert list(found) == ["Zo", "Zoé", composed]
    assert sorted(path.name for path in found[composed]) == ["0.png", "1.png"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "elsewhere", "0.png")
    people = tmp_path / "people"
    write(people, "Ann/0.png")
    (people / "Bob").symlink_to(tmp_path / "elsewhere")
    (people / "Ann" / "round").symlink_to(people)
    found = list_people(people)
    assert {name: len(paths) for name, paths in found.items()} == {"Ann": 2, "Bob": 1}


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image not found: .*absent\.png"):
        read_image_file(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=rf"{tmp_path} must be a file \(image\), got a folder"):
        read_image_file(tmp_path)
    (tmp_path / "a.png").write_bytes(encoded("PNG")[:60])
    with pytest.raises(ValueError, match=r"a\.png could not be read as an image: 60 bytes of PNG"):
        read_image_file(tmp_path / "a.png")
