"""Stores for the results of images: memory, or files that can be resumed and are read as memory maps."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ..distributed import barrier, rank_and_world_size
from ..documents import read_json_object
from ..files import atomic_path, locked, sync_folder, write_atomically
from ..npz import read_npz
from .chunks import cut_into_blocks
from .contents import Contents, read_contents

logger = logging.getLogger(__name__)

BLOCK = 2048  # images whose results are written together; at most this many per rank are lost by an interruption
INDEX, DONE, CONTENTS, LOCK = "index.json", "done", "contents.npz", ".lock"
_NAMED = 5  # changed files that a message lists

# Name -> shape of one image's value, and its type.
Columns = Mapping[str, tuple[tuple[int, ...], type]]


class MemoryStore:
    """Rows of all blocks in memory; ranks exchange theirs at the end.

    Args:
        count: of images.
        all_ranks: the ranks of the process group split the blocks.
    """

    def __init__(self, count: int, all_ranks: bool) -> None:
        self.count, self.all_ranks = count, all_ranks
        self.blocks: dict[int, tuple[np.ndarray, ...]] = {}

    def pending(self) -> list[range]:
        """The blocks that this rank has to compute."""
        return _of_this_rank(cut_into_blocks(self.count, BLOCK), self.all_ranks)

    def write(self, block: range, rows: tuple[np.ndarray, ...]) -> None:
        """Store the rows of one block."""
        self.blocks[block.start] = rows

    def finish(self) -> tuple[np.ndarray, ...]:
        """The columns of all blocks, on every rank."""
        if self.all_ranks and rank_and_world_size()[1] > 1:
            gathered: list[Any] = [None] * rank_and_world_size()[1]
            dist.all_gather_object(gathered, self.blocks)
            self.blocks = {start: rows for blocks in gathered for start, rows in blocks.items()}
        ordered = (self.blocks[start] for start in sorted(self.blocks))
        return tuple(np.concatenate(column) for column in zip(*ordered, strict=True))


class FolderStore:
    """One ``.npy`` file per column, and a marker for every finished block.

    Files are written by position and not through memory maps, so that ranks on several machines can use one folder.
    ``index.json`` identifies the results; it is written last when a folder is created. Images are compared by content:
    results of images that have changed are recomputed.

    Args:
        folder: created if missing. If a column is damaged, all are recomputed.
        columns: the values of each image.
        count: of images.
        identity: identifies the results; a folder with other results is refused.
        files: the image files, one for each image, or the one file that has all of them; None if ``identity``
            identifies the images.
        all_ranks: the ranks of the process group split the blocks.

    Raises:
        ValueError: the folder holds other results, or its index is damaged.
        OSError: it cannot be written; if the disk is full, the message says how much is needed.
    """

    def __init__(
        self,
        folder: Path,
        columns: Columns,
        count: int,
        identity: Mapping[str, Any],
        files: Sequence[Path] | None = None,
        all_ranks: bool = False,
    ) -> None:
        self.folder, self.count, self.all_ranks = folder, count, all_ranks
        self.columns = {name: ((count, *shape), np.dtype(kind)) for name, (shape, kind) in columns.items()}
        if not all_ranks or rank_and_world_size()[0] == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with locked(self.folder / LOCK):  # another process may be about to make the same
                    self._prepare(identity)
                    if files is not None:
                        self._compare_contents(files)
            except OSError as error:
                raise self._explained(error) from error
        if all_ranks:
            barrier()

    def _prepare(self, identity: Mapping[str, Any]) -> None:
        index, wanted = self.folder / INDEX, {**identity, "block": BLOCK}
        if index.is_file():
            try:
                found = read_json_object(index)
            except ValueError as error:
                raise ValueError(f"{index} is damaged ({error}); remove the folder {self.folder}") from error
            for key, value in wanted.items():
                if found.get(key) != value:
                    raise ValueError(
                        f"{self.folder} holds results for another {key}: expected {value}, got {found.get(key)}; "
                        "remove it, or choose another cache folder"
                    )
            damaged = [self._file(name).name for name in self.columns if not self._is_whole(name)]
            if not damaged:
                (self.folder / DONE).mkdir(exist_ok=True)
                return
            logger.warning("%s: %s damaged, recomputing everything", self.folder, " and ".join(damaged))
            index.unlink()
        (self.folder / DONE).mkdir(parents=True, exist_ok=True)
        for leftover in (*(self.folder / DONE).iterdir(), *self.folder.glob(CONTENTS), *self.folder.glob(".*.tmp")):
            leftover.unlink()
        for name, (shape, dtype) in self.columns.items():
            np.lib.format.open_memmap(self._file(name), "w+", dtype, shape).flush()
        write_atomically(index, (json.dumps(wanted, indent=2) + "\n").encode())

    def _is_whole(self, name: str) -> bool:
        try:
            found = np.load(self._file(name), mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, SyntaxError):
            return False
        except Exception as error:  # NumPy parses headers with Python's tokenizer, which has its own errors
            logger.debug("%s: %r", self._file(name), error)
            return False
        return (found.shape, found.dtype) == self.columns[name]

    def _compare_contents(self, files: Sequence[Path]) -> None:
        """Discard the blocks of files whose content has changed."""
        known = self._known_contents()
        found = read_contents(files, known)
        if known is not None and found.digests.shape == known.digests.shape:
            changed = np.flatnonzero((found.digests != known.digests).any(1))
        else:
            changed = np.arange(len(files))
        places = np.arange(self.count) if len(files) != self.count and len(changed) else changed
        forgotten = {f"{start:09d}" for start in np.unique(places // BLOCK) * BLOCK} & self._done()
        for marker in forgotten:
            (self.folder / DONE / marker).unlink()
        sync_folder(self.folder / DONE)
        if forgotten:
            names = ", ".join(str(files[i]) for i in changed[:_NAMED]) + (", ..." if len(changed) > _NAMED else "")
            logger.warning("%s: %d files have changed, recomputing them: %s", self.folder, len(changed), names)
        with atomic_path(self.folder / CONTENTS) as temporary, open(temporary, "wb") as file:
            np.savez(file, **found._asdict())

    def _known_contents(self) -> Contents | None:
        try:
            known = Contents(**read_npz(self.folder / CONTENTS, Contents._fields))
        except ValueError as error:  # then nothing is known
            logger.debug("%s: %r", self.folder / CONTENTS, error)
            return None
        return known if (known.stamps.dtype, known.digests.dtype) == (np.int64, np.uint8) else None

    def _done(self) -> set[str]:
        return {marker.name for marker in (self.folder / DONE).iterdir()}

    def pending(self) -> list[range]:
        """The blocks that are not done and that this rank has to compute."""
        done = self._done()
        blocks = [block for block in cut_into_blocks(self.count, BLOCK) if _marker(block) not in done]
        if self.all_ranks:
            barrier()  # all ranks must have listed them before one is done
        return _of_this_rank(blocks, self.all_ranks)

    def write(self, block: range, rows: tuple[np.ndarray, ...]) -> None:
        """Write one block, and only then its marker."""
        try:
            for (name, (shape, dtype)), values in zip(self.columns.items(), rows, strict=True):
                data = np.ascontiguousarray(values, dtype=dtype).tobytes()
                with open(self._file(name), "r+b") as file:
                    row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
                    file.seek(block.start * row_bytes - self.count * row_bytes, os.SEEK_END)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            (self.folder / DONE / _marker(block)).touch()
        except OSError as error:
            raise self._explained(error) from error
        sync_folder(self.folder / DONE)

    def finish(self) -> tuple[np.ndarray, ...]:
        """Memory maps of all columns, on every rank."""
        if self.all_ranks:
            barrier()
        return tuple(np.load(self._file(name), mmap_mode="r", allow_pickle=False) for name in self.columns)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _explained(self, error: OSError) -> OSError:
        """The same error; one about a full disk says how much is needed, and that finished work is kept."""
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(
                error.errno, "its files are gone; does another process work on the same, and is done?", str(self.folder)
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        needed = sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in self.columns.values())
        return OSError(
            error.errno,
            f"no space left for {needed / 1e9:.2f} GB of results; free some space and start again; finished blocks are "
            "kept",
            str(self.folder),
        )


def _marker(block: range) -> str:
    return f"{block.start:09d}"


def _of_this_rank(blocks: list[range], all_ranks: bool) -> list[range]:
    rank, world_size = rank_and_world_size() if all_ranks else (0, 1)
    return blocks[rank::world_size]
