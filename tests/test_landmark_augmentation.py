import pytest
import torch

from insightface_kprpe.data.landmark_augmentation import (
    LandmarkAugmentation,
    gaussian_blur,
    lower_resolution,
    move,
    to_float,
)
from insightface_kprpe.data.landmark_dataset import FaceSample

SIZE = 160
GEOMETRY_ONLY = {
    "color": 0.0,
    "gray_probability": 0.0,
    "blur_probability": 0.0,
    "low_resolution_probability": 0.0,
    "faceless_probability": 0.0,
}


def dotted(count, seed=0):
    """Crops of which point k is drawn as a soft dot in crop k of five: one dot an image finds one point for sure."""
    generator = torch.Generator().manual_seed(seed)
    keypoints = 0.3 + 0.4 * torch.rand(count, 5, 2, generator=generator)
    center = (keypoints * SIZE - 0.5).unsqueeze(-1)  # the middle of the first pixel is half a pixel from the edge
    axis = torch.arange(SIZE, dtype=torch.float32)
    dots = torch.exp(-0.5 * ((axis - center) / 2).square())  # (count, 5, 2, SIZE)
    images = dots[:, :, 1, :, None] * dots[:, :, 0, None, :]  # (count, 5, SIZE, SIZE)
    images = images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1) * 2 - 1
    bbox = torch.tensor([0.2, 0.15, 0.8, 0.85]).expand(5 * count, 4)
    return FaceSample(images, keypoints.repeat_interleave(5, 0), bbox)


def find(images):
    """Center of mass of the dot in each image, in [0, 1]."""
    mass = images.mean(1) + 1
    total = mass.sum((1, 2))
    center = (torch.arange(SIZE) + 0.5) / SIZE
    return torch.stack([(mass.sum(1) * center).sum(1) / total, (mass.sum(2) * center).sum(1) / total], -1)


@pytest.mark.parametrize(
    "geometry",
    [
        {"mirror_probability": 1.0, "scale": (1.0, 1.0), "shift": 0.0, "rotation": 0.0},
        {"mirror_probability": 0.0, "scale": (0.7, 1.2), "shift": 0.0, "rotation": 0.0},
        {"mirror_probability": 0.0, "scale": (1.0, 1.0), "shift": 0.1, "rotation": 0.0},
        {"mirror_probability": 0.0, "scale": (1.0, 1.0), "shift": 0.0, "rotation": 40.0},
        {"mirror_probability": 0.5, "scale": (0.7, 1.2), "shift": 0.1, "rotation": 30.0},
    ],
    ids=["mirror", "scale", "shift", "rotation", "all"],
)
def test_points_move_with_pixels(geometry):
    batch = dotted(8)
    moved = LandmarkAugmentation(**geometry, **GEOMETRY_ONLY)(batch, torch.Generator().manual_seed(1))
    # image 5 i + k shows point k; where it was mirrored, that point is found under its partner's name
    found, point = find(moved.image), torch.arange(len(batch.image)) % 5
    partner = torch.tensor([1, 0, 2, 4, 3])[point]
    straight = (moved.keypoints[torch.arange(40), point] - found).norm(dim=-1)
    mirrored = (moved.keypoints[torch.arange(40), partner] - found).norm(dim=-1)
    error = (
        straight
        if geometry["mirror_probability"] == 0
        else mirrored
        if geometry["mirror_probability"] == 1
        else torch.minimum(straight, mirrored)
    )
    assert error.mean() * SIZE < 0.5
    changed = (moved.keypoints - batch.keypoints).abs().mean()
    assert changed > 0.01


def test_degradation_leaves_points_in_place():
    batch = dotted(2)
    moved = LandmarkAugmentation(
        mirror_probability=0,
        scale=(1, 1),
        shift=0,
        rotation=0,
        blur_probability=1,
        low_resolution_probability=1,
        faceless_probability=0,
        color=0,
        gray_probability=0,
    )(batch, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved.keypoints, batch.keypoints)
    found = find(moved.image)
    error = (found - moved.keypoints[torch.arange(10), torch.arange(10) % 5]).norm(dim=-1)
    assert error.mean() * SIZE < 0.5


def test_box_stays_around_the_ellipse():
    angle = torch.tensor(torch.pi / 2)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    matrix = torch.cat([turn, (torch.full((2,), 0.5) - turn @ torch.full((2,), 0.5))[:, None]], 1)[None]
    batch = FaceSample(torch.zeros(1, 3, 8, 8), torch.full((1, 5, 2), 0.5), torch.tensor([[0.3, 0.1, 0.7, 0.7]]))
    moved = move(batch, matrix, torch.tensor([False]))
    torch.testing.assert_close(moved.bbox, torch.tensor([[0.3, 0.3, 0.9, 0.7]]))


def test_unknown_stays_unknown():
    batch = dotted(2)
    keypoints, bbox = batch.keypoints.clone(), batch.bbox.clone()
    keypoints[::2], bbox[4:] = -1, -1
    moved = LandmarkAugmentation(faceless_probability=0)(FaceSample(batch.image, keypoints, bbox))
    assert (moved.keypoints[::2] == -1).all() and (moved.keypoints[1::2] != -1).all()
    assert (moved.bbox[4:] == -1).all() and (moved.bbox[:4] != -1).all()


def test_images_without_a_face():
    batch = dotted(4)
    moved = LandmarkAugmentation(faceless_probability=1)(batch)
    assert (moved.keypoints == -1).all() and (moved.bbox == -1).all()
    assert moved.image.abs().max() <= 1 and moved.image.shape == batch.image.shape


def test_uint8_in_float_out_and_repeatable():
    batch = dotted(1)
    batch = FaceSample(((batch.image + 1) * 127.5).round().byte(), batch.keypoints, batch.bbox)
    first, again = (LandmarkAugmentation()(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.image.dtype == torch.float32 and first.image.abs().max() <= 1
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(one, two)
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_color_changes_colors_only():
    batch = dotted(2)
    images = torch.rand(10, 3, 32, 32) * 2 - 1
    augment = LandmarkAugmentation(
        mirror_probability=0,
        scale=(1, 1),
        shift=0,
        rotation=0,
        blur_probability=0,
        low_resolution_probability=0,
        faceless_probability=0,
        gray_probability=1,
    )
    moved = augment(FaceSample(images, batch.keypoints, batch.bbox))
    torch.testing.assert_close(moved.keypoints, batch.keypoints)
    torch.testing.assert_close(moved.image[:, 0], moved.image[:, 2])  # gray
    assert (moved.image - images).abs().mean() > 0.05


def test_blur_and_low_resolution():
    image = torch.full((1, 3, 65, 65), -1.0)
    image[..., 32, 32] = 1
    blurred = gaussian_blur(image, 2.0) + 1
    assert blurred.sum() == pytest.approx(6, rel=1e-3)
    variance = (blurred[0, 0] / 2 * (torch.arange(65) - 32).square()).sum()
    assert variance == pytest.approx(4, rel=0.05)
    torch.testing.assert_close(gaussian_blur(torch.full((1, 3, 9, 9), 0.3), 1.0), torch.full((1, 3, 9, 9), 0.3))
    noise = torch.rand(1, 3, 160, 160)
    assert lower_resolution(noise, 16).shape == noise.shape and lower_resolution(noise, 16).std() < 0.2 * noise.std()


def test_bad_scale():
    with pytest.raises(ValueError, match="scale must be a range"):
        LandmarkAugmentation(scale=(1.2, 0.8))
