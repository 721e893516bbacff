import cv2
import numpy as np
import pytest
import torch

from insightface_kprpe.data import photometric
from insightface_kprpe.data.photometric import (
    OPERATIONS,
    equalize,
    gaussian_blur,
    lower_resolution,
    random_color,
    random_degradation,
    random_erasing,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pictures():
    """(4, 3, 48, 48) smooth uint8 images with much of the range."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([cv2.resize(image, (48, 48)) for image in small])).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("name", "pil"),
    [("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color"), ("sharpness", "Sharpness")],
)
@pytest.mark.parametrize("factor", [0.3, 0.9, 1.0, 1.6])
def test_operations_equal_those_of_pil(pictures, name, pil, factor):
    image, enhance = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageEnhance")
    ours = OPERATIONS[name](pictures / 255.0, torch.full((4,), factor))
    for picture, got in zip(pictures, ours, strict=True):
        source = image.fromarray(picture.permute(1, 2, 0).numpy())
        expected = torch.from_numpy(np.array(getattr(enhance, pil)(source).enhance(factor))).permute(2, 0, 1)
        assert (got * 255 - expected).abs().max() < 2  # PIL rounds between its steps


def test_equalise_equals_that_of_opencv(pictures):
    ours = equalize(pictures / 255.0)
    for picture, got in zip(pictures.flatten(0, 1), ours.flatten(0, 1), strict=True):
        expected = torch.from_numpy(cv2.equalizeHist(picture.numpy()))
        assert (got * 255 - expected).abs().max() < 0.51
    flat = torch.full((1, 3, 8, 8), 77 / 255)
    torch.testing.assert_close(equalize(flat), flat)


def test_grayscale_has_equal_channels_and_the_luma(pictures):
    gray = OPERATIONS["grayscale"](pictures / 255.0)
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 0], gray[:, 2])
    expected = cv2.cvtColor(pictures[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY)
    assert np.abs(gray[0, 0].numpy() * 255 - expected).max() < 1


def test_each_operation_is_drawn_equally_often_and_magnitudes_are_in_range(monkeypatch):
    drawn = {}

    def remember(name):
        def operation(images, factor):
            drawn.setdefault(name, []).append(factor)
            return images

        return operation

    monkeypatch.setattr(photometric, "OPERATIONS", {name: remember(name) for name in OPERATIONS})
    random_color(torch.rand(1400, 3, 1, 1), generator(), 2, (5, 23))
    for factors in drawn.values():
        factors = torch.cat(factors)
        assert 320 < len(factors) < 480  # 400 expected
        assert 0.14 < (factors - 1).abs().amin() < 0.18 and 0.67 < (factors - 1).abs().amax() < 0.7
        assert 0.35 < (factors > 1).float().mean() < 0.65
    assert list(drawn) == list(OPERATIONS)


def test_color_stays_in_range_and_repeats():
    images = torch.rand(64, 3, 20, 20, generator=generator(1))
    first, again = images.clone(), images.clone()
    random_color(first, generator(2), 3, (30, 30))
    random_color(again, generator(2), 3, (30, 30))
    assert torch.equal(first, again) and first.amin() >= 0 and first.amax() <= 1
    assert (first != images).flatten(1).any(1).float().mean() > 0.9
    unchanged = images.clone()
    random_color(unchanged, generator(2), 0, (5, 23))
    assert torch.equal(unchanged, images)


def test_a_share_of_the_images_loses_detail():
    images = torch.rand(400, 3, 32, 32, generator=generator(1))
    changed = images.clone()
    random_degradation(changed, generator(3), 0.2)
    touched = (changed != images).flatten(1).any(1)
    assert 56 < touched.sum() < 104
    detail = changed[touched].diff(dim=-1).abs().mean((1, 2, 3)) / images[touched].diff(dim=-1).abs().mean((1, 2, 3))
    assert detail.amax() < 0.98 and detail.amin() < 0.1
    assert changed.amin() >= 0 and changed.amax() <= 1.0001
    torch.testing.assert_close(changed.mean((1, 2, 3)), images.mean((1, 2, 3)), atol=0.03, rtol=0)


def test_degradations_equal_the_single_functions():
    image = torch.rand(1, 3, 112, 112)
    matrices = photometric._degradations(112, torch.device("cpu"))
    torch.testing.assert_close(matrices[31] @ image @ matrices[31].mT, gaussian_blur(image, 3.0))
    torch.testing.assert_close(matrices[32] @ image @ matrices[32].mT, lower_resolution(image, 16))
    expected = cv2.GaussianBlur(image[0, 0].numpy(), (19, 19), 3.0, borderType=cv2.BORDER_REPLICATE)
    np.testing.assert_allclose(gaussian_blur(image, 3.0)[0, 0], expected, atol=1e-5)


def test_erasing_blacks_out_a_rectangle_or_all_around_one():
    images = torch.ones(600, 3, 40, 40)
    random_erasing(images, generator(4), 0.5)
    black = images[:, 0] == 0
    assert torch.equal(images[:, 0], images[:, 1]) and set(images.unique().tolist()) == {0.0, 1.0}
    touched = black[black.flatten(1).any(1)]
    around = (touched[:, 0].all(-1) | touched[:, -1].all(-1)) | (touched[:, :, 0].all(-1) | touched[:, :, -1].all(-1))
    share = touched.float().mean((1, 2))
    assert 240 < len(touched) < 360
    assert 0.35 < around.float().mean() < 0.6
    assert share[~around].amax() < 0.37 and share[around].amax() < 0.83
    for mask in touched[~around][:20]:  # one rectangle
        rows, columns = torch.where(mask.any(1))[0], torch.where(mask.any(0))[0]
        assert mask.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] + 1 == len(rows) and columns[-1] - columns[0] + 1 == len(columns)
