"""Files: whether a user's can be read, and writing so that a kill at any moment leaves the old content or the new."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY, _OLD = ".tmp", ".old"


def user_file(path: str | Path, kind: str = "file", remedy: str = "") -> Path:
    """A file given by a user, checked to exist and be readable.

    Args:
        path: what was named.
        kind: what to call it in an error, such as "gallery".
        remedy: what to do if it does not exist.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, not a regular file, or not readable.
    """
    path, remedy = Path(path), f"; {remedy}" if remedy else ""
    try:
        if not path.is_file() and path.exists():
            raise ValueError(f"{path} must be a file ({kind}), got {'a folder' if path.is_dir() else 'something else'}")
        with open(path, "rb"):
            return path
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{kind} not found: {path}{remedy}") from error
    except NotADirectoryError as error:
        raise FileNotFoundError(f"{kind} not found: {path}; a part of the path is a file, not a folder") from error
    except (OSError, RuntimeError) as error:  # in some versions pathlib raises RuntimeError for a loop of links
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} ({kind}) cannot be read: {why}") from error


def read_text(path: str | Path, kind: str = "file", remedy: str = "") -> str:
    """The text of a user's file in UTF-8, with or without a byte order mark.

    Args:
        path, kind, remedy: see :func:`user_file`, which also says what is raised.

    Raises:
        ValueError: the text is not UTF-8.
    """
    content = user_file(path, kind, remedy).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, content, error.start) from error


def not_utf8(path: str | Path, content: bytes, at: int) -> ValueError:
    """The error for a text that is not UTF-8 from byte ``at`` of ``content`` on."""
    line = content.count(b"\n", 0, at) + 1
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return ValueError(f"{path}: the text is UTF-16; save it as UTF-8")
    return ValueError(
        f"{path}: line {line}: byte 0x{content[at]:02x} is not UTF-8 (Latin-1, perhaps); save the file as UTF-8"
    )


def sync_folder(path: Path) -> None:
    """Make renames in a folder durable (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: str | Path, size: int = 0) -> None:
    """Make sure, before long work, that a file can be written; its folder is made where missing.

    Args:
        path: of the file.
        size: bytes that it takes, about.

    Raises:
        OSError: it cannot; the error names the file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(bytes(size))
            file.flush()
    except OSError as error:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", str(path)) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path next to ``path`` to write to; renamed to it when the block ends well, removed when it raises.

    Left-overs of killed writers of ``path`` are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary, lock = _claim(path, _temporary_file)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    sync_folder(path.parent)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder next to ``path``; takes its place when the block ends well, removed when it raises.

    Left-overs of killed writers of ``path`` are removed, or restored if they are the old folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary, lock = _claim(path, tempfile.mkdtemp)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            # A folder cannot replace a full one in one step: move the old one aside first.
            old, old_lock = _claim(path, tempfile.mkdtemp, _OLD)
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
            os.close(old_lock)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Keep other processes out of the same block; where the system or the file system has no locks, nobody."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _temporary_file(**where: object) -> str:
    descriptor, name = tempfile.mkstemp(**where)
    os.close(descriptor)
    return name


def _claim(path: Path, make: Callable[..., str], suffix: str = _TEMPORARY) -> tuple[Path, int]:
    """Make a temporary file or folder next to ``path``, and a descriptor whose lock shows that its writer is alive."""
    while True:
        temporary = Path(make(dir=path.parent, prefix=f".{path.name}.", suffix=suffix))
        if fcntl is None:
            return temporary, os.open(os.devnull, os.O_RDONLY)
        descriptor = os.open(temporary, os.O_RDONLY)
        if _lock(descriptor, wait=True) and temporary.exists():
            return temporary, descriptor
        os.close(descriptor)  # another writer took it for a left-over before it was locked


def _sweep(path: Path) -> None:
    """Remove what killed writers of ``path`` left next to it; restore a folder that was moved aside for a new one."""
    for left in list(path.parent.iterdir()) if fcntl is not None else ():
        if not left.name.startswith(f".{path.name}.") or left.suffix not in (_TEMPORARY, _OLD):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY)
            try:
                if not _lock(descriptor, wait=False):
                    continue
                if left.suffix == _OLD and (left / path.name).exists() and not path.exists():
                    os.replace(left / path.name, path)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock a file or folder, until it is closed or its process ends; False where another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return wait
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
