"""Augmentation in batch on the training device: pixels and keypoints are moved by the same matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..geometry import mirror_keypoints


def warp_images(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Move the pixels of each image by its matrix; what comes from outside is black.

    Args:
        images: (B, C, S, S) float in [-1, 1].
        matrix: (B, 2, 3) float, from [0, 1] of the old crop to [0, 1] of the new one.
    """
    linear, offset = matrix[:, :, :2], matrix[:, :, 2]
    inverse = torch.linalg.inv(linear)
    # grid_sample wants the way back, in [-1, 1], where x = (n + 1) / 2
    shift = inverse @ (1 - linear.sum(-1) - 2 * offset).unsqueeze(-1)
    grid = F.affine_grid(torch.cat([inverse, shift], -1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def move_keypoints(keypoints: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Move (B, K, 2) keypoints in [0, 1] by the (B, 2, 3) matrix that moves their crop."""
    return keypoints @ matrix[:, :, :2].mT + matrix[:, None, :, 2]


def random_mirror(
    images: torch.Tensor, keypoints: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror each face with probability 1/2, its keypoints along with it.

    Args:
        images: (B, 3, H, W), any type.
        keypoints: (B, 5, 2) float in [0, 1].
        generator: a CPU generator; the same state gives the same choice on any device.
    """
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
    return images, torch.where(chosen[:, None, None], mirror_keypoints(keypoints), keypoints)


def random_similarity(
    images: torch.Tensor,
    keypoints: torch.Tensor,
    generator: torch.Generator,
    rotation: float,
    scale: float,
    translation: float,
    probability: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn, scale and shift some of the crops about their centres, their keypoints along with them.

    Args:
        images: (B, 3, S, S) float in [-1, 1].
        keypoints: (B, 5, 2) float in [0, 1].
        generator: a CPU generator; the same state gives the same choice on any device.
        rotation: largest angle in degrees, either way.
        scale: crops are scaled by 1 - scale to 1 + scale.
        translation: largest shift along each axis, as a share of the side.
        probability: share of the crops that are moved at all.
    """
    count = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    chosen = torch.rand(count, generator=generator) < probability
    if not chosen.any():
        return images, keypoints
    angle, zoom = uniform(math.radians(rotation)), 1 + uniform(scale)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    linear = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    centre = torch.full((2,), 0.5)
    offset = centre + torch.stack([uniform(translation), uniform(translation)], -1) - linear @ centre
    matrix = torch.cat([linear, offset.unsqueeze(-1)], -1)[chosen].to(images.device)
    rows = torch.where(chosen)[0].to(images.device)
    images = images.index_copy(0, rows, warp_images(images[rows], matrix))
    return images, keypoints.index_copy(0, rows, move_keypoints(keypoints[rows], matrix))
