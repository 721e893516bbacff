import itertools

import numpy as np
import pytest
import torch

from insightface_kprpe.geometry import (
    ARCFACE_TEMPLATE_112,
    CANONICAL_KEYPOINTS,
    MIRROR_ORDER,
    distinct_landmarks,
    known_landmarks,
    similarity_transform,
    theta_from_similarity,
)


def test_theta_is_the_reference_one(golden):
    align = golden("dfa_align.npz")
    landmarks = torch.tensor(align["landmarks"], dtype=torch.float64) * 160
    similarity = similarity_transform(landmarks, torch.tensor(ARCFACE_TEMPLATE_112, dtype=torch.float64))
    np.testing.assert_allclose(similarity, align["similarity"], atol=1e-4)
    np.testing.assert_allclose(theta_from_similarity(similarity, 160, 112), align["theta"], atol=1e-6)


def test_theta_maps_the_target_back_to_a_source_that_is_not_square():
    a, b = 0.6, -0.3
    similarity = torch.tensor([[a, -b, 5.0], [b, a, -7.0]], dtype=torch.float64)
    source = torch.rand(9, 2, dtype=torch.float64) * torch.tensor([300.0, 200.0])
    target = source @ similarity[:, :2].T + similarity[:, 2]
    theta = theta_from_similarity(similarity, (300, 200), 112)
    found = (target / 56 - 1) @ theta[:, :2].T + theta[:, 2]
    torch.testing.assert_close((found + 1) / 2 * torch.tensor([300.0, 200.0], dtype=torch.float64), source)


def test_theta_without_a_scale_is_finite():
    assert theta_from_similarity(torch.zeros(2, 3), 160, 112).isfinite().all()


@pytest.mark.parametrize("scale", [1, 112, 4000])
def test_faces_in_any_pose_and_unit_are_known(scale):
    """A drawn head, turned by up to 85 degrees aside and 40 up and down, and rolled."""
    head = np.array([[-0.16, -0.18, 0], [0.16, -0.18, 0], [0, 0, 0.14], [-0.13, 0.185, 0.02], [0.13, 0.185, 0.02]])
    seen = []
    for yaw, pitch, roll in itertools.product((-85, -45, 0, 45, 85), (-40, 0, 40), (0, 90, 180)):
        (sy, sp, sr), (cy, cp, cr) = (function(np.radians([yaw, pitch, roll])) for function in (np.sin, np.cos))
        turned = (
            head
            @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]).T
            @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]]).T
        )
        seen.append(turned[:, :2] @ np.array([[cr, -sr], [sr, cr]]).T)
    assert known_landmarks(scale * (np.stack(seen) + 0.5)).all()


@pytest.mark.parametrize("number", [0, -1, 0.5, 3.7])
@pytest.mark.parametrize("scale", [1, 4000])
def test_points_that_coincide_are_unknown(number, scale):
    points = np.full((5, 2), scale * number) + 1e-4 * np.arange(10).reshape(5, 2)
    assert not known_landmarks(points) and not distinct_landmarks(points)


def test_numbers_that_no_face_has_are_unknown():
    face = CANONICAL_KEYPOINTS
    odd = np.stack(
        [face, face[list(MIRROR_ORDER)], np.where(face > 0.6, np.nan, face), face[:, ::-1], face + [[9, 0]] * 5]
    )
    assert known_landmarks(odd).tolist() == [True, False, False, False, True]
    assert distinct_landmarks(odd).tolist() == [True, True, False, True, True]
    random = np.random.default_rng(0).uniform(-1, 1, (2000, 5, 2))
    assert 0.4 < 1 - known_landmarks(random).mean() < 0.7  # half of what is drawn by chance
