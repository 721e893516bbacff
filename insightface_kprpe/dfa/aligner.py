"""From a face crop to landmarks and the aligned face, differentiable from end to end.

Paper: "KeyPoint Relative Position Encoding for Face Recognition" (CVPR 2024), supplementary sections 3 and 7.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..geometry import (
    CANONICAL_KEYPOINTS,
    KEYPOINT_LIMIT,
    sampling_grid,
    similarity_transform,
    theta_from_similarity,
)
from ..state_dict import load_weights
from .network import AT_ONCE, RetinaFaceNet, infers_on_cpu

logger = logging.getLogger(__name__)

ALIGNED_SIZE = 112
PADDING_VALUE = -1.0  # black
ALIGNED_FROM = ("crop", "square")
# Below these, five points have no least-squares alignment worth the name. Faces are far above: on 2,800 real ones, many
# of them turned far to the side, the flatness is 0.15 or more and the correlation 0.3 or more.
MIN_SPREAD = 1e-4  # root mean square distance from their mean, as a fraction of the crop's longer side
MIN_FLATNESS = 1e-6  # determinant / squared trace of their scatter: 0 on a line, 0.25 for a round cloud
MIN_CORRELATION = 1e-3  # with the template, after the best rotation; 0 leaves the best scale 0

TEMPLATE = torch.tensor(CANONICAL_KEYPOINTS, device="cpu")  # (5, 2) in [0, 1] of an aligned crop


class AlignedFace(NamedTuple):
    """One face per crop.

    Attributes:
        keypoints: (B, 5, 2) xy in [0, 1] of the input crop.
        score: (B,) probability in [0, 1] that the crop shows a face; 0 where the landmarks are degenerate.
        bbox: (B, 4) x1, y1, x2, y2 in [0, 1] of the input crop; a face cut by the crop's edge reaches beyond.
        aligned: (B, 3, 112, 112) RGB in [-1, 1], the face moved onto the template; black outside the crop.
        aligned_keypoints: (B, 5, 2) xy in [0, 1] of the aligned crop.
        theta: (B, 2, 3) what ``grid_sample`` reads the aligned crop with: from [-1, 1] of it to [-1, 1] of the input
            (of the padded square where the DFA samples from that).
    """

    keypoints: torch.Tensor
    score: torch.Tensor
    bbox: torch.Tensor
    aligned: torch.Tensor
    aligned_keypoints: torch.Tensor
    theta: torch.Tensor


def fit_to_square(images: torch.Tensor, size: int, padding_ratio: float = 0.0) -> torch.Tensor:
    """Pad images to a square, black and centered, and resize them (bilinear, corners on corners).

    Args:
        images: (B, 3, H, W) float in [-1, 1].
        size: side of the result in pixels.
        padding_ratio: more padding on every side, as a fraction of the longer side (rounded down to whole pixels).

    Returns:
        (B, 3, size, size).
    """
    left, top, side = _padding(images.shape[-1], images.shape[-2], padding_ratio)
    right, bottom = side - images.shape[-1] - left, side - images.shape[-2] - top
    if left or top or right or bottom:
        images = F.pad(images, (left, right, top, bottom), value=PADDING_VALUE)
    if side != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=True)
    return images


def _padding(width: int, height: int, padding_ratio: float) -> tuple[int, int, int]:
    """Pixels on the left, on the top, and the side of the padded square."""
    longer = max(width, height)
    around = int(longer * padding_ratio)
    return around + (longer - width) // 2, around + (longer - height) // 2, longer + 2 * around


def _scaled(points: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """(..., 2) points with each axis multiplied by its own number (which stays off the device)."""
    return torch.stack([points[..., 0] * x, points[..., 1] * y], -1)


def square_to_crop(points: torch.Tensor, width: int, height: int, padding_ratio: float) -> torch.Tensor:
    """(..., 2) points in [0, 1] of the padded square to [0, 1] of the crop."""
    left, top, side = _padding(width, height, padding_ratio)
    x, y = points.unbind(-1)
    return torch.stack([(x * side - left) / width, (y * side - top) / height], -1)


def crop_to_square(points: torch.Tensor, width: int, height: int, padding_ratio: float) -> torch.Tensor:
    """(..., 2) points in [0, 1] of the crop to [0, 1] of the padded square."""
    left, top, side = _padding(width, height, padding_ratio)
    x, y = points.unbind(-1)
    return torch.stack([(x * width + left) / side, (y * height + top) / side], -1)


def canonical_keypoints(width: int, height: int, template: torch.Tensor = TEMPLATE) -> torch.Tensor:
    """(5, 2) keypoints for which aligning is no more than padding the crop to a square and resizing it."""
    return square_to_crop(template, width, height, 0.0)


def plausible(keypoints: torch.Tensor, template: torch.Tensor = TEMPLATE) -> torch.Tensor:
    """Whether five points determine an alignment: finite, not all in one place, not on one line, with a scale.

    Args:
        keypoints: (B, 5, 2) float as fractions of the crop's longer side, for x and y alike.
        template: (5, 2) what they will be aligned to.

    Returns:
        (B,) bool.
    """
    finite = torch.isfinite(keypoints).flatten(1).all(1)
    points = torch.where(finite[:, None, None], keypoints.detach(), 0.0)
    x, y = (points - points.mean(1, keepdim=True)).unbind(-1)
    u, v = (template - template.mean(0)).to(points).unbind(-1)
    spread = (x * x + y * y).sum(-1)
    determinant = (x * x).sum(-1) * (y * y).sum(-1) - (x * y).sum(-1).square()
    correlation = (x * u + y * v).sum(-1).square() + (x * v - y * u).sum(-1).square()
    return (
        finite
        & (spread > 5 * MIN_SPREAD**2)
        & (determinant > MIN_FLATNESS * spread.square())
        & (correlation > MIN_CORRELATION**2 * spread * (u * u + v * v).sum())
    )


def align(
    images: torch.Tensor, keypoints: torch.Tensor, size: int = ALIGNED_SIZE, template: torch.Tensor = TEMPLATE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move faces onto the template by the least-squares similarity of their landmarks, differentiably.

    Args:
        images: (B, 3, H, W) float in [-1, 1].
        keypoints: (B, 5, 2) xy in [0, 1] of the images; the result means something where they are ``plausible``.
        size: side of the aligned crop in pixels.
        template: (5, 2) where the keypoints should be, in [0, 1] of the aligned crop.

    Returns:
        aligned (B, 3, size, size), aligned_keypoints (B, 5, 2), theta (B, 2, 3), as in ``AlignedFace``.
    """
    device = images.device.type
    if torch.is_autocast_enabled(device):  # its products of 16-bit numbers would move the face by a pixel
        with torch.autocast(device, enabled=False):
            return align(images, keypoints, size, template)
    height, width = images.shape[-2:]
    points = _scaled(keypoints, width, height)
    similarity = similarity_transform(points, template.to(points) * size)
    theta = theta_from_similarity(similarity, (width, height), size)
    aligned_keypoints = (points @ similarity[:, :, :2].mT + similarity[:, None, :, 2]) / size
    if not infers_on_cpu(images):
        return _warp(images, theta, size), aligned_keypoints, theta
    parts = zip(images.split(AT_ONCE), theta.split(AT_ONCE), strict=True)
    return torch.cat([_warp(some, part, size) for some, part in parts]), aligned_keypoints, theta


