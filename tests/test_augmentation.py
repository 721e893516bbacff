import pytest
import torch
from torch.utils.data import DataLoader

from insightface_kprpe.data.augmentation import (
    PAPER,
    build_augmentation,
    move_keypoints,
    random_mirror,
    random_similarity,
    warp_images,
)
from insightface_kprpe.data.face_dataset import open_faces
from insightface_kprpe.data.sampler import EpochSampler

SIZE = 112


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_keypoints(count, seed=0):
    """Five points about where a face has them, different in every image, at least 12 pixels apart."""
    places = torch.tensor([[0.36, 0.42], [0.64, 0.42], [0.5, 0.56], [0.38, 0.7], [0.62, 0.7]])
    return places + (torch.rand(count, 5, 2, generator=generator(seed)) - 0.5) * 0.04


def draw_dots(keypoints):
    """(B, 3, 112, 112) uint8: a bright dot on gray at every keypoint."""
    axis = (torch.arange(SIZE) + 0.5) / SIZE
    x, y = keypoints[..., 0, None, None], keypoints[..., 1, None, None]
    distance = (axis - x) ** 2 + (axis[:, None] - y) ** 2
    dots = torch.exp(-distance / (2 * (1.5 / SIZE) ** 2)).amax(1)  # (B, 112, 112)
    return (110 + 140 * dots).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()


def find_dots(images, keypoints, reach=6):
    """Distance in pixels of each dot from where its keypoint says; NaN where it is cut off or erased."""
    errors = torch.full(keypoints.shape[:2], torch.nan)
    for i, (image, points) in enumerate(zip(images.mean(1), keypoints * SIZE, strict=True)):
        for j, (x, y) in enumerate(points.tolist()):
            left, top = round(x) - reach, round(y) - reach
            window = image[max(top, 0) : top + 2 * reach, max(left, 0) : left + 2 * reach]
            if window.shape != (2 * reach, 2 * reach) or window.amin() < -0.99:  # black
                continue
            weight = (window - window.median()).clamp_min(0)
            axis = torch.arange(2 * reach) + 0.5
            found = torch.stack([(weight.sum(0) * axis).sum(), (weight.sum(1) * axis).sum()]) / weight.sum()
            errors[i, j] = (found - torch.tensor([x - left, y - top])).norm()
    return errors


SINGLE = {
    "mirror": {},
    "rotation": {"rotation": 20.0},
    "scale": {"scale": 0.2},
    "translation": {"translation": 0.1},
    "color": {"color_operations": 2},
    "degrade": {"degrade_probability": 1.0},
    "erase": {"erase_probability": 1.0},
    "paper": "paper",
    "paper, always": {**PAPER, "rotation_probability": 1.0, "degrade_probability": 1.0, "erase_probability": 1.0},
}


@pytest.mark.parametrize("augment", SINGLE.values(), ids=SINGLE)
def test_the_dots_are_where_the_keypoints_say(augment):
    keypoints = some_keypoints(48)
    images, moved = build_augmentation(augment)(draw_dots(keypoints), keypoints, generator(1))
    assert images.dtype == torch.float32 and images.shape == (48, 3, SIZE, SIZE)
    assert images.amin() >= -1 and images.amax() <= 1
    errors = find_dots(images, moved)
    assert errors.isfinite().float().mean() > 0.4  # half of the erased images keep little
    assert errors[errors.isfinite()].mean() < 0.5


def test_a_wrong_matrix_would_be_noticed():
    keypoints = some_keypoints(16)
    images, moved = build_augmentation("paper")(draw_dots(keypoints), keypoints, generator(1))
    errors = find_dots(images, moved + 1.5 / SIZE)
    assert errors[errors.isfinite()].mean() > 1


