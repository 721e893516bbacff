"""Attention over lines against attention with biases written out: the same numbers and gradients."""

import copy

import pytest
import torch
from distributed import run_on_ranks
from torch.nn.parallel import DistributedDataParallel

import insightface_kprpe as ik
from insightface_kprpe.backbones import offset_attention
from insightface_kprpe.backbones.offset_attention import OffsetAttention, line_index
from insightface_kprpe.backbones.relative_position import bucket_index


def build(**settings):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_features": 16, "patch_size": 16}
    net = ik.VisionTransformer(position="kprpe", **{**sizes, **settings})
    torch.nn.init.normal_(net.keypoint_linear.weight, std=0.5)
    torch.nn.init.normal_(net.keypoint_linear.bias, std=0.5)
    return net


@pytest.fixture(autouse=True)
def few_patches_are_enough(monkeypatch):
    monkeypatch.setattr(offset_attention, "_FEW", -1)


@pytest.fixture
def faces():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 112, 112, generator=generator) * 2 - 1, torch.rand(5, 5, 2, generator=generator)


def run(net, faces, written_out):
    """Embeddings and all gradients, of the keypoints too."""
    images, keypoints = faces[0], faces[1].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        if written_out:
            patch.setattr(OffsetAttention, "can_run", staticmethod(lambda tokens: False))
        torch.manual_seed(0)
        embeddings = net(images, keypoints)
        torch.manual_seed(1)
        (embeddings * torch.randn_like(embeddings)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return embeddings.detach(), {**gradients, "keypoints": keypoints.grad}


def assert_equal_ways(net, faces):
    other = copy.deepcopy(net)
    embeddings, gradients = run(net, faces, written_out=False)
    expected, expected_gradients = run(other, faces, written_out=True)
    torch.testing.assert_close(embeddings, expected, atol=2e-5, rtol=1e-4)
    for name, gradient in expected_gradients.items():
        error = (gradients[name] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max() + 1e-5, name


@pytest.mark.parametrize("sharing", ["none", "layers", "heads", "both"])
@pytest.mark.parametrize("training", [False, True])
def test_equal_to_biases_written_out(faces, sharing, training):
    assert_equal_ways(build(kprpe_sharing=sharing).train(training), faces)


@pytest.mark.parametrize(
    "settings", [{"mask_ratio": 0.4}, {"drop_path_rate": 0.3}, {"num_heads": 1, "num_keypoints": 3}]
)
def test_equal_with_masked_patches_and_dropped_paths(faces, settings):
    assert_equal_ways(build(**settings).train(), faces)


def test_equal_image_by_image(faces, monkeypatch):
    monkeypatch.setattr(offset_attention, "_CHUNK", 1)
    assert_equal_ways(build(), faces)
    monkeypatch.setattr(offset_attention, "_CHUNK", 2 * 2 * 49**2)  # two, two and one
    assert_equal_ways(build(mask_ratio=0.2).train(), faces)


def test_equal_with_gradient_checkpointing(faces):
    net = build(mask_ratio=0.4).train()
    net.set_grad_checkpointing()
    assert_equal_ways(net, faces)


@pytest.mark.parametrize("sharing", ["none", "heads"])
def test_equal_without_gradients(faces, sharing, monkeypatch):
    monkeypatch.setattr(offset_attention, "_CHUNK", 2 * 2 * 49**2)
    net = build(kprpe_sharing=sharing).eval()
    expected, _ = run(net, faces, written_out=True)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(net(*faces), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_no_image_at_all(training):
    net = build().eval()
    with torch.set_grad_enabled(training):
        assert net(torch.zeros(0, 3, 112, 112), torch.zeros(0, 5, 2)).shape == (0, 16)


def test_frozen_tables_and_frozen_tokens(faces):
    """Gradients are right where only some of the inputs ask for them."""
    net = build()
    _, expected = run(copy.deepcopy(net), faces, written_out=True)
    net.blocks.requires_grad_(False)
    net.keypoint_linear.requires_grad_(False)
    _, gradients = run(net, faces, written_out=False)
    assert gradients["keypoint_linear.weight"] is None
    torch.testing.assert_close(gradients["keypoints"], expected["keypoints"], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(gradients["pos_embed"], expected["pos_embed"], atol=1e-4, rtol=1e-3)


def test_only_where_numbers_are_float32_on_a_cpu():
    tokens = torch.zeros(1, 4, 8)
    assert OffsetAttention.can_run(tokens)
    assert not OffsetAttention.can_run(tokens.bfloat16()) and not OffsetAttention.can_run(tokens.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not OffsetAttention.can_run(tokens)


def test_only_where_there_are_many_patches(monkeypatch):
    monkeypatch.undo()
    assert not OffsetAttention.can_run(torch.zeros(1, 64, 8)) and OffsetAttention.can_run(torch.zeros(8, 64, 8))


@pytest.mark.parametrize("side", [2, 8, 14])
def test_lines_hold_every_bucket(side):
    """The keys of a query in row y are the side * side numbers from (side - 1 - y) * side on."""
    bucket, index = bucket_index(side), line_index(bucket_index(side))
    assert index.shape == (side, (2 * side - 1) * side)
    for query, row in enumerate(bucket):
        y, x = divmod(query, side)
        assert torch.equal(index[x, (side - 1 - y) * side :][: side * side], row)


def _gradients_of_one_rank(rank, images, keypoints):
    offset_attention._FEW = -1
    net = build().eval()  # in training the head's BatchNorm sees a rank's own images only
    net.keypoint_linear.attention_bias = None  # no other way than over lines
    part = slice(2 * rank, 2 * rank + 2)
    parallel = DistributedDataParallel(net)
    parallel(images[part], keypoints[part]).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def test_two_processes_have_the_gradients_of_one(faces):
    images, keypoints = faces[0][:4], faces[1][:4]
    net = build().eval()
    net(images, keypoints).square().sum().backward()
    for gradients in run_on_ranks(_gradients_of_one_rank, 2, images, keypoints):
        for name, parameter in net.named_parameters():
            expected = parameter.grad / 2  # ranks are averaged
            assert (gradients[name] - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-7, name
