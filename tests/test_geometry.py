import numpy as np
import pytest
import torch

from insightface_kprpe.geometry import (
    ARCFACE_TEMPLATE_112,
    CANONICAL_KEYPOINTS,
    align_face,
    estimate_alignment,
    mirror_keypoints,
    similarity_transform,
    transform_points,
)


def test_similarity_transform_recovers_a_known_similarity():
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(4, 5, 2, generator=generator, dtype=torch.float64) * 100
    angle, scale = torch.tensor(0.4), 1.7
    rotation = scale * torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
    target = source @ rotation.T + torch.tensor([3.0, -8.0])
    matrix = similarity_transform(source, target)
    assert matrix.shape == (4, 2, 3)
    torch.testing.assert_close(matrix[..., :2], rotation.expand(4, 2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix[..., 2], torch.tensor([3.0, -8.0], dtype=torch.float64).expand(4, 2))


def test_similarity_transform_is_the_least_squares_one_of_scikit_image():
    from skimage.transform import SimilarityTransform

    rng = np.random.default_rng(0)
    for _ in range(5):
        landmarks = ARCFACE_TEMPLATE_112 * 2 + rng.normal(0, 6, (5, 2))
        expected = SimilarityTransform()
        expected.estimate(landmarks, ARCFACE_TEMPLATE_112)
        np.testing.assert_allclose(estimate_alignment(landmarks), expected.params[:2], atol=1e-5)


def test_similarity_transform_has_gradients_and_survives_equal_points():
    source = torch.rand(2, 5, 2, dtype=torch.float64, requires_grad=True)
    target = torch.rand(5, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda s: similarity_transform(s, target), source)
    assert similarity_transform(torch.full((1, 5, 2), 3.0), target.float()).isfinite().all()


def test_align_face_brings_landmarks_to_the_template():
    image = np.zeros((200, 300, 3), dtype=np.uint8)
    landmarks = ARCFACE_TEMPLATE_112 * 1.4 + (60, 20)
    for x, y in landmarks.round().astype(int):
        image[y - 2 : y + 3, x - 2 : x + 3] = 255
    crop, keypoints = align_face(image, landmarks)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    np.testing.assert_allclose(keypoints, CANONICAL_KEYPOINTS, atol=1e-5)
    for x, y in ARCFACE_TEMPLATE_112.round().astype(int):
        assert crop[y, x].min() > 150


@pytest.mark.parametrize("landmarks", [np.zeros((4, 2)), np.full((5, 2), np.nan)])
def test_align_face_refuses_bad_landmarks(landmarks):
    with pytest.raises(ValueError, match="landmarks_px must be"):
        align_face(np.zeros((10, 10, 3), np.uint8), landmarks)


def test_mirror_swaps_left_and_right_and_is_its_own_inverse():
    points = torch.rand(3, 5, 2)
    mirrored = mirror_keypoints(points)
    torch.testing.assert_close(mirrored[:, 0, 0], 1 - points[:, 1, 0])
    torch.testing.assert_close(mirrored[:, 3, 1], points[:, 4, 1])
    torch.testing.assert_close(mirror_keypoints(mirrored), points)
    assert mirror_keypoints(CANONICAL_KEYPOINTS)[0, 0] < 0.5  # the left eye is still the left one


def test_transform_points():
    matrix = np.array([[0.0, -1.0, 5.0], [1.0, 0.0, 2.0]])
    np.testing.assert_allclose(transform_points(np.array([[1.0, 2.0]]), matrix), [[3.0, 3.0]])