def test_mirroring_swaps_left_and_right():
    images = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator())
    keypoints = some_keypoints(64)
    mirrored, moved = random_mirror(images, keypoints, generator())
    chosen = (moved != keypoints).flatten(1).any(1)
    assert 20 < chosen.sum() < 44
    assert torch.equal(mirrored[chosen], images[chosen].flip(-1))
    assert torch.equal(mirrored[~chosen], images[~chosen])
    expected = keypoints[chosen][:, [1, 0, 2, 4, 3]] * torch.tensor([-1, 1]) + torch.tensor([1, 0])
    torch.testing.assert_close(moved[chosen], expected)


def test_only_the_chosen_share_moves_and_only_a_part_of_it_turns():
    images, keypoints = torch.rand(400, 3, 8, 8), torch.rand(400, 5, 2)
    arguments = {"rotation": 20.0, "scale": 0.2, "translation": 0.1, "probability": 0.3}
    moved = images.clone()
    points = random_similarity(moved, keypoints, generator(2), **arguments)
    changed = (points != keypoints).flatten(1).any(1)
    assert 90 < changed.sum() < 150
    assert torch.equal((moved != images).flatten(1).any(1), changed)
    assert random_similarity(moved, keypoints, generator(2), 20.0, 0.2, 0.1, probability=0.0) is keypoints
    arguments |= {"probability": 1.0, "rotation_probability": 0.2}
    points = random_similarity(images, keypoints, generator(2), **arguments)
    edge = lambda points: points[:, 1] - points[:, 0]  # noqa: E731
    before, after = edge(keypoints), edge(points)
    cross = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
    turned = (cross / before.norm(dim=-1) / after.norm(dim=-1)).abs() > 1e-4
    assert 55 < turned.sum() < 105
    assert cosine.amin() > 0.9396  # cos 20 degrees is 0.9397
    zoom = after.norm(dim=-1) / before.norm(dim=-1)
    assert 0.799 < zoom.amin() < 0.82 and 1.18 < zoom.amax() < 1.201


def test_warp_is_the_identity_for_the_identity_and_black_outside():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    identity = torch.eye(2, 3).expand(2, 2, 3)
    torch.testing.assert_close(warp_images(images, identity), images, atol=1e-5, rtol=0)
    away = identity + torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    assert (warp_images(images, away) == -1).all()
    assert (warp_images(images, away, black=0) == 0).all()
    torch.testing.assert_close(move_keypoints(torch.zeros(2, 5, 2), away)[..., 0], torch.full((2, 5), 2.0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_the_same_seed_gives_the_same_batches_on_any_number_of_workers():
    dataset, augment = open_faces("synthetic", 4, 32), build_augmentation("paper")

    def batches(workers):
        loader = DataLoader(dataset, batch_sampler=EpochSampler(32, 8), num_workers=workers)
        return [augment(batch[0], batch[2], generator(step)) for step, batch in enumerate(loader)]

    alone = batches(0)
    for other in (batches(1), batches(4)):
        for (images, keypoints), (same, points) in zip(alone, other, strict=True):
            assert torch.equal(images, same) and torch.equal(keypoints, points)
    first = next(iter(DataLoader(dataset, batch_sampler=EpochSampler(32, 8))))
    assert not torch.equal(alone[0][0], augment(first[0], first[2], generator(9))[0])


def test_without_arguments_only_mirroring():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    plain, _ = build_augmentation({})(images, torch.rand(8, 5, 2), generator())
    straight = images.float() / 127.5 - 1
    same = (plain - straight).flatten(1).abs().amax(1) < 1e-6
    flipped = (plain - straight.flip(-1)).flatten(1).abs().amax(1) < 1e-6
    assert (same | flipped).all() and same.any() and flipped.any()
    assert images.dtype == torch.uint8


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("strong", '"paper"'),
        ({"rotate": 3.0}, "rotation, .*got rotate"),
        ({"erase_probability": 1.5}, "erase_probability must be a probability"),
        ({"scale": 1.0}, r"scale must be in \[0, 1\)"),
        ({"color_magnitude": (3, 31)}, "0 to 30"),
    ],
)
def test_mistakes_are_named(augment, message):
    with pytest.raises(ValueError, match=message):
        build_augmentation(augment)
