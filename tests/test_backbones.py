import numpy as np
import pytest
import timm
import torch

import insightface_kprpe as ik
from insightface_kprpe.backbones.relative_position import KeypointRelativePosition, bucket_index, patch_centers

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_features": 16, "patch_size": 28}


def tiny(position="kprpe", **kwargs):
    torch.manual_seed(0)
    net = ik.VisionTransformer(position=position, **{**TINY, **kwargs})
    for name, parameter in net.named_parameters():  # tables start at zero: give them something to say
        if "keypoint_linear" in name or "lookup_table" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return net.eval()


@pytest.fixture
def faces():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 112, 112, generator=generator) * 2 - 1, torch.rand(3, 5, 2, generator=generator)


def load_golden(golden, name, **kwargs):
    """Network with a golden file's weights, built from nothing but the shapes in the file."""
    file = golden(name)
    state = {key[len("state.") :]: torch.from_numpy(value) for key, value in file.items() if key.startswith("state.")}
    width = state["pos_embed"].shape[-1]
    net = ik.VisionTransformer(
        embed_dim=width,
        mlp_ratio=state["blocks.0.mlp.fc1.bias"].shape[0] / width,
        num_features=state["feature.2.weight"].shape[0],
        **kwargs,
    )
    ik.load_weights(net, state)
    return net.eval(), torch.from_numpy(file["embedding"])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit.npz", {"depth": 2, "num_heads": 4}),
        ("vit_irpe.npz", {"depth": 2, "num_heads": 4, "position": "irpe"}),
        ("kprpe_vit.npz", {"depth": 2, "num_heads": 4, "position": "kprpe"}),
        ("kprpe_vit_2kp.npz", {"depth": 1, "num_heads": 2, "position": "kprpe", "num_keypoints": 2}),
        ("kprpe_vit_3kp.npz", {"depth": 1, "num_heads": 2, "position": "kprpe", "num_keypoints": 3}),
        ("kprpe_vit_4kp.npz", {"depth": 1, "num_heads": 2, "position": "kprpe", "num_keypoints": 4}),
    ],
)
def test_embeddings_equal_the_reference(golden, name, kwargs):
    net, expected = load_golden(golden, name, **kwargs)
    inputs = golden("kprpe_vit.npz")
    images, keypoints = torch.from_numpy(inputs["image"]).float(), torch.from_numpy(inputs["keypoints"])
    with torch.no_grad():
        assert (net(images, keypoints) - expected).abs().max() < 1e-4


def test_gradients_equal_the_reference(golden):
    net, _ = load_golden(golden, "kprpe_vit.npz", depth=2, num_heads=4, position="kprpe")
    inputs, expected = golden("kprpe_vit.npz"), golden("kprpe_vit_grad.npz")
    embeddings = net(torch.from_numpy(inputs["image"]).float(), torch.from_numpy(inputs["keypoints"]))
    loss = embeddings.square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-5)
    for parameter, name in (
        (net.keypoint_linear.weight, "grad_keypoint_linear_weight"),
        (net.keypoint_linear.bias, "grad_keypoint_linear_bias"),
        (net.blocks[0].attn.qkv.weight, "grad_qkv0"),
    ):
        assert np.abs(parameter.grad.numpy() - expected[name]).max() < 1e-4


@pytest.mark.parametrize("grid", [10, 12, 14])
def test_bucket_index_equals_the_reference(golden, grid):
    index = bucket_index(grid)
    assert index.dtype == torch.int64
    assert (index.numpy() == golden(f"buckets_{grid}x{grid}.npz")["bucket"]).all()


def test_bucket_index_is_centered_and_antisymmetric():
    index = bucket_index(8)
    assert (index.diagonal() == 24).all()
    assert (index + index.T == 48).all()
    assert bucket_index(8) is index  # built once


