"""Attention with KPRPE on a CPU, without building a (B, H, N, N) tensor of biases and another of its gradient.

Patches lie on a grid, and a bucket depends only on the offset between two patches. So all biases of the queries of one
grid column are slices of one line, in which the rows that a key can be away, from n - 1 above to n - 1 below, follow
each other, each with n key columns: the keys of a query in row y are the n * n numbers from (n - 1 - y) * n on. A line
is gathered once, 27 numbers for every 196 biases on a grid of 14 x 14, and its slices are copied to where the logits
are accumulated, a few images at a time, while those are in the processor's cache. The gradient takes the same path
back.

Letters: B batch, H heads, n patches along a side, N = n * n patches, d width of a head, R = 49 buckets,
T = (2n - 1) * n, the length of a line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .._timm import Attention

_FEW = 2**14  # pairs of patches; with so few, biases written out need less operators and as much memory
_CHUNK = 2**18  # logits that one thread works on at a time: 1 MB


def line_index(bucket: torch.Tensor) -> torch.Tensor:
    """The buckets along the line of every grid column.

    Args:
        bucket: (N, N) int64 bucket of every query and key.

    Returns:
        (n, T) int64.
    """
    side = round(len(bucket) ** 0.5)
    grid = bucket.view(side, side, side, side)  # query row and column, key row and column
    above = grid[-1].transpose(0, 1)[:-1]  # what the last row sees above itself: (n - 1, n, n)
    below = grid[0].transpose(0, 1)
    return torch.cat([above, below]).transpose(0, 1).flatten(1)


class Lines(NamedTuple):
    """What the biases of one layer are read from.

    Attributes:
        table: (B, H or 1, n, R), for every grid column.
        slope: (H or 1, R), what is added from the top of the grid to its bottom.
        index: (n, T) of :func:`line_index`.
        onehot: (n, T, R) float32, the same for sums over buckets.
        keep: (B, M) int64, patches that are present; None: all.
    """

    table: torch.Tensor
    slope: torch.Tensor
    index: torch.Tensor
    onehot: torch.Tensor
    keep: torch.Tensor | None


class OffsetAttention(Attention):
    """timm's attention, which also takes :class:`Lines` where others take a mask of biases."""

    @staticmethod
    def can_run(tokens: torch.Tensor) -> bool:
        """Whether the path over lines can be used and pays.

        It can for real float32 numbers on a CPU, if nothing records operations; it pays for more than ``_FEW`` pairs.
        """
        can = computes_on_cpu(tokens) and tokens.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return can and len(tokens) * tokens.shape[1] ** 2 > _FEW

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | Lines | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, M, D) tokens.
            attn_mask: biases for timm's attention, or lines.
            is_causal: see timm.

        Returns:
            (B, M, D).
        """
        if not isinstance(attn_mask, Lines):
            return super().forward(x, attn_mask, is_causal)
        qkv, hidden, keep = self.qkv(x), None, attn_mask.keep
        if keep is not None:  # back to the whole grid, as lines exist only there
            length = len(attn_mask.index) ** 2
            hidden = torch.ones(len(x), length, dtype=torch.bool).scatter_(1, keep, False)
            qkv = qkv.new_zeros(len(x), length, qkv.shape[2]).scatter(1, keep.unsqueeze(-1).expand_as(qkv), qkv)
        out = offset_attention(qkv.unflatten(2, (3, self.num_heads, -1)), attn_mask, self.scale, hidden).flatten(2)
        return self.proj(out if keep is None else out.gather(1, keep.unsqueeze(-1).expand_as(x)))


def offset_attention(qkv: torch.Tensor, lines: Lines, scale: float, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(q k^T scale + bias) v, where the bias of a query in row y is read from table + (y + 1/2) / n * slope.

    Args:
        qkv: (B, N, 3, H, d) float32 on a CPU.
        lines: of the biases.
        scale: of the logits.
        hidden: (B, N) bool, keys that no query sees.

    Returns:
        (B, N, H, d).
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (qkv, lines.table, lines.slope)):
        return _OffsetAttention.apply(qkv, *lines[:4], scale, hidden)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    chunks = image_chunks(q)
    biases = q.new_empty(chunks[0].stop, q.shape[1], q.shape[2], q.shape[2])
    slopes = _slope_lines(lines.slope, lines.index)
    out = qkv.new_empty(*qkv.shape[:2], *qkv.shape[3:])
    for chunk in chunks:
        mask = biases[: chunk.stop - chunk.start]
        _fill(mask, lines.table[chunk], slopes, lines.index, None if hidden is None else hidden[chunk])
        attended = F.scaled_dot_product_attention(q[chunk], k[chunk], v[chunk], attn_mask=mask, scale=scale)
        out[chunk] = attended.transpose(1, 2)
    return out


def computes_on_cpu(tokens: torch.Tensor) -> bool:
    """Whether these are real numbers on a CPU, and nothing records the operations to run them elsewhere."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tokens) is not torch.Tensor
    return tokens.device.type == "cpu" and not recorded