def _warp(images: torch.Tensor, theta: torch.Tensor, size: int) -> torch.Tensor:
    axis = torch.linspace(-1, 1, size, dtype=theta.dtype, device=theta.device)
    grid = sampling_grid(theta, axis).to(images.dtype)
    # grid_sample fills with zeros: shifted by one, that is black
    return F.grid_sample(images - PADDING_VALUE, grid, padding_mode="zeros", align_corners=True).add_(PADDING_VALUE)


class DFA(RetinaFaceNet):
    """The Differentiable Face Aligner: landmarks, score, box and the aligned face of each crop.

    Its weights are exactly those of ``RetinaFaceNet``. Where the landmarks are degenerate (``plausible`` says no) or
    absurdly far outside, or a pixel of the crop is not finite, the face gets score 0, the canonical keypoints, the
    whole crop as its box, and the whole crop as its aligned face; no output and no gradient is NaN as long as the
    weights are finite.

    Args:
        weights: a file, or a state dict, with any of the published prefixes; without it the weights are random.
        padding_ratio: black border to put around the crop before the network sees it, as a fraction of its longer
            side; the network was trained on faces that fill 1 / 1.2 of the crop.
        aligned_from: what the aligned face is sampled from. "crop": the images themselves. "square": the padded
            square of 160 pixels that the network sees, as in CVLface; see docs/landmarks.md.
        **network: arguments of ``RetinaFaceNet``, e.g. ``**RETINAFACE`` for the baseline.

    Raises:
        FileNotFoundError: there is no such weights file.
        ValueError: the weights do not fit, or an argument is out of range.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, torch.Tensor] | None = None,
        *,
        padding_ratio: float = 0.0,
        aligned_from: str = "crop",
        **network,
    ) -> None:
        super().__init__(**network)
        if padding_ratio < 0:
            raise ValueError(f"padding_ratio must be 0 or more, got {padding_ratio}")
        if aligned_from not in ALIGNED_FROM:
            raise ValueError(f"aligned_from must be one of {', '.join(ALIGNED_FROM)}, got {aligned_from!r}")
        self.padding_ratio = padding_ratio
        self.aligned_from = aligned_from
        self.register_buffer("template", TEMPLATE.clone(), persistent=False)
        if weights is None:
            logger.info("DFA has random weights until some are loaded")
        else:
            load_weights(self, weights)

    def forward(self, images: torch.Tensor) -> AlignedFace:
        """Find and align one face per crop.

        Args:
            images: (B, 3, H, W) float RGB in [-1, 1], any size.

        Raises:
            ValueError: the images are not (B, 3, H, W) floating point.
        """
        keypoints, score, bbox = self.locate(images)
        images = images.nan_to_num(PADDING_VALUE, PADDING_VALUE, PADDING_VALUE)
        points = keypoints
        if self.aligned_from == "square":
            height, width = images.shape[-2:]
            points = crop_to_square(keypoints, width, height, self.padding_ratio)
            images = fit_to_square(images, self.image_size, self.padding_ratio)
        return AlignedFace(keypoints, score, bbox, *align(images, points, template=self.template))

    def locate(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find one face per crop and leave the crop as it is.

        Args:
            images: (B, 3, H, W) float RGB in [-1, 1], any size.

        Returns:
            keypoints (B, 5, 2), score (B,) and bbox (B, 4), as in ``AlignedFace``.

        Raises:
            ValueError: the images are not (B, 3, H, W) floating point.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be (B, 3, H, W) float RGB in [-1, 1], got {tuple(images.shape)} {images.dtype}; "
                "a uint8 image becomes one by permute(2, 0, 1) / 127.5 - 1"
            )
        # One number that is not finite leaves no finite sum.
        precision = torch.promote_types(images.dtype, torch.float32)
        finite = torch.isfinite(images.sum((1, 2, 3), dtype=precision))
        images = torch.where(finite[:, None, None, None], images, PADDING_VALUE)
        height, width = images.shape[-2:]
        bgr = fit_to_square(images, self.image_size, self.padding_ratio).flip(1)
        found = super().forward(bgr)

        precise = torch.promote_types(found.keypoints.dtype, torch.float32)  # geometry needs more than 16 bits
        keypoints = square_to_crop(found.keypoints.to(precise), width, height, self.padding_ratio)
        corners = found.bbox.to(precise).unflatten(1, (2, 2))
        bbox = square_to_crop(corners, width, height, self.padding_ratio).flatten(1)

        longer = max(width, height)
        good = plausible(_scaled(keypoints, width / longer, height / longer), self.template)
        good = good & (keypoints.abs() <= KEYPOINT_LIMIT).flatten(1).all(1)
        good = good & torch.isfinite(bbox).all(1) & torch.isfinite(found.score) & finite
        canonical = canonical_keypoints(width, height, self.template).to(precise)
        keypoints = torch.where(good[:, None, None], keypoints, canonical)
        whole = (torch.arange(4, device=bbox.device) > 1).to(precise)  # 0, 0, 1, 1
        bbox = torch.where(good[:, None], bbox, whole)
        score = torch.where(good, found.score, 0.0)
        return keypoints, score, bbox
