"""Where results of images go while they are computed: memory, or files that are resumed and read as memory maps."""

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

BLOCK = 2048  # images whose results are written together; what an interrupted run loses at most, on every rank
INDEX, DONE, CONTENTS, LOCK = "index.json", "done", "contents.npz", ".lock"
_NAMED = 5  # changed files that a message names

# Name -> shape of one image's value, and its type.
Columns = Mapping[str, tuple[tuple[int, ...], type]]


class MemoryStore:
    """Rows of all blocks in memory; ranks exchange theirs at the end.

    Args:
        count: of images.
        all_ranks: the ranks of the process group divide the blocks among them.
    """

    def __init__(self, count: int, all_ranks: bool) -> None:
        self.count, self.all_ranks = count, all_ranks
        self.blocks: dict[int, tuple[np.ndarray, ...]] = {}

    def pending(self) -> list[range]:
        """The blocks that this rank has to compute."""
        return _of_this_rank(cut_into_blocks(self.count, BLOCK), self.all_ranks)

    def write(self, block: range, rows: tuple[np.ndarray, ...]) -> None:
        """Keep the rows of one block."""
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
    """One ``.npy`` file a column, and a marker for every block that is in them.

    Files are written by position and not through memory maps, so that ranks on several machines can use one folder.
    ``index.json`` says what the results are of; it is written last when a folder is made. What the images hold is
    compared by content: results of images that have changed are computed anew.

    Args:
        folder: made where it is absent. A column that is damaged is made anew, with all others.
        columns: what there is of each image.
        count: of images.
        identity: what the results are of; a folder that holds those of something else is refused.
        files: the image files, one for each image, or the one file that has all of them; None where ``identity`` tells
            what the images are.
        all_ranks: the ranks of the process group divide the blocks among them.

    Raises:
        ValueError: the folder holds other results, or its index is damaged.
        OSError: it cannot be written; where the disk is full, what was needed is said.
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
                        f"{self.folder} holds results with another {key}: {found.get(key)}, wanted {value}; "
                        "remove it, or name another cache folder"
                    )
            damaged = [self._file(name).name for name in self.columns if not self._is_whole(name)]
            if not damaged:
                (self.folder / DONE).mkdir(exist_ok=True)
                return
            logger.warning("%s: %s damaged, everything is computed anew", self.folder, " and ".join(damaged))
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
        except Exception as error:  # NumPy parses headers with Python's tokenizer, which has errors of its own
            logger.debug("%s: %r", self._file(name), error)
            return False
        return (found.shape, found.dtype) == self.columns[name]

    def _compare_contents(self, files: Sequence[Path]) -> None:
        """Forget the blocks of files that hold something else than when they were computed."""
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
            logger.warning("%s: %d files have changed, computed anew: %s", self.folder, len(changed), names)
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
        """The same error; one about a full disk says how much is needed, and that the work goes on."""
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(
                error.errno, "its files are gone; does another process work on the same, and is done?", str(self.folder)
            )
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        needed = sum(dtype.itemsize * int(np.prod(shape)) for shape, dtype in self.columns.values())
        return OSError(
            error.errno,
            f"no space left for {needed / 1e9:.2f} GB of results; make room and start again, finished blocks are kept",
            str(self.folder),
        )


def _marker(block: range) -> str:
    return f"{block.start:09d}"


def _of_this_rank(blocks: list[range], all_ranks: bool) -> list[range]:
    rank, world_size = rank_and_world_size() if all_ranks else (0, 1)
    return blocks[rank::world_size]