@pytest.mark.parametrize(("sharing", "tables"), [("none", 2 * 4), ("layers", 4), ("heads", 2), ("both", 1)])
def test_sharing_variants_equal_the_formula_written_out(sharing, tables):
    torch.manual_seed(0)
    kprpe = KeypointRelativePosition(4, 5, depth=2, num_heads=4, sharing=sharing)
    assert kprpe.weight.shape == (tables * 49, 10)
    torch.nn.init.normal_(kprpe.weight)
    torch.nn.init.normal_(kprpe.bias)
    keypoints = torch.rand(3, 5, 2)
    offsets = patch_centers(4)[None, :, None] - keypoints[:, None]  # (B, N, K, 2)
    table = torch.nn.functional.linear(offsets.flatten(2), kprpe.weight, kprpe.bias)  # (B, N, tables * R)
    table = table.reshape(3, 16, kprpe.table_depth, kprpe.table_heads, 49)
    for layer in range(2):
        bias = kprpe.attention_bias(kprpe(keypoints), layer, torch.float32)
        own = table[:, :, layer % kprpe.table_depth]  # (B, N, H, R)
        for i, j in ((0, 0), (3, 12), (15, 1), (7, 8)):
            expected = own[:, i, :, bucket_index(4)[i, j]]
            torch.testing.assert_close(bias[:, :, i, j], expected, atol=1e-5, rtol=1e-5)
    assert bias.shape == (3, kprpe.table_heads, 16, 16)


@pytest.mark.parametrize("sharing", ["none", "layers", "heads", "both"])
def test_keypoints_matter_and_reach_the_gradient(faces, sharing):
    net = tiny(kprpe_sharing=sharing)
    images, keypoints = faces
    keypoints.requires_grad_()
    embeddings = net(images, keypoints)
    assert embeddings.shape == (3, 16) and embeddings.dtype == torch.float32
    embeddings.square().sum().backward()
    assert keypoints.grad.abs().sum() > 0
    assert not torch.allclose(embeddings, net(images, keypoints.flip(0)))


def test_zero_initialized_kprpe_is_the_plain_network(faces):
    torch.manual_seed(0)
    plain = ik.VisionTransformer(**TINY).eval()
    kprpe = ik.VisionTransformer(position="kprpe", **TINY).eval()
    kprpe.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(kprpe(*faces), plain(*faces))


@pytest.mark.parametrize("position", [None, "irpe", "kprpe"])
def test_token_masking_gradient_checkpointing_and_drop_path(faces, position):
    net = tiny(position, mask_ratio=0.5, drop_path_rate=0.3).train()
    torch.manual_seed(0)
    expected = net(*faces)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    assert gradients["mask_token"].abs().sum() > 0
    net.zero_grad()
    net.set_grad_checkpointing()
    torch.manual_seed(0)
    torch.testing.assert_close(net(*faces), expected)
    torch.manual_seed(0)
    net(*faces).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("position", ["irpe", "kprpe"])
def test_masked_patches_do_not_disturb_the_positions_of_the_others(faces, position):
    """With all patches kept, in any order, the masked path gives what the plain path gives."""
    net = tiny(position, mask_ratio=0.01).train()
    for module in net.modules():  # batch statistics aside
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    masked = net(*faces)  # int(16 * 0.99) = 15 of 16 patches
    net._draw_kept_patches = lambda tokens: torch.rand(tokens.shape[:2]).argsort(1)
    shuffled = net(*faces)
    torch.testing.assert_close(shuffled, net.eval()(*faces), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(masked, shuffled)


@pytest.mark.parametrize("position", ["irpe", "kprpe"])
def test_bfloat16_autocast(faces, position):
    net = tiny(position)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = net(*faces)
    assert embeddings.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(embeddings, net(*faces)).min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("position", ["irpe", "kprpe"])
def test_compiles_to_the_same_numbers(faces, position):
    net = tiny(position)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*faces), net(*faces), atol=1e-5, rtol=1e-5)


def test_arcface_patches_see_the_top_left_108_pixels(faces):
    net = tiny("kprpe", patch_size=9)
    assert net.pos_embed.shape[1] == 144
    images, keypoints = faces
    changed = images.clone()
    changed[..., 108:] = 0
    torch.testing.assert_close(net(images, keypoints), net(changed, keypoints))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k: None, "got None"),
        (lambda k: k[:2], r"got \(2, 5, 2\)"),
        (lambda k: k.reshape(3, 10), r"reshape\(-1, 5, 2\)"),
        (lambda k: k[:, :4], r"got \(3, 4, 2\)"),
        (lambda k: k * 112, "probably pixels"),
        (lambda k: k * 0 + 4.1, "probably pixels"),
        (lambda k: (k * 112).long(), "int64"),
        (lambda k: k / 0, "not finite"),
    ],
)
def test_bad_keypoints_are_refused_with_advice(faces, change, message):
    images, keypoints = faces
    with pytest.raises(ValueError, match=message):
        tiny()(images, change(keypoints))


