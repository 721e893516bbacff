"""The demo: what it makes of photos, without a page; the page's server; and the page in a browser."""

import os
import shutil
import signal
import socket
import sys
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_packs as tiny
import torch
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.app import demo_page, recognition
from insightface_kprpe.app.demo_page import Demo
from insightface_kprpe.app.file_gallery import FileGallery
from insightface_kprpe.app.photo_report import (
    COLUMNS,
    PhotoReport,
    attention_pictures,
    crops_picture,
    report_photos,
    similarity_picture,
)
from insightface_kprpe.geometry import align_face

NET = {"patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 3.0, "num_features": 8}


pytestmark = pytest.mark.usefixtures("unregistered")


@pytest.fixture
def app(tiny_app):
    return tiny_app


@pytest.fixture
def photos(tmp_path):
    """Two faces, one face, none, and no photo."""
    cells = {"two.png": [(5, 5), (20, 14)], "one.png": [(12, 9)], "dark.png": []}
    for seed, (name, where) in enumerate(cells.items()):
        cv2.imwrite(str(tmp_path / name), tiny.draw_picture(where, seed=seed))
    (tmp_path / "torn.jpg").write_bytes(b"no picture")
    return [tmp_path / name for name in (*cells, "torn.jpg")]


def network(position):
    torch.manual_seed(0)
    net = ik.VisionTransformer(**NET, position=position).eval()
    if position == "kprpe":
        torch.nn.init.normal_(net.keypoint_linear.weight)
    return net


def test_a_report_has_every_face_of_every_photo(app, photos):
    gallery = FileGallery()
    faces = [face for photo in photos[:2] for face in sorted(app.get(cv2.imread(str(photo))), key=lambda f: f.bbox[0])]
    embeddings = np.stack([face.normed_embedding for face in faces])
    recognition.check_model(app, gallery)
    gallery.add(["Ann", "Bob"], embeddings[:2], [1, 1], ["a", "b"])
    report = report_photos(app, gallery, photos, threshold=0.99999)
    assert [row[:3] for row in report.rows] == [
        [1, "two.png", "Ann"],
        [2, "two.png", "Bob"],
        [3, "one.png", f"unknown (nearest: {report.rows[2][2].split()[-1]}"],
    ]
    assert all(len(row) == len(COLUMNS) for row in report.rows)
    assert report.rows[0][3:] == [
        "1.000", f"{faces[0].quality:.3f}", f"{faces[0].det_score:.3f}", f"{np.linalg.norm(faces[0].embedding):.1f}",
        "24 24 56 56",
    ]  # fmt: skip
    np.testing.assert_allclose(report.similarity, embeddings @ embeddings.T, atol=1e-5)
    assert report.notes[0] == "dark.png: no face found"
    assert report.notes[1].startswith("torn.jpg: could not be read as an image") and len(report.notes) == 2
    assert [caption for _, caption in report.photos] == ["two.png: 2 faces", "one.png: 1 face", "dark.png: 0 faces"]
    drawn, original = report.photos[0][0], cv2.imread(str(photos[0]))[..., ::-1]
    assert drawn.shape == original.shape and (drawn != original).any()
    np.testing.assert_array_equal(report.photos[2][0], cv2.imread(str(photos[2]))[..., ::-1])


def test_crops_and_keypoints_are_those_of_the_recognition_model(app, photos, tmp_path):
    report = report_photos(app, FileGallery(), photos[1:2], 0.3)
    picture = cv2.imread(str(photos[1]))
    (face,) = app.get(picture)
    crop, keypoints = align_face(picture, face.kps)
    np.testing.assert_array_equal(report.crops[0], crop[..., ::-1])
    np.testing.assert_allclose(report.keypoints[0], keypoints, atol=1e-6)
    assert report.rows[0][2:4] == ["", ""]  # nobody is known
    unaligned = recognition.open_pack("tiny", tmp_path / "root", aligned=False, **tiny.CPU)
    other = report_photos(unaligned, FileGallery(), photos[1:2], 0.3)
    assert (other.crops[0] != report.crops[0]).any()
    tiny.write_pack(tmp_path / "root", "plain", twin=False)
    stock = recognition.open_pack("plain", tmp_path / "root", **tiny.CPU)
    same = report_photos(stock, FileGallery(), photos[1:2], 0.3)
    np.testing.assert_array_equal(same.crops[0], report.crops[0])


def test_a_large_photo_is_shown_smaller(app, tmp_path):
    cv2.imwrite(str(tmp_path / "large.png"), np.repeat(np.repeat(tiny.draw_picture([(9, 9)]), 10, 0), 10, 1))
    report = report_photos(app, FileGallery(), [tmp_path / "large.png"], 0.3)
    assert report.photos[0][0].shape == (1600, 1600, 3) and len(report.rows) == 1


def test_pictures_of_a_report(app, photos):
    report = report_photos(app, FileGallery(), photos, 0.3)
    sheet = crops_picture(report)
    assert sheet.shape == (144 + 24, 3 * 144, 3) and sheet.dtype == np.uint8
    alone = report_photos(app, FileGallery(), photos[1:2], 0.3)
    assert similarity_picture(alone, 0.3) is None and crops_picture(alone) is not None
    assert similarity_picture(PhotoReport(), 0.3) is None and crops_picture(PhotoReport()) is None


def green(picture):
    """Pixels of frames around similar pairs."""
    return int((np.abs(picture.astype(int) - (16, 112, 48)).max(-1) < 8).sum())


def test_similar_pairs_are_framed_and_faces_are_not_compared_with_themselves(app, photos):
    report = report_photos(app, FileGallery(), photos, 0.3)
    report.similarity[:] = [[1, 0.5, 0.2], [0.5, 1, 0.1], [0.2, 0.1, 1]]
    none, one, two = (green(similarity_picture(report, threshold)) for threshold in (0.6, 0.5, 0.2))
    assert none == 0 and one > 200 and two == pytest.approx(2 * one, rel=0.05)


def test_attention_of_a_face(app, photos):
    report = report_photos(app, FileGallery(), photos, 0.3)
    kprpe, plain = network("kprpe"), network(None)
    both, offsets = attention_pictures(report, 2, "nose", kprpe, plain)
    (alone, same) = attention_pictures(report, 2, "nose", kprpe)
    assert both.shape[0] > alone.shape[0] and both.shape[1] == alone.shape[1]
    np.testing.assert_array_equal(offsets, same)
    assert (attention_pictures(report, 2, "left eye", kprpe)[1] != offsets).any()
    assert (attention_pictures(report, 3, "nose", kprpe)[1] != offsets).any()
    with pytest.raises(ValueError, match="face must be from 1 to 3, got 4"):
        attention_pictures(report, 4, "nose", kprpe)
    with pytest.raises(ValueError, match="point must be one of left eye, .*, got 'chin'"):
        attention_pictures(report, 1, "chin", kprpe)


def test_what_a_page_shows(app, photos):
    demo = Demo(app, FileGallery(), 0.3, "about", network("kprpe"))
    report, notes, pictures, rows, crops, matrix = demo.show([str(photo) for photo in photos], 0.3)
    assert len(pictures) == len(rows) == 3 and crops.ndim == matrix.ndim == 3
    assert notes.startswith("- dark.png: no face found\n- torn.jpg: ")
    assert [picture.dtype for picture in demo.show_maps(report, 3, "nose")] == [np.uint8, np.uint8]
    assert demo.show_maps(report, None, "nose") == demo.show_maps(None, 1, "nose") == [None, None]
    assert demo.show_maps(report, 4, "nose") == [None, None]  # of photos that were there before
    report, *shown = demo.show(None, 0.3)
    assert shown == ["", [], [], None, None]


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="the extra demo is not installed")


