"""PartialFC: a softmax over millions of people whose class centers are sharded over the ranks.

An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial FC",
CVPR 2022. Works on CPU (gloo) and CUDA (nccl), and without any process group as one rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from .distributed import rank_and_world_size
from .losses import MarginLoss


def shard_range(num_classes: int, rank: int, world_size: int) -> tuple[int, int]:
    """First class and number of classes that a rank owns; the first ranks take the remainder, one each."""
    size, remainder = divmod(num_classes, world_size)
    return size * rank + min(rank, remainder), size + (rank < remainder)


class _GatherEmbeddings(torch.autograd.Function):
    """(b, D) of every rank -> (B, D) on every rank, B = b * world size.

    Each rank's loss covers its own classes only, so gradients are summed over ranks. They are then multiplied by the
    world size, because DistributedDataParallel will average the backbone's gradients over ranks.
    """

    @staticmethod
    def forward(ctx, embeddings: torch.Tensor) -> torch.Tensor:
        ctx.batch = len(embeddings)
        return _all_gather(embeddings)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        rank, world_size = rank_and_world_size()
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank * ctx.batch : (rank + 1) * ctx.batch] * world_size


def _all_gather(local: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(local) for _ in range(rank_and_world_size()[1])]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class _ShardedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy over the whole batch of a softmax whose columns are spread over the ranks."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        distributed = rank_and_world_size()[1] > 1
        largest = logits.amax(1, keepdim=True)
        if distributed:
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        probabilities = (logits - largest).exp_()
        total = probabilities.sum(1, keepdim=True)
        rows = torch.where(labels >= 0)[0]
        columns = labels[rows]
        target = logits.new_zeros(len(logits), 1)
        target[rows, 0] = logits[rows, columns] - largest[rows, 0]
        if distributed:
            dist.all_reduce(total)
            dist.all_reduce(target)
        ctx.save_for_backward(probabilities.div_(total), rows, columns)
        return (total.log() - target).mean()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        probabilities, rows, columns = ctx.saved_tensors
        logits_gradient = probabilities.clone()
        logits_gradient[rows, columns] -= 1
        return logits_gradient.mul_(gradient / len(probabilities)), None


class PartialFC(nn.Module):
    """Class centers, margin and softmax loss in one module: ``loss = partial_fc(embeddings, labels)``.

    Args:
        margin_loss: e.g. :class:`~insightface_kprpe.losses.AdaFace`.
        embedding_size: D.
        num_classes: number of people, over all ranks.
        sample_rate: fraction of this rank's class centers used in a step, in (0, 1]. The centers of the people
            in the batch always do.

    Raises:
        ValueError: margin_loss is not a MarginLoss, sample_rate is out of range, or there are fewer classes than ranks.
    """

    def __init__(
        self, margin_loss: MarginLoss, embedding_size: int, num_classes: int, sample_rate: float = 1.0
    ) -> None:
        super().__init__()
        if not isinstance(margin_loss, MarginLoss):
            raise ValueError(
                f"margin_loss must be an insightface_kprpe.losses.MarginLoss, got {type(margin_loss).__name__}; derive "
                "its class from MarginLoss"
            )
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
        self.rank, self.world_size = rank_and_world_size()
        if num_classes < self.world_size:
            raise ValueError(f"num_classes must be at least the number of ranks ({self.world_size}), got {num_classes}")
        self.margin_loss = margin_loss
        self.num_classes = num_classes
        self.sample_rate = sample_rate
        self.first_class, self.num_local = shard_range(num_classes, self.rank, self.world_size)
        self.num_sampled = max(1, int(sample_rate * self.num_local))
        self.class_centers = nn.Parameter(torch.empty(self.num_local, embedding_size).normal_(0, 0.01))
        self._index: torch.Tensor | None = None  # centers of the step, if it consists of several calls

    def sharded(self) -> dict[str, tuple[int, int]]:
        """Parameters whose rows are spread over the ranks: the first row of this rank, and the rows of all."""
        return {"class_centers": (self.first_class, self.num_classes)}

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of the whole batch of all ranks.

        Args:
            embeddings: (b, D) float of this rank, not normalized; every rank passes the same b.
            labels: (b,) int64 in [0, num_classes); left as they are.

        Raises:
            ValueError: a label is outside. On CUDA, where checking the values would stall the device, an assertion in
                the kernel fails instead.

        Returns:
            The mean loss over all B = b * world size samples, the same number on every rank. Its gradient reaches this
            rank's class centers and embeddings; the latter scaled for a backbone under DistributedDataParallel.
        """
        self._check_labels(labels)
        labels = self._local_labels(labels)
        if self.world_size > 1:
            embeddings = _GatherEmbeddings.apply(embeddings)
        centers = self.class_centers
        if self.num_sampled < self.num_local:
            index = self._sample(labels) if self._index is None else self._index
            labels = torch.where(labels >= 0, torch.searchsorted(index, labels), -1)
            centers = centers[index]
        # In half precision the scaled logits would be off by 0.1 and more.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.float()
            logits = F.linear(F.normalize(embeddings), F.normalize(centers)).clamp(-1, 1)
            logits = self.margin_loss(logits, labels, embeddings.norm(dim=1))
            return _ShardedCrossEntropy.apply(logits, labels)

    @contextlib.contextmanager
    def one_batch(self, labels: torch.Tensor, norms: Callable[[], torch.Tensor] | None = None) -> Iterator[None]:
        """Make the calls in a ``with`` block parts of one batch, with the same centers and norm statistics.

        Args:
            labels: (n,) int64, those of all calls of this rank together; every rank passes the same n.
            norms: returns (n,) float, the lengths of all their embeddings; needed where :attr:`needs_norms`. It is
                called after the class centers are drawn, with the random state of the block.
        """
        self._check_labels(labels)
        if self.num_sampled < self.num_local:
            self._index = self._sample(self._local_labels(labels))
        was_training = self.margin_loss.training
        if self.needs_norms:
            self.margin_loss.update_statistics(norms() if self.world_size == 1 else _all_gather(norms()))
        self.margin_loss.eval()
        try:
            yield
        finally:
            self._index = None
            self.margin_loss.train(was_training)

    @property
    def needs_norms(self) -> bool:
        """Whether the margin depends on the norms of the whole batch."""
        return self.margin_loss.needs_norms

    def _check_labels(self, labels: torch.Tensor) -> None:
        """Refuse a label that would be mistaken for a class of another rank."""
        outside = (labels < 0) | (labels >= self.num_classes)
        if labels.is_cuda:
            torch._assert_async(~outside.any())  # does not synchronize
        elif outside.any():
            wrong = labels[outside][0].item()
            raise ValueError(f"labels must be in [0, num_classes), got {wrong} with num_classes={self.num_classes}")

    def _local_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """(b,) labels of every rank -> (B,) rows of this rank's class centers, -1 for those of others."""
        labels = labels.reshape(-1)
        if self.world_size > 1:
            labels = _all_gather(labels)
        labels = labels - self.first_class
        return torch.where((labels >= 0) & (labels < self.num_local), labels, -1)

    @torch.no_grad()
    def _sample(self, labels: torch.Tensor) -> torch.Tensor:
        """Draw class centers: all positives and random others. Returns their rows, sorted."""
        positive = labels[labels >= 0].unique()  # sorted
        if len(positive) >= self.num_sampled:
            return positive
        priority = torch.rand(self.num_local, device=labels.device)
        priority[positive] = 2.0
        return priority.topk(self.num_sampled).indices.sort().values
