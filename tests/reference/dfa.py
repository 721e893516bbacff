"""DFA: RetinaFace-MobileNet0.25 with the Mixer aggregator (KPRPE paper, Eq. 13-15; supplementary section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .vit import layer_norm, part, softmax

ANCHOR_SIZES = ((64, 80), (96, 112), (128, 144))
SLOPE = 0.1
_error_function = np.vectorize(math.erf, otypes=[np.float64])


def anchors(image_size: int, sizes: Sequence[Sequence[int]] = ANCHOR_SIZES) -> np.ndarray:
    """(A, 4) center x, center y, width, height in [0, 1]: levels, rows, columns, sizes, from the outer to the inner."""
    found = []
    for stride, sides in zip((8, 16, 32), sizes, strict=True):
        cells = math.ceil(image_size / stride)
        for row in range(cells):
            for column in range(cells):
                for side in sides:
                    center = (column + 0.5) * stride / image_size, (row + 0.5) * stride / image_size
                    found.append((*center, side / image_size, side / image_size))
    return np.array(found)


def decode_box(regression: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """(4,) x1, y1, x2, y2 from the four numbers of one anchor; variances 0.1 of the center, 0.2 of the size."""
    center = anchor[:2] + 0.1 * regression[:2] * anchor[2:]
    size = anchor[2:] * np.exp(0.2 * regression[2:])
    return np.concatenate([center - size / 2, center + size / 2])


def decode_points(regression: np.ndarray, anchor: np.ndarray) -> np.ndarray:
    """(2P,) x0, y0, x1, y1, ... from the numbers of one anchor; variance 0.1."""
    return (anchor[:2] + 0.1 * regression.reshape(-1, 2) * anchor[2:]).reshape(-1)


def mixer(state: Mapping, x: np.ndarray) -> np.ndarray:
    """(A, 16) -> (A, 16): a perceptron over the anchors, then one over the values, each after a norm, added."""
    x = x + perceptron(part(state, "mlp_tokens."), norm(part(state, "norm1."), x).T).T
    return x + perceptron(part(state, "mlp_channels."), norm(part(state, "norm2."), x))


def norm(state: Mapping, x: np.ndarray) -> np.ndarray:
    return layer_norm(x, state["weight"], state["bias"], eps=1e-6)


def perceptron(state: Mapping, x: np.ndarray) -> np.ndarray:
    hidden = x @ state["fc1.weight"].T + state["fc1.bias"]
    hidden = hidden * (1 + _error_function(hidden / math.sqrt(2))) / 2  # GELU
    return hidden @ state["fc2.weight"].T + state["fc2.bias"]


def aggregate(state: Mapping, values: np.ndarray) -> np.ndarray:
    """(16,): the sum of what all anchors say, (A, 16), weighted by a softmax over the anchors."""
    x = values
    for block in range(3):
        x = mixer(part(state, f"{block}."), x)
    weights = softmax((x @ state["3.weight"].T + state["3.bias"])[:, 0])
    return weights @ values


def convolve(x: np.ndarray, kernel: np.ndarray, stride: int = 1) -> np.ndarray:
    """(C, H, W) -> (O, H / stride, W / stride), zeros around; a kernel of (C, 1, k, k) goes channel by channel."""
    size = kernel.shape[-1]
    padded = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    out = 0
    for dy in range(size):
        for dx in range(size):
            rows = slice(dy, dy + x.shape[1], stride)
            columns = slice(dx, dx + x.shape[2], stride)
            seen = padded[:, rows, columns]
            weights = kernel[:, :, dy, dx]
            out = out + (weights[:, :, None] * seen if kernel.shape[1] == 1 else np.tensordot(weights, seen, 1))
    return out


def conv_bn(state: Mapping, x: np.ndarray, slope: float | None, stride: int = 1, first: int = 0) -> np.ndarray:
    """Convolution ``first``, norm ``first + 1`` and leaky ReLU (None: none)."""
    x = convolve(x, state[f"{first}.weight"], stride)
    mean, variance, weight, bias = (
        state[f"{first + 1}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    x = (x - mean) / np.sqrt(variance + 1e-5) * weight + bias
    return x if slope is None else np.where(x > 0, x, slope * x)


def body(state: Mapping, x: np.ndarray, slope: float) -> list[np.ndarray]:
    """MobileNet v1: depthwise and pointwise convolutions in turn; features at strides 8, 16, 32."""
    levels = []
    strides = {"stage1": (2, 1, 2, 1, 2, 1), "stage2": (2, 1, 1, 1, 1, 1), "stage3": (2, 1)}
    for stage, of_blocks in strides.items():
        for block, stride in enumerate(of_blocks):
            own = part(state, f"{stage}.{block}.")
            x = conv_bn(own, x, slope, stride)
            if (stage, block) != ("stage1", 0):
                x = conv_bn(own, x, slope, first=3)
        levels.append(x)
    return levels


def grow(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Nearest neighbors to the size of ``like``."""
    rows = np.arange(like.shape[1]) * x.shape[1] // like.shape[1]
    columns = np.arange(like.shape[2]) * x.shape[2] // like.shape[2]
    return x[:, rows][:, :, columns]


