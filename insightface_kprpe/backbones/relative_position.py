"""Relative positions of image patches: the bucket index, KPRPE (keypoint-relative) and iRPE (contextual).

Letters: B batch, L layers, H heads, N = n * n patches, K keypoints, R = 49 buckets.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .._timm import Attention
from ..geometry import CANONICAL_KEYPOINTS, KEYPOINT_LIMIT
from .offset_attention import Lines, computes_on_cpu, image_chunks, line_index

# Piecewise index of iRPE (Wu et al., ICCV 2021): exact up to ALPHA patches, logarithmic up to GAMMA, +-3 beyond.
ALPHA, BETA, GAMMA = 1.9, 3.8, 15.2
_REACH = 3
_SIDE = 2 * _REACH + 1
NUM_BUCKETS = _SIDE * _SIDE

SHARINGS = ("none", "layers", "heads", "both")


def _piecewise_index(offset: int) -> int:
    """One axis: offset in patches -> index in [-3, 3]."""
    distance = abs(offset)
    if distance <= ALPHA:
        return offset
    index = ALPHA + math.log(distance / ALPHA) / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    return int(math.copysign(min(round(index), _REACH), offset))


@functools.lru_cache(maxsize=32)
def bucket_index(grid_size: int) -> torch.Tensor:
    """Which of the 49 "product" buckets the offset from every patch to every other falls in.

    Args:
        grid_size: n, patches along one side.

    Returns:
        (N, N) int64 with N = n * n patches in row-major order; entry [i, j] is for query i and key j. The tensor is
        cached: copy it before writing to it.
    """
    axis = torch.tensor(
        [[_piecewise_index(i - j) + _REACH for j in range(grid_size)] for i in range(grid_size)], device="cpu"
    )
    rows = axis[:, None, :, None]  # (query row, 1, key row, 1)
    columns = axis[None, :, None, :]  # (1, query column, 1, key column)
    return (rows * _SIDE + columns).reshape(grid_size**2, grid_size**2)


def patch_centers(grid_size: int) -> torch.Tensor:
    """Centers of the patches, (N, 2) float xy in [0, 1], row-major."""
    axis = (torch.arange(grid_size, dtype=torch.float32) + 0.5) / grid_size
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


class KeypointTables(NamedTuple):
    """Bucket biases of a query: a term for its grid column, plus one that grows with its row, minus one for the image.

    L and H are 1 where tables are shared.

    Attributes:
        column: (L, H, n, R), at the top of every grid column.
        slope: (L, H, R), the increase from the top of the crop to its bottom.
        image: (L, B, H, R), where the keypoints are.
    """

    column: torch.Tensor
    slope: torch.Tensor
    image: torch.Tensor


class KeypointRelativePosition(nn.Linear):
    """KPRPE: attention biases that depend on where each query patch lies relative to the face's keypoints.

    A linear map takes the 2K offsets (patch center - keypoint) of a query to a table of 49 bucket biases for each layer
    and head (KPRPE paper, section 3.3). Being linear, the table splits into terms for the query's column, its row and
    the image: no (B, L, H, N, R) tensor is ever built.

    Args:
        grid_size: patches along one side.
        num_keypoints: K, 2 to 5; the first K of the five landmarks are used.
        depth: L, number of layers.
        num_heads: H, attention heads per layer.
        sharing: what shares one table: "none", "layers", "heads" or "both".
    """

    def __init__(self, grid_size: int, num_keypoints: int, depth: int, num_heads: int, sharing: str = "none") -> None:
        if not 2 <= num_keypoints <= 5:
            raise ValueError(f"num_keypoints must be 2 to 5, got {num_keypoints}")
        if sharing not in SHARINGS:
            raise ValueError(f"kprpe_sharing must be one of {', '.join(SHARINGS)}, got {sharing!r}")
        self.table_depth = 1 if sharing in ("layers", "both") else depth
        self.table_heads = 1 if sharing in ("heads", "both") else num_heads
        super().__init__(2 * num_keypoints, self.table_depth * self.table_heads * NUM_BUCKETS)
        self.num_keypoints = num_keypoints
        bucket = bucket_index(grid_size)
        index = line_index(bucket)
        self.register_buffer("columns", patch_centers(grid_size)[:grid_size, 0].clone(), persistent=False)
        self.register_buffer("bucket", bucket.clone(), persistent=False)
        self.register_buffer("line_index", index, persistent=False)
        self.register_buffer("line_onehot", F.one_hot(index, NUM_BUCKETS).float(), persistent=False)

    def reset_parameters(self) -> None:
        """All zeros: training starts from plain attention."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, keypoints: torch.Tensor) -> KeypointTables:
        """Tables of bucket biases.

        Args:
            keypoints: (B, 5, 2) or (B, K, 2) float, xy in [0, 1] of the crop.

        Returns:
            The tables of all layers, float32 also under autocast.
        """
        points = keypoints[:, : self.num_keypoints].flatten(1)  # (B, 2K)
        with torch.autocast(points.device.type, enabled=False):
            weight = self.weight.float()
            by_x, by_y = weight.unflatten(1, (-1, 2)).sum(1).unbind(1)  # for a query that moves by the crop's side
            column = torch.addmm(self.bias.float(), self.columns[:, None].float(), by_x[None])  # (n, LHR)
            image = F.linear(points.float(), weight)  # (B, LHR)
        shape = (self.table_depth, self.table_heads, NUM_BUCKETS)
        column, image = column.unflatten(1, shape).permute(1, 2, 0, 3), image.unflatten(1, shape).permute(1, 0, 2, 3)
        return KeypointTables(column, by_y.view(shape), image)

    def attention_bias(self, tables: KeypointTables, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """The attention bias of one layer.

        Args:
            tables: what :meth:`forward` returned.
            layer: index of the layer, 0 to depth - 1.
            dtype: of the result; the one in which attention is computed.

        Returns:
            (B, H or 1, N, N), to be added to the attention logits.
        """
        column, slope, image = (table[layer % self.table_depth] for table in tables)
        query = column[:, None] + self.columns[:, None, None] * slope[:, None, None]  # (H, n, n, R): rows as columns
        table = (query.flatten(1, 2) - image.unsqueeze(2)).to(dtype)  # (B, H, N, R)
        return table.gather(-1, self.bucket.expand(*table.shape[:2], -1, -1))

    def lines(self, tables: KeypointTables, layer: int, keep: torch.Tensor | None) -> Lines:
        """The same for :class:`~.offset_attention.OffsetAttention`.

        Args:
            tables: what :meth:`forward` returned.
            layer: index of the layer.
            keep: (B, M) int64, the patches that there are in the tokens; None: all.
        """
        column, slope, image = (table[layer % self.table_depth] for table in tables)
        return Lines(column - image.unsqueeze(2), slope, self.line_index, self.line_onehot, keep)


class LookupTable(nn.Module):
    """One contextual iRPE table, shared by heads: features -> 49 buckets (or back, for values)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, rows, columns))


class ContextualAttention(Attention):
    """Multi-head attention with iRPE on queries, keys and values (contextual, product, head-shared).

    ``forward`` takes the bucket index where timm's attention takes a mask, so that timm's ``Block`` can carry it.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads=num_heads, qkv_bias=False)
        head_dim = dim // num_heads
        self.rpe_q = LookupTable(head_dim, NUM_BUCKETS)
        self.rpe_k = LookupTable(head_dim, NUM_BUCKETS)
        self.rpe_v = LookupTable(NUM_BUCKETS, head_dim)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
        """Attend.

        Args:
            x: (B, N, D) tokens.
            attn_mask: (N, N) or (B, N, N) int64 bucket index of every query and key.
            is_causal: newer versions of timm's ``Block`` pass it; always False, patches have no order in time.

        Returns:
            (B, N, D).
        """
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        bucket = (attn_mask if attn_mask.dim() == 3 else attn_mask.unsqueeze(0)).unsqueeze(1)
        bucket = bucket.expand(batch, self.num_heads, length, length)
        if not computes_on_cpu(x):
            return self.proj(self._attend(q, k, v, bucket))
        # A few images at a time, so that the next operator finds what one wrote for all pairs of patches in the cache.
        parts = [self._attend(q[chunk], k[chunk], v[chunk], bucket[chunk]) for chunk in image_chunks(q)]
        return self.proj(torch.cat(parts))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
        """(B, H, N, d) queries, keys and values and (B, H, N, N) buckets -> (B, N, D)."""
        q = q * self.scale
        logits = q @ k.transpose(-2, -1)
        # A query's own table is read at the key's bucket, a key's own table at the bucket it sees the query in.
        logits = logits + (q @ self.rpe_k.lookup_table_weight).gather(-1, bucket)
        by_key = ((k * self.scale) @ self.rpe_q.lookup_table_weight).gather(-1, bucket)
        weights = (logits + by_key.transpose(-2, -1)).softmax(-1)
        # How much attention each bucket got, times the value of that bucket.
        received = weights.new_zeros(*q.shape[:3], NUM_BUCKETS).scatter_add(-1, bucket, weights)
        v = v.to(weights.dtype)
        out = weights @ v + received @ self.rpe_v.lookup_table_weight.to(weights.dtype)
        return out.transpose(1, 2).flatten(2)


