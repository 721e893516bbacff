import torch

from insightface_kprpe.data.augmentation import move_keypoints, random_mirror, random_similarity, warp_images


def dots(keypoints, size=112):
    """Images (B, 1, S, S) per keypoint with a soft dot where it is."""
    axis = (torch.arange(size) + 0.5) / size
    x, y = axis[None, :], axis[:, None]
    distance = (x - keypoints[..., 0, None, None]) ** 2 + (y - keypoints[..., 1, None, None]) ** 2
    return torch.exp(-distance / (2 * (2 / size) ** 2)) * 2 - 1  # (B, K, S, S)


def find(images):
    """Centres of the dots, (B, K, 2) in [0, 1]."""
    weight = images + 1
    axis = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    total = weight.sum((-2, -1))
    return torch.stack([(weight.sum(-2) * axis).sum(-1), (weight.sum(-1) * axis).sum(-1)], -1) / total[..., None]


def test_mirror_moves_image_and_keypoints_together():
    images = torch.zeros(64, 3, 112, 112, dtype=torch.uint8)
    keypoints = torch.rand(64, 5, 2)
    for face, points in zip(images, keypoints, strict=True):
        x, y = (points[0] * 111).round().long()
        face[:, y, x] = 255
    mirrored, moved = random_mirror(images, keypoints, torch.Generator().manual_seed(0))
    changed = (mirrored != images).flatten(1).any(1)
    assert 10 < changed.sum() < 54
    for i in range(64):
        x, y = (moved[i, 1 if changed[i] else 0] * 111).round().long()
        assert mirrored[i, 0, y, x] == 255
    again, _ = random_mirror(images, keypoints, torch.Generator().manual_seed(0))
    assert torch.equal(mirrored, again)


def test_dots_are_where_the_keypoints_say_after_turning_scaling_and_shifting():
    keypoints = 0.5 + (torch.rand(16, 5, 2, generator=torch.Generator().manual_seed(0)) - 0.5) * 0.4
    images, moved = random_similarity(
        dots(keypoints), keypoints, torch.Generator().manual_seed(1), 20.0, 0.2, 0.1, probability=1.0
    )
    assert (moved - keypoints).abs().max() > 0.1
    assert (find(images) - moved).norm(dim=-1).mean() * 112 < 0.5  # pixels


def test_only_the_chosen_share_moves_and_the_same_generator_chooses_the_same():
    images, keypoints = torch.rand(200, 3, 8, 8), torch.rand(200, 5, 2)
    arguments = {"rotation": 20.0, "scale": 0.2, "translation": 0.1, "probability": 0.3}
    first, points = random_similarity(images, keypoints, torch.Generator().manual_seed(2), **arguments)
    again, _ = random_similarity(images, keypoints, torch.Generator().manual_seed(2), **arguments)
    assert torch.equal(first, again)
    changed = (points != keypoints).flatten(1).any(1)
    assert 30 < changed.sum() < 90
    assert torch.equal(first[~changed], images[~changed])
    none, _ = random_similarity(images, keypoints, torch.Generator().manual_seed(2), 20.0, 0.2, 0.1, probability=0.0)
    assert torch.equal(none, images)


def test_warp_is_the_identity_for_the_identity_and_black_outside():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    identity = torch.eye(2, 3).expand(2, 2, 3)
    torch.testing.assert_close(warp_images(images, identity), images, atol=1e-5, rtol=0)
    away = identity + torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert (warp_images(images, away) == -1).all()
    torch.testing.assert_close(move_keypoints(torch.zeros(2, 5, 2), away)[..., 0], torch.full((2, 5), 2.0))
