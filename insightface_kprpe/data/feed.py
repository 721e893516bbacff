"""From a loader's batches to the training device: unreadable images replaced and counted, copies made ahead."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from .face_dataset import FaceDataset
from .sampler import EpochSampler

logger = logging.getLogger(__name__)

# images (b, 3, H, W) uint8, labels (b,), keypoints (b, 5, 2), and (b, 2): see ReadableFaces
RawBatch = list[torch.Tensor]

_TRIES = 100  # images in a row that may be unreadable
_RATE_OVER = 10_000  # images: the rate of bad ones is taken over at least this many


class ReadableFaces(Dataset):
    """A dataset in which the next readable image replaces one that cannot be read.

    Items are those of the dataset and a (2,) int64 tensor: the index asked for, and how many images, from it on, could
    not be read.
    """

    def __init__(self, faces: FaceDataset) -> None:
        self.faces = faces

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]:
        for skipped in range(_TRIES):
            try:
                item = self.faces[(index + skipped) % len(self)]
            except (ValueError, OSError):
                continue
            return *item, torch.tensor([index, skipped])
        raise RuntimeError(
            f"{_TRIES} images in a row, from number {index} on, could not be read; is the data set complete?"
        )

    def record_key(self, index: int) -> int | str:
        """Its name for a person: the key of a record, or the path of a file."""
        return self.faces.record_key(index)


class BadImages:
    """Counts the images that could not be read, logs each one once, and stops a run that has too many.

    Args:
        faces: the images.
        limit: largest share of bad images; it is taken over at least 10,000 images.
    """

    def __init__(self, faces: FaceDataset, limit: float) -> None:
        self.faces, self.limit = faces, limit
        self.read = self.bad = 0
        self.known: set[int] = set()

    def count(self, origin: torch.Tensor) -> None:
        """Check one batch.

        Args:
            origin: (b, 2) int64 on the CPU, of :class:`ReadableFaces`.

        Raises:
            ValueError: the share of bad images is above the limit.
        """
        self.read += len(origin)
        for index, skipped in origin[origin[:, 1] > 0].tolist():
            self.bad += 1
            for number in range(index, index + skipped):
                self._log(number % len(self.faces))
        if self.bad / max(self.read, _RATE_OVER) > self.limit:
            raise ValueError(
                f"{self.bad} of {self.read} images could not be read, more than max_bad_images={self.limit:g} allows; "
                "see the warnings above, check the data set (`insightface-kprpe rec inspect`), or raise the limit"
            )

    def _log(self, index: int) -> None:
        if index in self.known:
            return
        self.known.add(index)
        try:
            self.faces[index]
            reason = "it can be read now"
        except (ValueError, OSError) as error:
            reason = str(error)
        logger.warning("image %s replaced by the next one: %s", self.faces.record_key(index), reason)


class DeviceFeed:
    """A loader whose batches are on the device; on a GPU the next one is copied while the current one is used.

    Args:
        loader: over :class:`ReadableFaces`, in pinned memory for a GPU.
        device: where the images, labels and keypoints go; their origin stays on the CPU.
        bad: sees every batch.
    """

    def __init__(self, loader: DataLoader, device: torch.device, bad: BadImages) -> None:
        self.loader, self.device, self.bad = loader, device, bad

    @property
    def batch_sampler(self) -> EpochSampler:
        return self.loader.batch_sampler

    @property
    def dataset(self) -> ReadableFaces:
        return self.loader.dataset

    def __iter__(self) -> Iterator[RawBatch]:
        if self.device.type != "cuda":
            for batch in self.loader:
                self.bad.count(batch[-1])
                yield batch
            return
        batches, side = iter(self.loader), torch.cuda.Stream(self.device)
        ahead = self._copy(batches, side)
        while ahead is not None:
            batch, current = ahead, torch.cuda.current_stream(self.device)
            current.wait_stream(side)
            for tensor in batch[:-1]:
                tensor.record_stream(
                    current
                )  # otherwise its memory would be reused for the next copy once Python drops it
            ahead = self._copy(batches, side)
            yield batch

    def _copy(self, batches: Iterator[RawBatch], side: torch.cuda.Stream) -> RawBatch | None:
        batch = next(batches, None)
        if batch is None:
            return None
        self.bad.count(batch[-1])
        with torch.cuda.stream(side):
            return [tensor.to(self.device, non_blocking=True) for tensor in batch[:-1]] + [batch[-1]]
