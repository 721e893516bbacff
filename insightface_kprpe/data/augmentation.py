"""Augmentation in batch on the training device: pixels and keypoints are moved by the same matrix.

The pixels' colors, blur and erasing are in :mod:`.photometric`; :class:`Augmentation` puts all of it together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from ..geometry import mirror_keypoints, sampling_grid
from .photometric import random_color, random_degradation, random_erasing

# The paper's supplement, Table 6, where it gives numbers; RandAugment is applied to colors only.
PAPER = {
    "rotation": 20.0,
    "rotation_probability": 0.2,
    "scale": 0.2,
    "translation": 0.1,
    "color_operations": 2,
    "color_magnitude": (5, 23),  # 14 +- 9 of 31 grades
    "degrade_probability": 0.2,
    "erase_probability": 0.2,
}
# On a CPU: with much more, returning memory to the system and allocating it again costs more than the warp
# itself.
_WARPED_AT_ONCE = 16


def warp_images(images: torch.Tensor, matrix: torch.Tensor, black: float = -1.0) -> torch.Tensor:
    """Move the pixels of each image by its matrix; what comes from outside the image is black.

    Args:
        images: (B, C, S, S) float.
        matrix: (B, 2, 3) float, from [0, 1] of the old crop to [0, 1] of the new one.
        black: the number of black pixels.
    """
    linear, offset = matrix[:, :, :2], matrix[:, :, 2:]
    inverse = torch.linalg.inv_ex(linear).inverse  # inv would synchronize with the GPU
    # grid_sample needs the inverse, in [-1, 1], where x = (n + 1) / 2
    shift = inverse @ (1 - linear.sum(-1, keepdim=True) - 2 * offset)
    axis = (torch.arange(images.shape[-1], device=images.device) * 2 + 1) / images.shape[-1] - 1
    grid = sampling_grid(torch.cat([inverse, shift], -1), axis)
    if black == 0:
        return F.grid_sample(images, grid, align_corners=False)
    return F.grid_sample(images - black, grid, align_corners=False).add_(black)


def similarity_about_center(
    angle: torch.Tensor, zoom: torch.Tensor, shift: torch.Tensor, mirrored: torch.Tensor | None = None
) -> torch.Tensor:
    """The matrices that mirror, turn and scale crops about their centers, in this order, and then shift them.

    Args:
        angle: (B,) radians, clockwise as seen.
        zoom: (B,) magnification factors.
        shift: (B, 2) along x and y, as fractions of the side.
        mirrored: (B,) bool; None: none is.

    Returns:
        (B, 2, 3) float, from [0, 1] of the old crop to [0, 1] of the new one.
    """
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    sign = 1.0 if mirrored is None else torch.where(mirrored, -1.0, 1.0)
    linear = torch.stack([torch.stack([cos * sign, -sin], -1), torch.stack([sin * sign, cos], -1)], -2)
    center = torch.full((2,), 0.5, device=angle.device)
    return torch.cat([linear, (center + shift - linear @ center).unsqueeze(-1)], -1)


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

    Returns:
        New images and their keypoints.
    """
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    result = images.flip(-1)
    for row in torch.where(~mirrored)[0].tolist():  # little fresh memory, which costs a CPU more than the copying
        result[row] = images[row]
    mirrored = mirrored.to(images.device)
    return result, torch.where(mirrored[:, None, None], mirror_keypoints(keypoints), keypoints)


def random_similarity(
    images: torch.Tensor,
    keypoints: torch.Tensor,
    generator: torch.Generator,
    rotation: float,
    scale: float,
    translation: float,
    probability: float,
    rotation_probability: float = 1.0,
) -> torch.Tensor:
    """Turn, scale and shift some of the crops about their centers, their keypoints along with them.

    Args:
        images: (B, 3, S, S) float in [0, 1]; changed in place.
        keypoints: (B, 5, 2) float in [0, 1].
        generator: a CPU generator; the same state gives the same choice on any device.
        rotation: largest angle in degrees, either way.
        scale: crops are scaled by 1 - scale to 1 + scale.
        translation: largest shift along each axis, as a share of the side.
        probability: share of the crops that are moved at all.
        rotation_probability: share of these that are turned.

    Returns:
        (B, 5, 2) the moved keypoints.
    """
    count = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * limit

    chosen = torch.rand(count, generator=generator) < probability
    if not chosen.any():
        return keypoints
    angle, zoom = uniform(math.radians(rotation)), 1 + uniform(scale)
    shift = torch.stack([uniform(translation), uniform(translation)], -1)
    if rotation_probability < 1:
        angle = torch.where(torch.rand(count, generator=generator) < rotation_probability, angle, 0.0)
    matrix = similarity_about_center(angle, zoom, shift)
    matrix, rows = matrix[chosen].to(images.device), torch.where(chosen)[0].to(images.device)
    at_once = _WARPED_AT_ONCE if images.device.type == "cpu" else len(rows)
    if len(rows) == count:  # views are enough
        for some, part in zip(images.split(at_once), matrix.split(at_once), strict=True):
            some.copy_(warp_images(some, part, black=0))
    else:
        for some, part in zip(rows.split(at_once), matrix.split(at_once), strict=True):
            images.index_copy_(0, some, warp_images(images.index_select(0, some), part, black=0))
    return keypoints.index_copy(0, rows, move_keypoints(keypoints[rows], matrix))


