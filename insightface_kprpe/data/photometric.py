"""Augmentation of pixels that moves nothing: color, blur, low resolution, erased parts.

All functions take (B, 3, H, W) float images in [0, 1] on any device. Random ones draw from a CPU generator, so that the
same state gives the same choice on any device, work on the chosen images of the batch together, and change them in
place: fresh memory for a batch costs a CPU more time than most of the arithmetic. They are implemented here because
torchvision draws one strength for a whole batch, and kornia's versions take 3 to 10 times as long on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

_LEVELS = 256  # of a uint8 pixel
_STEPS = 30  # RandAugment's scale of magnitudes, at whose end ...
_LARGEST_CHANGE = 0.9  # ... brightness, contrast, saturation and sharpness change by this share
_SIGMA = (0.5, 3.0)  # pixels, range of the Gaussian blur
_SIDE = (16, 96)  # pixels of a 112-pixel crop, range of the low resolution; other crops in proportion
_GRADES = 32  # blurs, and resolutions, between these ends


def luma(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) gray images, by the weights of ITU-R 601."""
    red, green, blue = images.split(1, 1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the light of each image by its (B,) factor."""
    return (images * factor[:, None, None, None]).clamp_(max=1)


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply each pixel's distance from the image's mean gray by the image's (B,) factor."""
    gray = luma(images)
    return _blend(gray.copy_(gray.mean((1, 2, 3), keepdim=True)), images, factor)


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply each pixel's distance from its gray by the image's (B,) factor."""
    return _blend(luma(images), images, factor)


def adjust_sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Blur (factor < 1) or sharpen (factor > 1) each image by its (B,) factor, with the 3 x 3 kernel of PIL.

    As in PIL, the outermost pixels stay as they are.
    """
    rows = (images[..., :-2, :] + images[..., 1:-1, :]).add_(images[..., 2:, :])
    smooth = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    inner = images[..., 1:-1, 1:-1]
    smooth.add_(inner, alpha=4).div_(13).lerp_(inner, factor[:, None, None, None]).clamp_(0, 1)
    result = images.clone()
    result[..., 1:-1, 1:-1] = smooth
    return result


def to_grayscale(images: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """Gray images with three equal channels; has no strength."""
    return luma(images).expand_as(images)


def equalize(images: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """Spread each channel's 256 levels so that all are equally frequent; has no strength."""
    levels = (images * (_LEVELS - 1)).round_().long().flatten(0, 1).flatten(1)  # (B * 3, H * W)
    counts = images.new_zeros(len(levels), _LEVELS)
    counts.scatter_add_(1, levels, images.new_ones(()).expand_as(levels))
    below = counts.cumsum(1)  # exact: a float32 counts to 16 million
    lowest = below.masked_fill(below == 0, math.inf).amin(1, keepdim=True)
    others = below[:, -1:] - lowest
    flat = torch.linspace(0, 1, _LEVELS, device=images.device)  # a channel with a single level is unchanged
    table = torch.where(others > 0, (below - lowest) / others.clamp_min(1), flat)
    return table.gather(1, levels).view_as(images)


def _blend(degenerate: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Interpolate from the degraded image at factor 0 to the original at 1, and beyond."""
    return torch.lerp(degenerate, images, factor[:, None, None, None]).clamp_(0, 1)


# In the order of the numbers that are drawn; None leaves an image unchanged.
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None] = {
    "identity": None,
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "sharpness": adjust_sharpness,
    "equalize": equalize,
    "grayscale": to_grayscale,
}


def random_color(images: torch.Tensor, generator: torch.Generator, operations: int, magnitude: tuple[int, int]) -> None:
    """RandAugment without its geometric part: apply ``operations`` of ``OPERATIONS`` to each image, one by one.

    Args:
        images: (B, 3, H, W) float in [0, 1]; changed in place.
        generator: on the CPU.
        operations: how many, drawn with replacement.
        magnitude: lowest and highest, in 0 to 30; 30 changes by 0.9, up or down.
    """
    if not operations or not len(images):
        return
    every, (low, high) = list(OPERATIONS.values()), magnitude
    shape = (operations, len(images))
    drawn = torch.randint(len(OPERATIONS), shape, generator=generator)
    change = torch.randint(low, high + 1, shape, generator=generator) * (_LARGEST_CHANGE / _STEPS)
    factors = 1 + change * (torch.randint(2, shape, generator=generator) * 2 - 1)
    # Images with the same sequence of operations are taken out of the batch and put back once.
    for numbers in drawn.unique(dim=1).T:
        rows = torch.where((drawn == numbers[:, None]).all(0))[0]
        steps = [every[number] for number in numbers.tolist()]
        if not any(steps):
            continue
        some = images.index_select(0, rows.to(images.device))
        for operation, strength in zip(steps, factors[:, rows].to(images.device), strict=True):
            some = some if operation is None else operation(some, strength)
        for row, image in zip(rows.tolist(), some, strict=True):  # half the time of index_copy_ on a CPU
            images[row] = image


def gaussian_blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur images by a Gaussian of ``sigma`` pixels; edges are repeated."""
    height, width = images.shape[-2:]
    return _resample(images, _blur_matrix(sigma, height).to(images), _blur_matrix(sigma, width).to(images))


def lower_resolution(images: torch.Tensor, side: int) -> torch.Tensor:
    """What (B, 3, S, S) images look like when the crop had only ``side`` pixels per side: averaged down, blown up."""
    matrix = _resolution_matrix(side, images.shape[-1]).to(images)
    return _resample(images, matrix, matrix)


def random_degradation(images: torch.Tensor, generator: torch.Generator, probability: float) -> None:
    """Blur some images, or lower their resolution: as cheap cameras and large distances do.

    Args:
        images: (B, 3, S, S) float in [0, 1]; changed in place.
        generator: on the CPU.
        probability: share of the images; half of them are blurred, half have a low resolution.
    """
    rows = torch.where(torch.rand(len(images), generator=generator) < probability)[0]
    kind = torch.randint(2 * _GRADES, (len(rows),), generator=generator)
    if not len(rows):
        return
    rows = rows.to(images.device)
    matrix = _degradations(images.shape[-1], images.device)[kind.to(images.device), None]
    images.index_copy_(0, rows, _resample(images.index_select(0, rows), matrix, matrix))


def random_erasing(images: torch.Tensor, generator: torch.Generator, probability: float) -> None:
    """Black out a rectangle of some images (2 to 33 % of the area), or all around one (of 20 to 100 %).

    Args:
        images: (B, 3, H, W) float in [0, 1]; changed in place.
        generator: on the CPU.
        probability: share of the images; half of them lose a rectangle, half what is around one.
    """
    rows = torch.where(torch.rand(len(images), generator=generator) < probability)[0]
    around = torch.randint(2, (len(rows),), generator=generator, dtype=torch.bool)
    area, ratio, x, y = torch.rand(4, len(rows), generator=generator)
    if not len(rows):
        return
    area = torch.where(around, 0.2 + 0.8 * area, 0.02 + 0.31 * area).sqrt()
    ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3) / 2)  # root of width by height
    erased = _inside(area * ratio, x, images.shape[-1])[:, None] & _inside(area / ratio, y, images.shape[-2])[..., None]
    erased = (erased ^ around[:, None, None]).to(images.device)
    rows = rows.to(images.device)
    images.index_copy_(0, rows, images.index_select(0, rows).masked_fill_(erased[:, None], 0.0))


def _inside(length: torch.Tensor, place: torch.Tensor, size: int) -> torch.Tensor:
    """(n, size) bool: which of ``size`` pixels lie in intervals of these lengths (shares of the side, cut at 1)."""
    length = length.clamp_max(1.0)[:, None]
    start = place[:, None] * (1 - length)
    center = (torch.arange(size) + 0.5) / size
    return (center >= start) & (center < start + length)


def _resample(images: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Apply a matrix to the rows and one to the columns, each (..., S, S) from old pixels to new ones."""
    return rows @ images @ columns.mT


def _blur_matrix(sigma: float, side: int) -> torch.Tensor:
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    source = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, source, (kernel / kernel.sum()).expand(side, -1))


def _resolution_matrix(small: int, side: int) -> torch.Tensor:
    impulses = torch.eye(side)[None, None]
    down = F.interpolate(impulses, size=(side, small), mode="bilinear", antialias=True)
    return F.interpolate(down, size=(side, side), mode="bilinear")[0, 0].mT


@functools.lru_cache(maxsize=4)
def _degradations(side: int, device: torch.device) -> torch.Tensor:
    """(2 * _GRADES, side, side) matrices: blurs, then low resolutions."""
    sigmas = torch.linspace(*_SIGMA, _GRADES).tolist()
    sides = (torch.linspace(*_SIDE, _GRADES) * side / 112).round().clamp_min(1).int().tolist()
    matrices = [_blur_matrix(sigma, side) for sigma in sigmas] + [_resolution_matrix(small, side) for small in sides]
    return torch.stack(matrices).to(device)
