import numpy as np
import pytest
import torch

from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, similarity_transform, theta_from_similarity, to_five_points


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


@pytest.mark.parametrize("as_tensor", [False, True])
def test_to_five_points(as_tensor):
    def points(count):
        values = np.arange(2 * 3 * count, dtype=np.float32).reshape(3, count, 2)
        return torch.tensor(values) if as_tensor else values

    of68, of98 = to_five_points(points(68)), to_five_points(points(98))
    assert isinstance(of68, torch.Tensor if as_tensor else np.ndarray) and of68.shape == of98.shape == (3, 5, 2)
    np.testing.assert_allclose(
        of68[:, :2], [[face[36:42].mean(0), face[42:48].mean(0)] for face in np.asarray(points(68))]
    )
    np.testing.assert_array_equal(of68[:, 2:], points(68)[:, [30, 48, 54]])
    np.testing.assert_array_equal(of98, points(98)[:, [96, 97, 57, 76, 82]])
    np.testing.assert_array_equal(to_five_points(points(5)), points(5))


def test_to_five_points_refuses_other_schemes():
    with pytest.raises(ValueError, match="P = 5, 68 or 98, got shape"):
        to_five_points(np.zeros((106, 2)))
