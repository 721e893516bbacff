"""The ViT with its embedding head, and relative positions: iRPE (Wu et al., ICCV 2021) and KPRPE (CVPR 2024)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import numpy as np

NUM_BUCKETS = 49
LAYER_NORM_EPS = 1e-5
BATCH_NORM_EPS = 2e-5


def piecewise(offset: int) -> int:
    """iRPE, Eq. 18: exact up to 1.9 patches, then logarithmic, 3 from far away; with the sign of the offset."""
    alpha, beta, gamma = 1.9, 3.8, 15.2
    if abs(offset) <= alpha:
        return offset
    share = math.log(abs(offset) / alpha) / math.log(gamma / alpha)
    return min(round(alpha + share * (beta - alpha)), 3) * (1 if offset > 0 else -1)


@functools.cache
def buckets(n: int) -> np.ndarray:
    """(N, N): the bucket of query i and key j, N = n * n patches row by row."""
    table = np.empty((n * n, n * n), dtype=np.int64)
    for i in range(n * n):
        for j in range(n * n):
            rows, columns = i // n - j // n, i % n - j % n
            table[i, j] = (piecewise(rows) + 3) * 7 + piecewise(columns) + 3
    return table


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = LAYER_NORM_EPS) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def relu6(x: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(x, 0), 6)


def keypoint_biases(state: Mapping, keypoints: np.ndarray, n: int, layer: int, sharing: str, heads: int) -> np.ndarray:
    """KPRPE of one image and layer, (H, N, N): each query's table, made of its offsets to the keypoints.

    Args:
        state: with ``keypoint_linear.weight`` (tables * 49, 2K) and ``.bias``.
        keypoints: (5, 2) xy in [0, 1]; the first K count.
        n: patches along a side.
        layer: which layer.
        sharing: "none", "layers", "heads" or "both".
        heads: H.
    """
    weight, constant = state["keypoint_linear.weight"], state["keypoint_linear.bias"]
    bucket = buckets(n)
    biases = np.empty((heads, n * n, n * n))
    for head in range(heads):
        own_layer = 0 if sharing in ("layers", "both") else layer
        own_head, heads_in_table = (0, 1) if sharing in ("heads", "both") else (head, heads)
        first = (own_layer * heads_in_table + own_head) * NUM_BUCKETS
        for query in range(n * n):
            place = np.array([(query % n + 0.5) / n, (query // n + 0.5) / n])
            offsets = (place - keypoints[: weight.shape[1] // 2]).reshape(-1)
            table = weight[first : first + NUM_BUCKETS] @ offsets + constant[first : first + NUM_BUCKETS]
            biases[head, query] = table[bucket[query]]
    return biases


def attend(state: Mapping, x: np.ndarray, heads: int, bias: np.ndarray | None, bucket: np.ndarray | None) -> np.ndarray:
    """Multi-head attention over the tokens of one image.

    Args:
        state: of the attention.
        x: (N, D) tokens.
        heads: H.
        bias: (H, N, N) added to the logits (KPRPE), or None.
        bucket: (N, N) for contextual iRPE on queries, keys and values, or None.
    """
    width = x.shape[1]
    size = width // heads
    q, k, v = np.split(x @ state["qkv.weight"].T, 3, axis=1)
    out = np.empty_like(x)
    for head in range(heads):
        columns = slice(head * size, (head + 1) * size)
        queries, keys, values = q[:, columns], k[:, columns], v[:, columns]
        logits = queries @ keys.T
        if bucket is not None:
            of_key = state["rpe_k.lookup_table_weight"][0].T[bucket]  # (N, N, d): what query i adds to key j
            of_query = state["rpe_q.lookup_table_weight"][0].T[bucket.T]  # what key j adds to query i: j comes first
            logits = logits + np.einsum("id,ijd->ij", queries, of_key) + np.einsum("jd,ijd->ij", keys, of_query)
        logits = logits * size**-0.5
        if bias is not None:
            logits = logits + bias[head]
        weights = softmax(logits)
        out[:, columns] = weights @ values
        if bucket is not None:
            out[:, columns] += np.einsum("ij,ijd->id", weights, state["rpe_v.lookup_table_weight"][0][bucket])
    return out @ state["proj.weight"].T + state["proj.bias"]


def part(state: Mapping, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def run_tokens(
    state: Mapping,
    image: np.ndarray,
    keypoints: np.ndarray | None,
    heads: int,
    position: str | None,
    sharing: str,
    keep,
) -> np.ndarray:
    """(N, D) normalized tokens of one image; those not in ``keep`` are the mask token."""
    kernel = state["patch_embed.proj.weight"]  # (D, 3, P, P)
    size = kernel.shape[-1]
    n = image.shape[-1] // size
    patches = [image[:, r * size : (r + 1) * size, c * size : (c + 1) * size] for r in range(n) for c in range(n)]
    x = np.stack([(kernel * patch).sum((1, 2, 3)) for patch in patches]) + state["patch_embed.proj.bias"]
    x = x + state["pos_embed"][0]
    keep = np.arange(n * n) if keep is None else keep
    among = np.ix_(keep, keep)
    x = x[keep]
    bucket = buckets(n)[among] if position == "irpe" else None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for layer in range(depth):
        own = part(state, f"blocks.{layer}.")
        bias = None
        if position == "kprpe":
            bias = np.stack([b[among] for b in keypoint_biases(state, keypoints, n, layer, sharing, heads)])
        normed = layer_norm(x, own["norm1.weight"], own["norm1.bias"])
        x = x + attend(part(own, "attn."), normed, heads, bias, bucket)
        hidden = layer_norm(x, own["norm2.weight"], own["norm2.bias"]) @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"]
        x = x + relu6(hidden) @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"]
    x = layer_norm(x, state["norm.weight"], state["norm.bias"])
    if len(keep) < n * n:
        everywhere = np.repeat(state["mask_token"][0], n * n, axis=0)
        everywhere[keep] = x
        x = everywhere
    return x


def batch_norm(state: Mapping, x: np.ndarray, training: bool) -> np.ndarray:
    mean, variance = (x.mean(0), x.var(0)) if training else (state["running_mean"], state["running_var"])
    return (x - mean) / np.sqrt(variance + BATCH_NORM_EPS) * state["weight"] + state["bias"]


def embed(
    state: Mapping,
    images: np.ndarray,
    keypoints: np.ndarray | None = None,
    *,
    heads: int,
    position: str | None = None,
    sharing: str = "none",
    keep: np.ndarray | None = None,
    training: bool = False,
) -> np.ndarray:
    """(B, F) embeddings.

    Args:
        state: the network's weights by name, float64 arrays.
        images: (B, 3, S, S) in [-1, 1].
        keypoints: (B, 5, 2) xy in [0, 1], for KPRPE.
        heads: attention heads a block.
        position: None, "irpe" or "kprpe".
        sharing: what shares one KPRPE table.
        keep: (B, M) patches that the blocks see, in any order; None: all.
        training: normalize the head by the statistics of the batch.
    """
    tokens = [
        run_tokens(
            state,
            image,
            None if keypoints is None else keypoints[i],
            heads,
            position,
            sharing,
            None if keep is None else keep[i],
        )
        for i, image in enumerate(images)
    ]
    x = np.stack(tokens).reshape(len(images), -1) @ state["feature.0.weight"].T
    x = batch_norm(part(state, "feature.1."), x, training) @ state["feature.2.weight"].T
    return batch_norm(part(state, "feature.3."), x, training)
