"""Similarities, warps and the aligner's square against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from insightface_kprpe.dfa.aligner import align, fit_to_square, square_to_crop
from insightface_kprpe.geometry import (
    ARCFACE_TEMPLATE_112,
    CANONICAL_KEYPOINTS,
    align_face,
    estimate_alignment,
    similarity_transform,
    theta_from_similarity,
    warp_smoothly,
)

from . import geometry
from .gradients import slope


def draw_faces(count: int) -> np.ndarray:
    """(count, 5, 2) landmarks in pixels: the template turned, scaled, moved and bent."""
    rng = np.random.default_rng(0)
    angle, scale = rng.uniform(-np.pi, np.pi, count), rng.uniform(0.3, 4, count)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    faces = np.einsum("xyn,py->npx", turn, 112 * geometry.TEMPLATE) + rng.normal(0, 100, (count, 1, 2))
    return faces + scale[:, None, None] * rng.normal(0, 4, (count, 5, 2))


def test_template():
    np.testing.assert_allclose(CANONICAL_KEYPOINTS, geometry.TEMPLATE, atol=1e-7)
    np.testing.assert_allclose(ARCFACE_TEMPLATE_112, 112 * geometry.TEMPLATE, atol=1e-5)


def test_similarity_transform_and_its_gradient():
    faces, target = draw_faces(6), 112 * geometry.TEMPLATE
    leaf = torch.tensor(faces, requires_grad=True)
    matrices = similarity_transform(leaf, torch.tensor(target))
    expected = np.stack([geometry.similarity(face, target) for face in faces])
    np.testing.assert_allclose(matrices.detach(), expected, atol=1e-9)

    rng = np.random.default_rng(1)
    weights, direction = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 5, 2))
    (matrices * torch.tensor(weights)).sum().backward()

    def value(at):
        return sum((geometry.similarity(face, target) * w).sum() for face, w in zip(at["faces"], weights, strict=True))

    assert (leaf.grad.numpy() * direction).sum() == pytest.approx(
        slope(value, {"faces": faces}, {"faces": direction}), rel=1e-6
    )


def test_theta():
    for face in draw_faces(4):
        matrix = geometry.similarity(face, 112 * geometry.TEMPLATE)
        found = theta_from_similarity(torch.tensor(matrix), (300, 200), 112)
        np.testing.assert_allclose(found, geometry.sampling_matrix(matrix, 300, 200, 112), atol=1e-9)
        np.testing.assert_array_equal(
            theta_from_similarity(torch.tensor(matrix), 300, 80),
            theta_from_similarity(torch.tensor(matrix), (300, 300), 80),
        )


@pytest.mark.parametrize("size", [112, 160])
def test_estimate_alignment(size):
    for face in draw_faces(4):
        expected = geometry.similarity(face, size * geometry.TEMPLATE)
        np.testing.assert_allclose(estimate_alignment(face, size), expected, atol=1e-4)


def smooth_picture(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 waves, different in each channel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + y / 23), np.cos(x / 29 - y / 19), np.sin(x / 31) * np.cos(y / 13)]
    return (127.5 + 120 * np.stack(waves, -1)).round().astype(np.uint8)


def test_align_face_reads_every_pixel_where_the_matrix_says():
    size = 56
    picture, landmarks = smooth_picture(90, 120), 90 * geometry.TEMPLATE + [25, -15]  # the forehead is cut off
    crop, keypoints = align_face(picture, landmarks, size)
    matrix = geometry.similarity(landmarks, size * geometry.TEMPLATE)
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    channels = np.float64(picture).transpose(2, 0, 1)
    expected = np.empty((size, size, 3))
    for row, column in np.ndindex(size, size):
        expected[row, column] = geometry.read(channels, *(back @ [column, row, 1]), outside=0.0)
    assert (expected[0] == 0).all() and (expected > 0).mean() > 0.7
    # OpenCV's places are good to 1/32 of a pixel, which counts where the image ends.
    assert np.abs(crop - expected).mean() < 0.5 and np.quantile(np.abs(crop - expected), 0.98) < 3
    moved = (landmarks @ matrix[:, :2].T + matrix[:, 2]) / size
    np.testing.assert_allclose(keypoints, moved, atol=1e-5)


@pytest.mark.parametrize("scale", [0.15, 0.5, 0.69, 0.9, 1.6])
def test_warp_smoothly_leaves_a_ramp_a_ramp(scale):
    """Averaging must not move the image, not even by half a pixel."""
    height, width, size = 200, 300, 40
    y, x = np.mgrid[:height, :width]
    picture = np.repeat((20 + 0.5 * x + 0.25 * y)[..., None], 3, axis=2).round().astype(np.uint8)
    turn = scale * np.array([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    matrix = np.column_stack([turn, np.array([size / 2, size / 2]) - turn @ [150, 100]])
    crop = warp_smoothly(picture, matrix, size)
    inside = np.zeros((size, size), dtype=bool)
    expected = np.empty((size, size))
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    for row, column in np.ndindex(size, size):
        x, y = back @ [column, row, 1]
        inside[row, column] = 10 < x < width - 10 and 10 < y < height - 10
        expected[row, column] = 20 + 0.5 * x + 0.25 * y
    assert inside.mean() > 0.25
    assert abs((crop[..., 0] - expected)[inside].mean()) < 0.2 and np.abs(crop[..., 1] - expected)[inside].max() < 1.5


def test_warp_smoothly_averages_what_is_too_fine_for_the_crop():
    checks = np.repeat((255 * (np.indices((320, 320)).sum(0) % 2))[..., None], 3, axis=2).astype(np.uint8)
    crop = warp_smoothly(checks, np.array([[0.25, 0, 0], [0, 0.25, 0]]), 80)
    assert np.abs(crop[2:-2, 2:-2].astype(float) - 127.5).max() < 2


@pytest.mark.parametrize(("height", "width", "ratio"), [(30, 47, 0.0), (52, 31, 0.215), (40, 40, 0.1), (40, 40, 0.0)])
def test_fit_to_square_and_back(height, width, ratio):
    rng = np.random.default_rng(0)
    image, points = rng.uniform(-1, 1, (3, height, width)), rng.uniform(size=(5, 2))
    found = fit_to_square(torch.tensor(image)[None], 40, ratio)[0]
    np.testing.assert_allclose(found, geometry.fit_to_square(image, 40, ratio), atol=1e-9)
    back = square_to_crop(torch.tensor(points), width, height, ratio)
    np.testing.assert_allclose(back, geometry.from_square(points, width, height, ratio), atol=1e-12)


def test_align():
    rng = np.random.default_rng(0)
    image, keypoints = rng.uniform(-1, 1, (3, 40, 55)), geometry.TEMPLATE + 0.05 * rng.normal(size=(5, 2))
    aligned, moved, theta = align(torch.tensor(image)[None], torch.tensor(keypoints)[None], size=24)
    points = keypoints * [55, 40]
    matrix = geometry.similarity(points, 24 * geometry.TEMPLATE)
    expected = geometry.sampling_matrix(matrix, 55, 40, 24)
    np.testing.assert_allclose(theta[0], expected, atol=1e-6)
    np.testing.assert_allclose(aligned[0], geometry.warp(image, expected, 24), atol=1e-4)
    np.testing.assert_allclose(moved[0], (points @ matrix[:, :2].T + matrix[:, 2]) / 24, atol=1e-6)


def test_plain_forms_are_the_reference_ones(golden):
    """The forms themselves against the authors' implementation, where its vectors are available."""
    file, aligned = golden("dfa_preprocess.npz"), golden("dfa_align.npz")
    image = np.float64(file["image"][0])
    found = geometry.fit_to_square(image, 160, float(file["padding_ratio"]))
    np.testing.assert_allclose(found, file["out"][0], atol=1e-3)
    landmarks = np.float64(aligned["landmarks"][0]) * 160
    matrix = geometry.similarity(landmarks, 112 * geometry.TEMPLATE)
    np.testing.assert_allclose(matrix, aligned["similarity"][0], atol=1e-4)
    np.testing.assert_allclose(geometry.sampling_matrix(matrix, 160, 160, 112), aligned["theta"][0], atol=1e-5)