class Augmentation:
    """Mirroring, color, degradation, similarity and erasing, in this order; all but mirroring are off by default.

    Everything outside the old crop, and everything erased, is black, whatever happened to the colors.

    Args:
        rotation: largest angle in degrees, either way.
        rotation_probability: share of the moved crops that are turned.
        scale: crops are scaled by 1 - scale to 1 + scale.
        translation: largest shift along each axis, as a share of the side.
        probability: share of the crops that are turned, scaled and shifted at all.
        color_operations: operations of RandAugment on each crop.
        color_magnitude: lowest and highest of them, in 0 to 30.
        degrade_probability: share of the crops that are blurred or lose resolution.
        erase_probability: share of the crops of which a part is blacked out.

    Raises:
        ValueError: a probability is not in [0, 1], or another number is out of range.
    """

    def __init__(
        self,
        rotation: float = 0.0,
        rotation_probability: float = 1.0,
        scale: float = 0.0,
        translation: float = 0.0,
        probability: float = 1.0,
        color_operations: int = 0,
        color_magnitude: tuple[int, int] = PAPER["color_magnitude"],
        degrade_probability: float = 0.0,
        erase_probability: float = 0.0,
    ) -> None:
        probabilities = {
            "probability": probability,
            "rotation_probability": rotation_probability,
            "degrade_probability": degrade_probability,
            "erase_probability": erase_probability,
        }
        for name, value in probabilities.items():
            if not 0 <= value <= 1:
                raise ValueError(f"augment: {name} must be a probability in [0, 1], got {value}")
        if not 0 <= scale < 1 or rotation < 0 or translation < 0 or color_operations < 0:
            got = f"{scale}, {rotation}, {translation}, {color_operations}"
            raise ValueError(
                f"augment: scale must be in [0, 1), rotation, translation and color_operations not negative, got {got}"
            )
        low, high = color_magnitude
        if not 0 <= low <= high <= 30:
            raise ValueError(f"augment: color_magnitude must be lowest and highest in 0 to 30, got {color_magnitude}")
        self.similarity = {
            "rotation": rotation,
            "scale": scale,
            "translation": translation,
            "probability": probability if rotation or scale or translation else 0.0,
            "rotation_probability": rotation_probability,
        }
        self.color_operations, self.color_magnitude = color_operations, (low, high)
        self.degrade_probability, self.erase_probability = degrade_probability, erase_probability

    def __call__(
        self, images: torch.Tensor, keypoints: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment one batch.

        Args:
            images: (B, 3, S, S) uint8.
            keypoints: (B, 5, 2) float in [0, 1] of the crop.
            generator: on the CPU; the same state gives the same choices on any device.

        Returns:
            New images, (B, 3, S, S) float in [-1, 1], and their keypoints.
        """
        images, keypoints = random_mirror(images, keypoints, generator)
        images = images.float().div_(255)
        if self.color_operations:
            random_color(images, generator, self.color_operations, self.color_magnitude)
        if self.degrade_probability:
            random_degradation(images, generator, self.degrade_probability)
        keypoints = random_similarity(images, keypoints, generator, **self.similarity)
        if self.erase_probability:
            random_erasing(images, generator, self.erase_probability)
        return torch.add(images.new_tensor(-1.0), images, alpha=2, out=images), keypoints


def build_augmentation(augment: str | Mapping[str, float]) -> Augmentation:
    """What a config's ``augment`` asks for.

    Args:
        augment: "paper", or arguments of :class:`Augmentation` by name; empty for mirroring alone.

    Raises:
        ValueError: another string, an unknown name or a number out of its range.
    """
    if isinstance(augment, str):
        if augment != "paper":
            raise ValueError(f'augment must be "paper" or a dict of Augmentation\'s arguments, got {augment!r}')
        augment = PAPER
    try:
        return Augmentation(**augment)
    except TypeError as error:
        known = ", ".join([*PAPER, "probability"])
        raise ValueError(f"augment must have keys among {known}; got {', '.join(augment)}") from error
