"""Where embeddings go while they are computed: memory, or files that are resumed and read as memory maps."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from ..distributed import barrier, rank_and_world_size
from ..files import sync_folder, write_atomically
from .chunks import cut_into_blocks

BLOCK = 2048  # images whose embeddings are written together; what an interrupted run loses at most, on every rank
INDEX, DONE = "index.json", "done"


class MemoryStore:
    """Rows of all blocks in memory; ranks exchange theirs at the end.

    Args:
        count: of images.
        share: the ranks of the process group share the blocks.
    """

    def __init__(self, count: int, share: bool) -> None:
        self.count, self.share = count, share
        self.blocks: dict[int, tuple[np.ndarray, ...]] = {}

    def pending(self) -> list[range]:
        """The blocks that this rank has to compute."""
        return _share(cut_into_blocks(self.count, BLOCK), self.share)

    def write(self, block: range, rows: tuple[np.ndarray, ...]) -> None:
        """Keep the rows of one block."""
        self.blocks[block.start] = rows

    def finish(self) -> tuple[np.ndarray, ...]:
        """The columns of all blocks, on every rank."""
        if self.share and rank_and_world_size()[1] > 1:
            gathered: list[Any] = [None] * rank_and_world_size()[1]
            dist.all_gather_object(gathered, self.blocks)
            self.blocks = {start: rows for blocks in gathered for start, rows in blocks.items()}
        ordered = (self.blocks[start] for start in sorted(self.blocks))
        return tuple(np.concatenate(column) for column in zip(*ordered, strict=True))


class FolderStore:
    """One ``.npy`` file a column, and a marker for every block that is in them.

    Files are written by position and not through memory maps, so that ranks on several machines can share a folder.
    ``index.json`` says what the embeddings are of; it is written last when a folder is made.

    Args:
        folder: made where it is absent.
        count: of images.
        dimension: of an embedding.
        identity: what the embeddings are of; a folder that holds those of something else is refused.
        share: the ranks of the process group share the blocks.

    Raises:
        ValueError: the folder holds other embeddings, or is damaged.
    """

    def __init__(self, folder: Path, count: int, dimension: int, identity: Mapping[str, Any], share: bool) -> None:
        self.folder, self.count, self.share = folder, count, share
        shapes = {"embeddings": (dimension,), "norms": (), "keypoints": (5, 2), "scores": (), "readable": ()}
        self.columns = {
            name: ((count, *shape), np.dtype(bool if name == "readable" else np.float32))
            for name, shape in shapes.items()
        }
        if not share or rank_and_world_size()[0] == 0:
            self._prepare(identity)
        if share:
            barrier()

    def _prepare(self, identity: Mapping[str, Any]) -> None:
        index = self.folder / INDEX
        wanted = {**identity, "dimension": self.columns["embeddings"][0][1], "block": BLOCK}
        if index.is_file():
            try:
                found = dict(json.loads(index.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{index} is damaged ({error}); remove the folder {self.folder}") from error
            for key, value in wanted.items():
                if found.get(key) != value:
                    raise ValueError(
                        f"{self.folder} holds embeddings with another {key}: {found.get(key)}, wanted {value}; remove "
                        "it, or name another cache folder"
                    )
            return
        (self.folder / DONE).mkdir(parents=True, exist_ok=True)
        for marker in (self.folder / DONE).iterdir():
            marker.unlink()
        for name, (shape, dtype) in self.columns.items():
            np.lib.format.open_memmap(self._file(name), "w+", dtype, shape).flush()
        write_atomically(index, (json.dumps(wanted, indent=2) + "\n").encode())

    def pending(self) -> list[range]:
        """The blocks that are not done, and this rank's share of them."""
        done = {marker.name for marker in (self.folder / DONE).iterdir()}
        blocks = [block for block in cut_into_blocks(self.count, BLOCK) if _marker(block) not in done]
        if self.share:
            barrier()  # all ranks must have listed them before one is done
        return _share(blocks, self.share)

    def write(self, block: range, rows: tuple[np.ndarray, ...]) -> None:
        """Write one block, and only then its marker."""
        for (name, (shape, dtype)), values in zip(self.columns.items(), rows, strict=True):
            data = np.ascontiguousarray(values, dtype=dtype).tobytes()
            with open(self._file(name), "r+b") as file:
                row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
                file.seek(block.start * row_bytes - self.count * row_bytes, os.SEEK_END)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        (self.folder / DONE / _marker(block)).touch()
        sync_folder(self.folder / DONE)

    def finish(self) -> tuple[np.ndarray, ...]:
        """Memory maps of all columns, on every rank."""
        if self.share:
            barrier()
        return tuple(np.load(self._file(name), mmap_mode="r", allow_pickle=False) for name in self.columns)

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


def _marker(block: range) -> str:
    return f"{block.start:09d}"


def _share(blocks: list[range], share: bool) -> list[range]:
    rank, world_size = rank_and_world_size() if share else (0, 1)
    return blocks[rank::world_size]