def check_keypoints(keypoints: torch.Tensor | None, batch: int, num_keypoints: int, check_values: bool) -> None:
    """Refuse keypoints that a KPRPE network cannot use, and say how to fix them.

    Args:
        keypoints: what the caller passed.
        batch: B, number of images.
        num_keypoints: K that the network was built with.
        check_values: also look at the numbers (on a GPU this waits for the device).

    Raises:
        ValueError: missing, of a wrong shape, not finite, or in pixels.
    """
    wanted = f"keypoints must be ({batch}, 5, 2) float, xy in [0, 1] of the network's input crop"
    if keypoints is None:
        raise ValueError(
            f"{wanted}, got None; a KPRPE network needs them: divide landmarks in crop pixels by the crop's side, or "
            "for aligned crops pass geometry.CANONICAL_KEYPOINTS"
        )
    shape = tuple(keypoints.shape)
    if len(shape) != 3 or shape[0] != batch or shape[1] not in (num_keypoints, 5) or shape[2] != 2:
        raise ValueError(f"{wanted} (or {num_keypoints} points), got {shape}; use keypoints.reshape(-1, 5, 2)")
    if not keypoints.is_floating_point():
        raise ValueError(f"{wanted}, got {keypoints.dtype}; divide pixels by the crop's side")
    if check_values:
        largest = keypoints.detach().abs().amax().item() if keypoints.numel() else 0.0
        if not math.isfinite(largest):
            raise ValueError(f"{wanted}, got values that are not finite; leave such faces out or use the template")
        if largest > KEYPOINT_LIMIT:
            raise ValueError(f"{wanted}, got values up to {largest:.1f}, probably pixels; divide by the crop's side")


def template_keypoints(batch: int, device: torch.device | None = None) -> torch.Tensor:
    """The keypoints of a perfectly aligned crop, repeated: (B, 5, 2) float32."""
    return torch.tensor(CANONICAL_KEYPOINTS, device=device).expand(batch, -1, -1)
