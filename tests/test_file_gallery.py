import os
import signal
import zipfile

import numpy as np
import pytest

from insightface_kprpe.app.file_gallery import FileGallery


@pytest.fixture
def gallery():
    gallery = FileGallery("model")
    gallery.add(["Ann", "Bob", "Ann"], np.float32([[2, 0, 0], [0, 3, 0], [0, 0, 1]]), [0.9, 0.5, 0.3], ["a", "b", "c"])
    return gallery


def test_save_and_load(gallery, tmp_path):
    gallery.save(tmp_path / "people.npz")
    again = FileGallery.load(tmp_path / "people.npz")
    for field in ("model", "names", "sources", "embeddings", "qualities"):
        np.testing.assert_array_equal(getattr(again, field), getattr(gallery, field))
    assert [path.name for path in tmp_path.iterdir()] == ["people.npz"]


@pytest.mark.parametrize("content", [b"", b"no gallery", b"PK\x03\x04 nor this", b"\x80\x04N."])
def test_other_files_are_no_galleries(tmp_path, content):
    (tmp_path / "people.npz").write_bytes(content)
    with pytest.raises(ValueError, match="is not a gallery, or is damaged") as error:
        FileGallery.load(tmp_path / "people.npz")
    assert "pickle" not in str(error.value)
    np.savez(tmp_path / "pickled.npz", names=np.array([{}], dtype=object), model="")
    with pytest.raises(ValueError, match="is not a gallery"):
        FileGallery.load(tmp_path / "pickled.npz")
    with pytest.raises(FileNotFoundError, match="gallery not found"):
        FileGallery.load(tmp_path / "absent.npz")


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
        FileGallery.load(path)


def test_a_gallery_that_claims_more_than_it_holds_is_not_unpacked(tmp_path):
    header = {"descr": "<f4", "fortran_order": False, "shape": (10**9, 512)}
    archive = zipfile.ZipFile(write_gallery(tmp_path / "people.npz"), "a")
    with archive, archive.open("embeddings.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"embeddings\.npy does not hold \(1000000000, 512\) of float32"):
        FileGallery.load(tmp_path / "people.npz")


def test_galleries_at_impossible_places_are_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"must be a file \(gallery\), got a folder"):
        FileGallery.load(tmp_path)
    with pytest.raises(ValueError, match=r"loop \(gallery\) cannot be read"):
        FileGallery.load(tmp_path / "loop")
    with pytest.raises(FileNotFoundError, match="gallery not found: .* a part of the path is a file"):
        FileGallery.load(tmp_path / "file" / "people.npz")


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
    assert FileGallery.load(tmp_path / "people.npz").people() == {"Ann": 2, "Bob": 1}
    assert len(list(tmp_path.iterdir())) == 2  # with the half-written one, under another name