@pytest.fixture
def demo(app, gradio):
    gallery = FileGallery()
    recognition.check_model(app, gallery)
    gallery.add(["Ann"], np.ones((1, tiny.DIM)), [1.0], ["a"])
    return Demo(app, gallery, 0.3, "Pack tiny, gallery of 1 person", network("kprpe"), network(None))


def test_the_page_is_served_to_this_machine_alone(demo):
    before = os.environ.get("GRADIO_TEMP_DIR")
    with demo_page.serving(demo) as address:
        port = int(address.rstrip("/").rsplit(":", 1)[1])
        assert address.startswith("http://127.0.0.1:")
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir()
        with urllib.request.urlopen(address) as page:
            assert "insightface-kprpe" in page.read().decode()
        # Also this machine's, and reached where a server listens on all of its addresses.
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=5):
            pass
        with pytest.raises(ValueError, match=f"port {port} is taken on 127.0.0.1; choose another with --port"):
            demo_page.serving(demo, port).__enter__()
    assert not folder.exists() and os.environ.get("GRADIO_TEMP_DIR") == before
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def call(*arguments):
    return CliRunner().invoke(cli.app, ["demo", *map(str, arguments)])


def test_without_a_pack_the_command_that_makes_one_is_told(gradio, tmp_path):
    result = call("--root", tmp_path)
    assert isinstance(result.exception, FileNotFoundError)
    assert "insightface-kprpe quickstart makes one, for --root work_dirs/quickstart/insightface" in str(
        result.exception
    )


