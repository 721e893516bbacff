"""Batch augmentation of face crops that moves landmarks and box with the pixels, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..geometry import MIRROR_ORDER
from .augmentation import move_keypoints, similarity_about_center, warp_images
from .landmark_dataset import UNKNOWN, FaceSample
from .photometric import adjust_brightness, adjust_contrast, adjust_saturation, gaussian_blur, lower_resolution

Uniform = Callable[[float, float], torch.Tensor]  # low, high -> one random number per image


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float in [-1, 1]; float images, which are already in that range, are unchanged."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


class LandmarkAugmentation:
    """Mirror, scale, shift, rotation, color, blur and low resolution, and some images without a face.

    Mirroring, scale, shift and rotation are one matrix, by which pixels (one bilinear sampling), keypoints and box
    move. What comes from outside the crop is black.

    Args:
        mirror_probability: of a mirrored crop.
        scale: range of the factor by which the face grows.
        shift: largest move along x and y, as a fraction of the crop's side.
        rotation: largest angle, in degrees.
        color: largest relative change of brightness, contrast and saturation.
        gray_probability: of a gray image.
        blur_probability: of a blurred image; the Gaussian's sigma is 0.5 to 3 pixels, one draw for the batch.
        low_resolution_probability: of an image with only 16 to 96 pixels per side, one draw for the batch.
        faceless_probability: of an image without a face: plain with noise, or a crop whose 4 x 4 tiles are shuffled.
            They teach low scores; without them, every image that the network sees has a face.
    """

    def __init__(
        self,
        mirror_probability: float = 0.5,
        scale: tuple[float, float] = (0.7, 1.2),
        shift: float = 0.1,
        rotation: float = 30.0,
        color: float = 0.3,
        gray_probability: float = 0.1,
        blur_probability: float = 0.2,
        low_resolution_probability: float = 0.3,
        faceless_probability: float = 0.05,
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be a range of positive factors, got {scale}")
        self.scale, self.shift, self.rotation, self.color = scale, shift, rotation, color
        self.mirror_probability, self.gray_probability = mirror_probability, gray_probability
        self.blur_probability, self.low_resolution_probability = blur_probability, low_resolution_probability
        self.faceless_probability = faceless_probability

    def __call__(self, batch: FaceSample, generator: torch.Generator | None = None) -> FaceSample:
        """Augment one batch.

        Args:
            batch: images (B, 3, S, S) uint8 or float in [-1, 1].
            generator: of the random numbers, on the CPU.

        Returns:
            A new batch with float images in [-1, 1].
        """

        def uniform(low: float, high: float) -> torch.Tensor:
            """(B,) random numbers on the images' device."""
            return (low + (high - low) * torch.rand(len(batch.image), generator=generator)).to(batch.image.device)

        matrix, mirrored = self._draw_matrix(uniform)
        images, keypoints, bbox = move(FaceSample(to_float(batch.image), batch.keypoints, batch.bbox), matrix, mirrored)
        images = self._recolor(images, uniform)
        for probability, low, high, degrade in (
            (self.blur_probability, 0.5, 3.0, gaussian_blur),
            (self.low_resolution_probability, 16, 97, lambda chosen, side: lower_resolution(chosen, int(side))),
        ):
            chosen = uniform(0, 1) < probability
            strength = float(torch.empty(()).uniform_(low, high, generator=generator))
            if chosen.any():
                images[chosen] = degrade(images[chosen], strength)
        chosen = uniform(0, 1) < self.faceless_probability
        if chosen.any():
            images[chosen] = _without_face(images[chosen], generator)
            keypoints = torch.where(chosen[:, None, None], UNKNOWN, keypoints)
            bbox = torch.where(chosen[:, None], UNKNOWN, bbox)
        return FaceSample(images.clamp(-1, 1), keypoints, bbox)  # for rounding errors of the interpolation

    def _draw_matrix(self, uniform: Uniform) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 2, 3) matrices for ``move``, and which of them mirror."""
        mirrored = uniform(0, 1) < self.mirror_probability
        # scale is drawn on a logarithmic axis: growing and shrinking by the same factor are equally likely
        size = torch.exp(uniform(math.log(self.scale[0]), math.log(self.scale[1])))
        angle = uniform(-math.radians(self.rotation), math.radians(self.rotation))
        shift = torch.stack([uniform(-self.shift, self.shift), uniform(-self.shift, self.shift)], -1)
        return similarity_about_center(angle, size, shift, mirrored), mirrored

    def _recolor(self, images: torch.Tensor, uniform: Uniform) -> torch.Tensor:
        """Brightness, contrast and saturation of each image, in this order."""
        brightness, contrast, saturation = (uniform(1 - self.color, 1 + self.color) for _ in range(3))
        saturation = torch.where(uniform(0, 1) < self.gray_probability, 0.0, saturation)
        images = adjust_brightness((images + 1) / 2, brightness)
        return adjust_saturation(adjust_contrast(images, contrast), saturation) * 2 - 1


def move(batch: FaceSample, matrix: torch.Tensor, mirrored: torch.Tensor) -> FaceSample:
    """Move pixels, keypoints and box by one matrix per image.

    Args:
        batch: images (B, 3, S, S) float in [-1, 1].
        matrix: (B, 2, 3) float, from [0, 1] of the old crop to [0, 1] of the new one.
        mirrored: (B,) bool, where the matrix mirrors, so that left and right points change places.

    Returns:
        The moved batch; the box is the one around the moved ellipse that filled the old box.
    """
    images, keypoints, bbox = batch
    swapped = keypoints[:, list(MIRROR_ORDER)]  # the matrix does the rest
    moved = move_keypoints(torch.where(mirrored[:, None, None], swapped, keypoints), matrix)
    keypoints = torch.where(is_known(keypoints)[:, None, None], moved, UNKNOWN)

    linear, offset = matrix[:, :, :2], matrix[:, :, 2]
    half = (bbox[:, 2:] - bbox[:, :2]) / 2
    center = ((bbox[:, :2] + half).unsqueeze(1) @ linear.mT).squeeze(1) + offset
    half = (linear * half.unsqueeze(1)).norm(dim=-1)
    bbox = torch.where(is_known(bbox)[:, None], torch.cat([center - half, center + half], -1), UNKNOWN)
    return FaceSample(warp_images(images, matrix), keypoints, bbox)


def is_known(values: torch.Tensor) -> torch.Tensor:
    """(B,) bool: whether landmarks (B, 5, 2) or boxes (B, 4) exist."""
    return (values != UNKNOWN).flatten(1).any(1)


def _without_face(images: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Half of the images plain with noise, the other half their own tiles shuffled (4 x 4, one order for all)."""
    plain, tiles = images.tensor_split(2)
    level = torch.rand(len(plain), 3, 1, 1, generator=generator) * 2.6 - 1.3  # some black and white ones
    noise = torch.randn(plain.shape, generator=generator) * torch.rand(len(plain), 1, 1, 1, generator=generator) * 0.3
    plain = (level + noise).clamp(-1, 1).to(images)
    count, channels, side = len(tiles), images.shape[1], images.shape[2] // 4
    order = torch.randperm(16, generator=generator).to(images.device)
    cut = tiles[:, :, : 4 * side, : 4 * side].reshape(count, channels, 4, side, 4, side).permute(0, 1, 2, 4, 3, 5)
    cut = cut.reshape(count, channels, 16, side, side)[:, :, order].reshape(count, channels, 4, 4, side, side)
    tiles = tiles.clone()
    tiles[:, :, : 4 * side, : 4 * side] = cut.permute(0, 1, 2, 4, 3, 5).reshape(count, channels, 4 * side, 4 * side)
    return torch.cat([plain, tiles])
