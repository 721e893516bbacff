import numpy as np
import pytest
import torch

from insightface_kprpe.backbones import VisionTransformer
from insightface_kprpe.data.landmark_csv import write_landmark_csv
from insightface_kprpe.data.synthetic import verification_pairs
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.evaluation.embedding import TorchEmbedder, embed_images
from insightface_kprpe.evaluation.verification import open_verification, verify
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, mirror_keypoints
from insightface_kprpe.quickstart import _jpeg


@pytest.fixture
def net():
    torch.manual_seed(0)
    return VisionTransformer(
        embed_dim=32, depth=1, num_heads=2, mlp_ratio=2, num_features=8, patch_size=28, position="kprpe", mask_ratio=0.5
    )


@pytest.fixture
def crops():
    return np.random.default_rng(0).integers(0, 255, (7, 112, 112, 3), dtype=np.uint8)


def test_batches_and_flip_add_up(net, crops):
    keypoints = np.random.default_rng(1).random((7, 5, 2)).astype(np.float32)
    embed = TorchEmbedder(net.train())
    got = embed_images(embed, crops, keypoints, batch_size=3)
    images = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    points = torch.from_numpy(keypoints)
    with torch.no_grad():
        expected = net.eval()(images, points) + net(images.flip(-1), mirror_keypoints(points))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    assert embed_images(embed, crops, keypoints, flip=False).shape == (7, 8)


def test_the_network_is_left_in_its_mode(net, crops):
    TorchEmbedder(net.train())(torch.zeros(1, 3, 112, 112), torch.zeros(1, 5, 2))
    assert net.training
    with pytest.raises(ValueError, match=r"keypoints must be \(7, 5, 2\)"):
        embed_images(TorchEmbedder(net), crops, np.zeros((3, 5, 2)))


@pytest.fixture
def bin_set(tmp_path):
    images, is_same, keypoints = verification_pairs(5, 20, aligned=False)
    write_verification_bin(tmp_path / "drawn.bin", [_jpeg(image) for image in images], is_same)
    return tmp_path, images, is_same, keypoints


def test_bin_sets_with_and_without_landmarks(bin_set, net):
    folder, images, is_same, keypoints = bin_set
    pairs = open_verification("drawn", folder)
    assert pairs.name == "drawn" and (pairs.is_same == is_same).all()
    assert np.abs(pairs.images[3].astype(int) - images[3]).mean() < 5
    np.testing.assert_allclose(pairs.keypoints[4], CANONICAL_KEYPOINTS)
    write_landmark_csv(folder / "drawn_ldmk_5points.csv", keypoints)
    pairs = open_verification(str(folder / "drawn.bin"))
    np.testing.assert_allclose(pairs.keypoints, keypoints, atol=1e-4)
    result = verify(TorchEmbedder(net), pairs)
    assert 0 <= result.accuracy <= 100 and len(result.fold_accuracies) == 10


def test_a_perfect_embedder_reaches_100_percent(bin_set):
    """Embeddings that say who is who: the pairs alternate same, different."""
    folder, *_ = bin_set
    pairs = open_verification("drawn", folder)
    number = iter(range(1000))

    def embed(images, keypoints):
        rows = []
        for _ in range(len(images)):
            i = next(number)
            rows.append(np.eye(80)[i if (i // 2) % 2 else i - i % 2])
        return torch.tensor(np.array(rows))

    assert verify(embed, pairs, flip=False).accuracy == 100


def test_unknown_sets_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no .*lfw\.bin"):
        open_verification("lfw", tmp_path)
    assert open_verification("synthetic_unaligned").keypoints.shape == (1200, 5, 2)