def test_what_cannot_be_shown_is_told_before_the_page_is(gradio, tmp_path):
    assert "--against is drawn beside --maps" in str(call("--against", "run").exception)
    assert "absent" in str(call("--maps", tmp_path / "absent").exception)
    assert "gallery not found" in str(call("--gallery", tmp_path / "absent.npz").exception)


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'insightface-kprpe[demo]'" in str(call().exception)


def test_command_line(gradio, app, photos, tmp_path, monkeypatch):
    """It serves what it was told to, until it is asked to end."""
    served, serving = [], demo_page.serving

    def serve_and_be_ended(shown, *rest):
        served.append(shown)
        os.kill(os.getpid(), signal.SIGTERM)
        return serving(shown, *rest)

    people = tmp_path / "people"
    people.mkdir()
    shutil.copy(photos[1], people / "Ann.png")
    monkeypatch.setattr(demo_page, "serving", serve_and_be_ended)
    result = call("--root", tmp_path / "root", "--pack", "tiny", "--gallery", people, "--threshold", "0.4")
    assert result.exception is None, result.output
    assert "http://127.0.0.1:" in result.output and "is ready for photos; Ctrl-C ends it" in result.output
    assert result.output.endswith("ended; what was dropped on the page is deleted\n")
    (shown,) = served
    assert shown.about == "Pack tiny, gallery of 1 person" and shown.threshold == 0.4 and shown.kprpe is None


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser():
    pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,3000"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=Service(programs[1]))
    yield browser
    browser.quit()


@pytest.mark.slow
def test_photos_dropped_on_the_page_are_shown(demo, browser, photos, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def until(condition):
        return WebDriverWait(browser, 120).until(lambda _: condition())

    def text():
        return browser.find_element(By.TAG_NAME, "body").text

    def pictures():
        script = "return [...document.images].filter(i => i.complete && i.naturalWidth > 50).map(i => i.src)"
        return browser.execute_script(script)

    with demo_page.serving(demo) as address:
        browser.get(address)
        (files,) = until(lambda: browser.find_elements(By.CSS_SELECTOR, "input[type=file]"))
        assert "Pack tiny, gallery of 1 person" in text() and "How similar the faces are" not in text()
        files.send_keys("\n".join(map(str, photos)))
        # three photos, the crops, the matrix, and two pictures of attention
        until(lambda: len(pictures()) == 7)
        assert "dark.png: no face found" in text() and "torn.jpg: could not be read as an image" in text()
        table = text().partition("embedding norm")[2]
        assert table.count("two.png") == 2 and table.count("one.png") == 1
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert {photo.name for photo in photos} <= {path.name for path in folder.rglob("*")}
        before = pictures()[-2:]
        browser.save_screenshot(str(tmp_path / "page.png"))
        query = browser.find_element(By.CSS_SELECTOR, "input[aria-label=query]")
        query.click()
        until(lambda: browser.find_elements(By.CSS_SELECTOR, "li[role=option], ul[role=listbox] li"))
        next(o for o in browser.find_elements(By.CSS_SELECTOR, "ul[role=listbox] li") if "left eye" in o.text).click()
        until(lambda: len(pictures()) == 7 and not set(before) & set(pictures()[-2:]))
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        assert all(url.startswith((address, "data:", "blob:")) for url in loaded)
    assert not folder.exists()
