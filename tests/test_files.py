import os
import signal

import pytest

from insightface_kprpe import files
from insightface_kprpe.files import (
    atomic_folder,
    atomic_path,
    check_writable,
    locked,
    read_text,
    user_file,
    write_atomically,
)


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


def test_texts_are_utf8_or_named_with_their_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffZoë\r\n".encode())
    assert read_text(path) == "Zoë\r\n"
    path.write_bytes("one\ntwo\nZoë\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"a\.txt: line 3: byte 0xeb is not UTF-8 \(Latin-1, perhaps\); save the file as"
    ):
        read_text(path)
    path.write_bytes("Zoë\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt: the text is UTF-16; save it as UTF-8"):
        read_text(path)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    assert user_file(str(tmp_path / "file")) == tmp_path / "file"
    with pytest.raises(FileNotFoundError, match="list not found: .*absent; make one"):
        user_file(tmp_path / "absent", "list", "make one")
    with pytest.raises(FileNotFoundError, match="list not found: .*; a part of the path is a file"):
        user_file(tmp_path / "file" / "x", "list")
    with pytest.raises(ValueError, match=r"must be a file \(list\), got a folder"):
        user_file(tmp_path, "list")
    with pytest.raises(ValueError, match=r"loop \(list\) cannot be read: Too many levels"):
        user_file(tmp_path / "loop", "list")


def killed(work):
    """Run something in a process that kills itself in the middle of it."""
    child = os.fork()
    if not child:
        try:
            work(lambda: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def names(folder):
    return sorted(path.name for path in folder.iterdir())


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process to kill")


@needs_fork
def test_whether_a_file_can_be_written_is_said_before(tmp_path):
    check_writable(tmp_path / "new" / "a.npz", 1000)
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path / "new", "Is a directory"),
        (tmp_path / "file" / "a.npz", "File exists|Not a directory"),
    ):
        with pytest.raises(OSError, match=rf"cannot be written \(({message})\): .*{path.name}"):
            check_writable(path)


def test_a_block_is_entered_by_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "lock"):
        second = os.open(tmp_path / "lock", os.O_RDWR)
        assert not files._lock(second, wait=False)
    assert files._lock(second, wait=False)
    os.close(second)


def test_the_next_writer_sweeps_what_a_killed_one_left(tmp_path):
    path, folder = tmp_path / "train.rec", tmp_path / "pack"

    def write_file(kill):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            kill()

    def write_folder(kill):
        with atomic_folder(folder) as temporary:
            (temporary / "half").write_bytes(b"half")
            kill()

    killed(write_file)
    killed(write_folder)
    assert len(names(tmp_path)) == 2
    write_atomically(tmp_path / "train.idx", b"another file")
    assert len(names(tmp_path)) == 3
    write_atomically(path, b"whole")
    with atomic_folder(folder):
        pass
    assert names(tmp_path) == ["pack", "train.idx", "train.rec"]


def test_a_writer_that_lives_is_left_alone(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as first:
        first.write_bytes(b"first")
        write_atomically(path, b"second")
        assert first.exists()
    assert path.read_bytes() == b"first" and names(tmp_path) == ["file"]


@needs_fork
def test_a_folder_that_was_moved_aside_comes_back(tmp_path, monkeypatch):
    """Killed between the two renames, of which the first moved the old folder away."""
    folder = tmp_path / "pack"
    with atomic_folder(folder) as temporary:
        (temporary / "old").write_text("old")
    replace = os.replace

    def replace_once(kill):
        def replacing(source, target):
            replace(source, target)
            kill()

        monkeypatch.setattr(os, "replace", replacing)
        with atomic_folder(folder) as temporary:
            (temporary / "new").write_text("new")

    killed(replace_once)
    assert not folder.exists()
    with pytest.raises(RuntimeError), atomic_folder(folder):
        assert names(folder) == ["old"]
        raise RuntimeError
    assert names(tmp_path) == ["pack"] and names(folder) == ["old"]
