"""Long computations over a set of images, in blocks that are done or not, with images read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.reading import start_worker
from ..distributed import rank_and_world_size


def cut_into_blocks(count: int, size: int) -> list[range]:
    """The ranges of at most ``size`` that cover 0 to ``count``."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def run_blocks(
    dataset: Dataset,
    blocks: Sequence[range],
    compute: Callable[[Any], tuple[np.ndarray, ...]],
    *,
    batch_size: int,
    num_workers: int,
    label: str,
) -> Iterator[tuple[range, tuple[np.ndarray, ...]]]:
    """Compute block by block; no batch crosses the end of a block.

    Args:
        dataset: index -> what one image is to ``compute``; read in ``num_workers`` processes, ahead of the computation.
        blocks: ranges of indices.
        compute: collated batch -> arrays with one row for each image.
        batch_size: images per batch.
        num_workers: processes that read; 0: this one.
        label: of the progress bar.

    Yields:
        Each block and the arrays of all its images.
    """
    batches = [list(block[i : i + batch_size]) for block in blocks for i in range(0, len(block), batch_size)]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=start_worker)
    results = iter(loader)
    hidden = None if rank_and_world_size()[0] == 0 else True  # None: where the output is not a terminal
    with tqdm(total=sum(map(len, blocks)), desc=label, leave=False, disable=hidden) as progress:
        for block in blocks:
            parts: list[tuple[np.ndarray, ...]] = []
            for start in range(0, len(block), batch_size):
                parts.append(compute(next(results)))
                progress.update(min(batch_size, len(block) - start))
            yield block, tuple(np.concatenate(column) for column in zip(*parts, strict=True))