def test_fewer_keypoints_use_the_first_of_five(faces):
    images, keypoints = faces
    net = tiny(num_keypoints=3)
    torch.testing.assert_close(net(images, keypoints), net(images, keypoints[:, :3]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"position": "rope"}, "position must be"),
        ({"position": "kprpe", "num_keypoints": 6}, "num_keypoints"),
        ({"position": "kprpe", "kprpe_sharing": "all"}, "kprpe_sharing"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
    ],
)
def test_bad_architectures_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ik.VisionTransformer(**{**TINY, **kwargs})


@pytest.mark.parametrize("name", ik.list_models())
def test_every_registered_model_can_be_built(name):
    with torch.device("meta"):
        net = ik.get_model(name, fp16=False, num_features=256)
    assert net.num_features == 256
    assert ik.get_model("vit_n", num_features=8).feature[2].weight.device.type == "cpu"  # nothing cached on meta


# Patch, width, blocks, heads, ratio of MLPs, stochastic depth, share of hidden patches: arcface_torch's and CVLface's.
PUBLISHED = {
    "vit_t": (9, 256, 12, 8, 4, 0.1, 0.1),
    "vit_t_dp005_mask0": (9, 256, 12, 8, 4, 0.05, 0),
    "vit_s": (9, 512, 12, 8, 4, 0.1, 0.1),
    "vit_s_dp005_mask_0": (9, 512, 12, 8, 4, 0.05, 0),
    "vit_b": (9, 512, 24, 8, 4, 0.1, 0.1),
    "vit_b_dp005_mask_005": (9, 512, 24, 8, 4, 0.05, 0.05),
    "vit_l": (9, 768, 24, 8, 4, 0.05, 0.05),
    "vit_l_dp005_mask_005": (9, 768, 24, 8, 4, 0.05, 0.05),
    "vit_h": (9, 1024, 48, 8, 4, 0.1, 0),
    "cvlface_vit_s": (8, 512, 12, 8, 5, 0, 0),
    "cvlface_vit_b": (8, 512, 24, 16, 3, 0, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name):
    with torch.device("meta"):
        net = ik.get_model(name)
    last, width = net.blocks[-1], net.pos_embed.shape[-1]
    found = (
        net.patch_embed.patch_size[0],
        width,
        len(net.blocks),
        last.attn.num_heads,
        last.mlp.fc1.out_features / width,
        getattr(last.drop_path1, "drop_prob", 0),
        net.mask_ratio,
    )
    assert found == PUBLISHED[name]


def test_the_published_kprpe_network_has_as_many_weights():
    with torch.device("meta"):
        net = ik.get_model("cvlface_vit_b_kprpe")
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(114.9, abs=0.3)


def test_timm_builds_the_same_networks(faces):
    torch.manual_seed(0)
    net = timm.create_model("insightface_vit_n_kprpe", num_features=16, depth=1)
    torch.manual_seed(0)
    ours = ik.get_model("vit_n_kprpe", num_features=16, depth=1)
    assert net.state_dict().keys() == ours.state_dict().keys()
    torch.testing.assert_close(net.eval()(*faces), ours.eval()(*faces), atol=0, rtol=0)
    with pytest.raises(ValueError, match="no bundled weights"):
        timm.create_model("insightface_vit_n_kprpe", pretrained=True)


def test_unknown_name_suggests_a_near_one():
    with pytest.raises(ValueError, match="did you mean vit_s_kprpe"):
        ik.get_model("vit_s_kpre")
    with pytest.raises(ValueError, match="drop_path_rate"):
        ik.get_model("vit_n", dropout=0.4)
    with pytest.raises(ValueError, match="already registered"):
        ik.register_backbone("vit_n", ik.VisionTransformer)


@pytest.mark.parametrize("position", [None, "irpe", "kprpe"])
def test_position_tables_and_tokens_do_not_decay(position):
    net = tiny(position, mask_ratio=0.5)
    names = {name for name, _ in net.named_parameters()}
    tables = {name for name in names if "lookup_table_weight" in name or name.startswith("keypoint_linear.")}
    assert len(tables) == {None: 0, "irpe": 6, "kprpe": 2}[position]
    assert net.position_tables() == tables
    assert net.no_weight_decay() & names == tables | {"pos_embed", "mask_token"}
