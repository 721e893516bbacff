"""Anchors of a single-shot face detector: where they are, and boxes and points relative to them.

Everything is in [0, 1] of the network's square input. Anchors are center x, center y, width, height; boxes are
x1, y1, x2, y2. A regression is the offset from the anchor's center in units of its size, divided by a variance (SSD).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STRIDES = (8, 16, 32)
# Anchor sides in pixels at each stride, two per cell: they fit one face that fills a 160-pixel crop.
DFA_ANCHOR_SIZES = ((64, 80), (96, 112), (128, 144))
CENTER_VARIANCE, SIZE_VARIANCE = 0.1, 0.2


def make_anchors(image_size: int, sizes: Sequence[Sequence[int]] = DFA_ANCHOR_SIZES) -> torch.Tensor:
    """All anchors, level by level, row by row, cell by cell.

    Args:
        image_size: side of the network's input in pixels.
        sizes: sides in pixels of a cell's anchors, one sequence per stride.

    Returns:
        (A, 4) float32; A = 1050 for 160 pixels and two sizes per stride.
    """
    levels = []
    for stride, sides in zip(STRIDES, sizes, strict=True):
        cells = -(-image_size // stride)  # a padded strided convolution rounds up
        centers = (torch.arange(cells, dtype=torch.float64) + 0.5) * (stride / image_size)
        side = torch.tensor(sides, dtype=torch.float64) / image_size
        y, x, side = torch.meshgrid(centers, centers, side, indexing="ij")
        levels.append(torch.stack([x, y, side, side], -1).reshape(-1, 4))
    return torch.cat(levels).float()


def decode_boxes(regression: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """(..., A, 4) box regressions to (..., A, 4) boxes x1, y1, x2, y2."""
    center = anchors[:, :2] + regression[..., :2] * (CENTER_VARIANCE * anchors[:, 2:])
    half = anchors[:, 2:] * torch.exp(regression[..., 2:] * SIZE_VARIANCE) / 2
    return torch.cat([center - half, center + half], -1)


def encode_boxes(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`decode_boxes`; boxes need a positive width and height."""
    center, size = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    offset = (center - anchors[:, :2]) / (CENTER_VARIANCE * anchors[:, 2:])
    return torch.cat([offset, torch.log(size / anchors[:, 2:]) / SIZE_VARIANCE], -1)


def decode_points(regression: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """(..., A, 2P) landmark regressions to (..., A, 2P) coordinates x0, y0, x1, y1, ..."""
    points = regression.unflatten(-1, (-1, 2)) * (CENTER_VARIANCE * anchors[:, None, 2:]) + anchors[:, None, :2]
    return points.flatten(-2)


def encode_points(points: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`decode_points`."""
    offset = points.unflatten(-1, (-1, 2)) - anchors[:, None, :2]
    return (offset / (CENTER_VARIANCE * anchors[:, None, 2:])).flatten(-2)


def overlap(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Intersection over union of one box per image with every anchor.

    Args:
        boxes: (B, 4) x1, y1, x2, y2.
        anchors: (A, 4).

    Returns:
        (B, A) float in [0, 1].
    """
    low, high = anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2
    corners = boxes[:, None]  # (B, 1, 4)
    sides = (torch.minimum(corners[..., 2:], high) - torch.maximum(corners[..., :2], low)).clamp_min(0)
    shared = sides.prod(-1)
    union = (corners[..., 2:] - corners[..., :2]).prod(-1) + anchors[:, 2:].prod(-1) - shared
    return shared / union
