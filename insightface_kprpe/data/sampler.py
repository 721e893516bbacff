"""Which images are in which batch of which rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_CHUNK = 1 << 20  # positions of an epoch whose repetitions are drawn at once; fixed, as the draws depend on it


class EpochSampler(Sampler[list[int]]):
    """Batches of one rank: every epoch a new permutation, the same on all ranks, split into equal parts.

    A step's images do not depend on how many ranks share them: rank r of W takes the r-th part of every block of
    ``W * batch_size``. The tail that does not fill a block is left out of this epoch.

    With ``repetition`` each image of that order is replaced, with this probability, by a random one of the previous
    image's person (who may have been repeated too). An epoch has as many images as before, but some occur in it several
    times, and others not at all.

    Args:
        length: number of images.
        batch_size: images per rank and batch.
        rank: of this process.
        world_size: number of ranks.
        seed: of the permutations.
        repetition: probability, in [0, 1).
        labels: (length,) int, the person of each image; needed for repetition.

    Raises:
        ValueError: there are fewer images than one block, ``repetition`` is out of its range or without ``labels``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        repetition: float = 0.0,
        labels: np.ndarray | None = None,
    ) -> None:
        self.length, self.batch_size, self.rank, self.world_size, self.seed = length, batch_size, rank, world_size, seed
        self.batches = length // (batch_size * world_size)
        if not self.batches:
            raise ValueError(
                f"batch_size must not exceed the images per rank: {length} images on {world_size} ranks, got "
                f"{batch_size}"
            )
        if not 0 <= repetition < 1:
            raise ValueError(f"repetition (repeated_augmentation) must be a probability in [0, 1), got {repetition}")
        if repetition and (labels is None or len(labels) != length):
            raise ValueError(
                f"repetition needs the labels of all {length} images, got {0 if labels is None else len(labels)}"
            )
        self.repetition = repetition
        self.people = ImagesOfPeople(labels) if repetition else None
        self.set_position(0, 0)

    def set_position(self, epoch: int, first_batch: int) -> None:
        """Where the next iteration starts: epoch number, and how many of its batches are already done."""
        self.epoch, self.first_batch = epoch, first_batch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.length)
        order = order[: self.batches * self.world_size * self.batch_size]
        for start in range(0, len(order) if self.repetition else 0, _CHUNK):
            part = order[start : start + _CHUNK]
            part[:] = self._repeat(part, rng)
        mine = order.reshape(self.batches, self.world_size, self.batch_size)[:, self.rank]
        for batch in mine[self.first_batch :]:
            yield batch.tolist()

    def __len__(self) -> int:
        return self.batches - self.first_batch

    def _repeat(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n,) indices of images, some of them replaced by others of the previous person."""
        chance, draw = rng.random((len(order), 2), np.float32).T  # in pairs: a shorter epoch draws the same ones
        repeated = chance < self.repetition
        repeated[0] = False
        origin = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(order))))  # whom each one repeats
        places = np.flatnonzero(repeated)
        result = order.copy()
        result[places] = self.people.draw(order[origin[places]], draw[places])
        return result


class ImagesOfPeople:
    """Which images each person has.

    Args:
        labels: (N,) int, the person of each image, in any order.
    """

    def __init__(self, labels: np.ndarray) -> None:
        kind = np.int32 if len(labels) < 1 << 31 else np.int64
        labels = np.asarray(labels)
        self.images = np.argsort(labels, kind="stable").astype(kind)
        sorted_labels = labels[self.images]
        first = np.flatnonzero(np.concatenate([[True], sorted_labels[1:] != sorted_labels[:-1]])).astype(kind)
        self.first = first  # of each person's images
        self.count = np.diff(first, append=len(labels)).astype(kind)
        self.person = np.empty(len(labels), kind)
        self.person[self.images] = np.repeat(np.arange(len(first), dtype=kind), self.count)

    def draw(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """For each of (n,) images, one of the same person, chosen by its number in [0, 1)."""
        person = self.person[images]
        count = self.count[person]
        return self.images[self.first[person] + np.minimum((draws * count).astype(count.dtype), count - 1)]