def pyramid(state: Mapping, levels: Sequence[np.ndarray], slope: float) -> list[np.ndarray]:
    fine, middle, coarse = (conv_bn(part(state, f"output{i + 1}."), x, slope) for i, x in enumerate(levels))
    middle = conv_bn(part(state, "merge2."), middle + grow(coarse, middle), slope)
    fine = conv_bn(part(state, "merge1."), fine + grow(middle, fine), slope)
    return [fine, middle, coarse]


def context(state: Mapping, x: np.ndarray, slope: float) -> np.ndarray:
    """SSH: one, two and three 3x3 convolutions side by side; the latter two share their first."""
    shared = conv_bn(part(state, "conv5X5_1."), x, slope)
    deep = conv_bn(part(state, "conv7X7_2."), shared, slope)
    branches = [
        conv_bn(part(state, "conv3X3."), x, None),
        conv_bn(part(state, "conv5X5_2."), shared, None),
        conv_bn(part(state, "conv7x7_3."), deep, None),
    ]
    return np.maximum(np.concatenate(branches), 0)


def heads(state: Mapping, levels: Sequence[np.ndarray], size: int) -> np.ndarray:
    """(A, size): a 1x1 convolution a level, cell by cell, the two anchors of a cell one after the other."""
    found = []
    for i, level in enumerate(levels):
        kernel, bias = state[f"{i}.conv1x1.weight"][:, :, 0, 0], state[f"{i}.conv1x1.bias"]
        for row in range(level.shape[1]):
            for column in range(level.shape[2]):
                found.extend((kernel @ level[:, row, column] + bias).reshape(2, size))
    return np.array(found)


def run(
    state: Mapping,
    image: np.ndarray,
    *,
    slope: float = SLOPE,
    sizes: Sequence[Sequence[int]] = ANCHOR_SIZES,
    mean: Sequence[float] = (127.5, 127.5, 127.5),
    std: float = 127.5,
    aggregator: bool = True,
) -> dict[str, np.ndarray]:
    """What the network says of one face, by the names of ``NetworkOutput``.

    Args:
        state: the network's weights by name, float64 arrays.
        image: (3, S, S) BGR in [-1, 1].
        slope: of the leaky ReLUs.
        sizes: of the anchors, in pixels.
        mean: of blue, green and red, subtracted from pixels in 0..255.
        std: what the difference is divided by.
        aggregator: weigh the anchors by the Mixer; otherwise read the most face-like one.
    """
    x = ((image + 1) * 127.5 - np.array(mean)[:, None, None]) / std
    levels = pyramid(part(state, "fpn."), body(part(state, "body."), x, slope), slope)
    levels = [context(part(state, f"ssh{i + 1}."), level, slope) for i, level in enumerate(levels)]
    boxes, classes, points = (
        heads(part(state, f"{name}."), levels, size)
        for name, size in (("BboxHead", 4), ("ClassHead", 2), ("LandmarkHead", 10))
    )
    all_anchors = anchors(image.shape[1], sizes)
    values = np.array(
        [
            np.concatenate([decode_box(box, anchor), logits, decode_points(numbers, anchor)])
            for box, logits, numbers, anchor in zip(boxes, classes, points, all_anchors, strict=True)
        ]
    )
    best = (classes[:, 1] - classes[:, 0]).argmax()
    face = aggregate(part(state, "aggregator."), values) if aggregator else values[best]
    return {
        "bbox_regression": boxes,
        "class_logits": classes,
        "landmark_regression": points,
        "keypoints": face[6:].reshape(5, 2),
        "bbox": face[:4],
        "score": softmax(face[4:6])[1],
    }