def image_chunks(q: torch.Tensor) -> list[slice]:
    """As many images at a time as have their logits fit in the cache; q: (B, H, N, d)."""
    batch, heads, length, _ = q.shape
    size = max(1, torch.get_num_threads() * _CHUNK // (heads * length * length))
    return [slice(start, min(start + size, batch)) for start in range(0, max(batch, 1), size)]


def _stretches(lines: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(..., n, T) -> for every query row from the top a view (..., n, N)."""
    side = lines.shape[-2]
    return lines.unfold(-1, side * side, side).unbind(-2)[::-1]


def _slope_lines(slope: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a query gains when it moves down by the grid's height; slices for every row."""
    return _stretches(slope[:, None].expand(-1, len(index), -1).gather(-1, index.expand(len(slope), -1, -1)))


def _fill(
    biases: torch.Tensor,
    table: torch.Tensor,
    slopes: tuple[torch.Tensor, ...],
    index: torch.Tensor,
    hidden: torch.Tensor | None,
) -> None:
    """Write the biases (B, H, N, N) of some images."""
    side = len(index)
    lines = table.gather(-1, index.expand(*table.shape[:2], -1, -1))
    stretches = _stretches(lines.expand(-1, biases.shape[1], -1, -1))
    for y, bias in enumerate(biases.unflatten(2, (side, side)).unbind(2)):
        torch.add(stretches[y], slopes[y], alpha=(y + 0.5) / side, out=bias)
    if hidden is not None:
        biases.masked_fill_(hidden[:, None, None], -torch.inf)


class _OffsetAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, slope, index, onehot, scale, hidden):
        qkv = qkv.permute(2, 0, 3, 1, 4)
        chunks = image_chunks(qkv[0])
        _, batch, heads, length, width = qkv.shape
        room = qkv.new_empty(batch, heads, length, length)  # biases, then logits, then weights
        out = qkv.new_empty(batch, length, heads, width)
        slopes = _slope_lines(slope, index)
        for chunk in chunks:
            q, k, v = qkv[:, chunk].contiguous().flatten(1, 2)
            _fill(room[chunk], table[chunk], slopes, index, None if hidden is None else hidden[chunk])
            weights = room[chunk].view(-1, length, length)
            weights.baddbmm_(q, k.transpose(1, 2), alpha=scale)
            torch.softmax(weights, -1, out=weights)
            out[chunk] = torch.bmm(weights, v).view(-1, heads, length, width).transpose(1, 2)
        ctx.save_for_backward(qkv, out, room, index, onehot)
        ctx.scale, ctx.table_heads = scale, table.shape[1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, out_grad):
        qkv, out, room, index, onehot = ctx.saved_tensors
        _, batch, heads, length, width = qkv.shape
        side = len(index)
        chunks = image_chunks(qkv[0])
        qkv_grad = qkv.new_empty(batch, length, 3, heads, width)
        table_grad = qkv.new_empty(batch, heads, side, onehot.shape[-1])
        total = qkv.new_zeros(heads, side, side, length)  # gradient of the biases, summed over the batch
        buffer = qkv.new_empty(chunks[0].stop * heads, length, length)
        received = (out_grad * out).sum(-1, keepdim=True)
        for chunk in chunks:
            q, k, v = qkv[:, chunk].contiguous().flatten(1, 2)
            weights = room[chunk].view(-1, length, length)
            grad = out_grad[chunk].transpose(1, 2).flatten(0, 1)
            logits_grad = torch.bmm(grad, v.transpose(1, 2), out=buffer[: len(q)])
            logits_grad.sub_(received[chunk].transpose(1, 2).flatten(0, 1)).mul_(weights)
            parts = (
                torch.bmm(logits_grad, k).mul_(ctx.scale),
                torch.bmm(logits_grad.transpose(1, 2), q).mul_(ctx.scale),
                torch.bmm(weights.transpose(1, 2), grad),
            )
            for part, value in enumerate(parts):
                qkv_grad[chunk, :, part] = value.view(-1, heads, length, width).transpose(1, 2)
            by_row = logits_grad.view(-1, heads, side, side, length)
            total += by_row.sum(0) if len(by_row) > 1 else by_row[0]
            lines_grad = qkv.new_zeros(len(by_row), heads, *index.shape)
            for line, bias_grad in zip(_stretches(lines_grad), by_row.unbind(2), strict=True):
                line += bias_grad
            table_grad[chunk] = torch.einsum("bhxt,xtr->bhxr", lines_grad, onehot)
        slopes_grad = qkv.new_zeros(heads, *index.shape)
        for y, line in enumerate(_stretches(slopes_grad)):
            line.add_(total[:, y], alpha=(y + 0.5) / side)
        slope_grad = torch.einsum("hxt,xtr->hr", slopes_grad, onehot)
        if ctx.table_heads == 1:
            table_grad, slope_grad = table_grad.sum(1, keepdim=True), slope_grad.sum(0, keepdim=True)
        return qkv_grad, table_grad, slope_grad, None, None, None, None
