import pytest

from insightface_kprpe.files import atomic_folder, atomic_path, write_atomically


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "sub" / "file.txt"
    write_atomically(path, b"old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "pack"
    for content in ("first", "second"):
        with atomic_folder(folder) as temporary:
            (temporary / content).write_text(content)
        assert [file.name for file in folder.iterdir()] == [content]
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "third").write_text("half")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["pack"]
    assert [file.name for file in folder.iterdir()] == ["second"]
