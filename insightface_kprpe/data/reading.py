"""Reads many items ahead in worker processes, which do not outlive their parent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

_AT_ONCE = 64  # items that a worker sends together
_LOOK_EVERY = 0.5  # seconds


class Items(Dataset):
    """``read(0)`` to ``read(count - 1)``; a ValueError or OSError becomes its text."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self.count, self.read = count, read

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except (ValueError, OSError) as error:
            return str(error)


def results(items: Items, num_workers: int, label: str, at_once: int = _AT_ONCE) -> Iterator[Any]:
    """All items in order, read ahead by worker processes, which hand over some at once, under a progress bar."""
    loader = DataLoader(items, at_once, num_workers=num_workers, collate_fn=list, worker_init_fn=start_worker)
    with tqdm(total=len(items), desc=label, unit="img", disable=None) as progress:
        for batch in loader:
            progress.update(len(batch))
            yield from batch


def start_worker(worker: int) -> None:
    """Initializes a process that reads images, as ``worker_init_fn`` of every loader.

    torch's own watch of the parent is not enough: a worker whose results nobody takes waits forever to hand them over.
    """
    cv2.setNumThreads(0)  # one thread per worker, as there are many
    end_with_parent()


def end_with_parent() -> None:
    """Let this process end when the one that started it is gone, however that was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
