"""Opening a gallery wherever it is kept: in a file, or in PostgreSQL."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..files import check_writable
from .file_gallery import FileGallery
from .gallery import Gallery
from .postgres_gallery import is_address, open_postgres

logger = logging.getLogger(__name__)


@contextmanager
def reading(place: str | Path) -> Iterator[Gallery]:
    """A gallery to search in.

    Args:
        place: its file, or its address, postgresql://...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a gallery, or damaged, or the address leads to none.
        ImportError: the extra ``postgres`` is missing.
    """
    if not is_address(place):
        yield FileGallery.load(place)
        return
    with open_postgres(str(place), to_edit=False) as gallery:
        yield gallery


@contextmanager
def editing(place: str | Path) -> Iterator[Gallery]:
    """A gallery, a new one where there is none, that no other process can change meanwhile; committing is the block's.

    Args:
        place: its file, or its address, postgresql://...

    Raises:
        ValueError: the file is not a gallery, or damaged, or the address leads to no database.
        ImportError: the extra ``postgres`` is missing.
    """
    if is_address(place):
        with open_postgres(str(place), to_edit=True) as gallery:
            yield gallery
        return
    path = Path(place)
    check_writable(path)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s is being changed by another process; waiting for it", path)
        lock.acquire()
    try:
        yield FileGallery.load(path) if path.exists() else FileGallery(path=path)
    finally:
        lock.release()
