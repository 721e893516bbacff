"""The backbones against the plain ViT, iRPE and KPRPE."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import insightface_kprpe as ik
from insightface_kprpe.backbones import offset_attention
from insightface_kprpe.backbones.offset_attention import OffsetAttention
from insightface_kprpe.backbones.relative_position import bucket_index

from . import vit
from .gradients import assert_gradients

HEADS = 2
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": HEADS, "mlp_ratio": 2.0, "num_features": 12, "patch_size": 16}
# Scales at which every constant counts: variances near the norms' eps, hidden units beyond 6, logits of a few units.
SCALES = {
    "patch_embed.proj": 7e-4,
    "pos_embed": 1e-2,
    "mask_token": 1.0,
    "qkv": 0.4,
    "attn.proj": 2e-3,
    "fc1": 0.8,
    "fc2": 1e-3,
    "lookup_table": 1.0,
    "keypoint_linear": 1.0,
    "feature.0": 3e-4,
    "feature.2": 5e-3,
    "running_mean": 1e-3,
}


def build(seed: int = 0, **settings) -> tuple[ik.VisionTransformer, dict[str, np.ndarray]]:
    """A network with random weights, and the same weights for the plain form."""
    rng = np.random.default_rng(seed)
    net = ik.VisionTransformer(**{**SIZES, **settings})
    state = {}
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = rng.normal(size=value.shape)
        scale = next((scale for part, scale in SCALES.items() if part in name), None)
        if name.endswith("running_var"):
            drawn = 1e-4 * rng.uniform(0.5, 1.5, value.shape)
        elif scale is not None:
            drawn = scale * drawn
        else:  # of a norm
            drawn = 0.2 * drawn + name.endswith("weight")
        state[name] = drawn.astype(np.float32).astype(np.float64)
    net.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in state.items()}, strict=False)
    return net.eval(), state


def draw_inputs(count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (count, 3, 112, 112)).astype(np.float32).astype(np.float64)
    return images, rng.uniform(0, 1, (count, 5, 2)).astype(np.float32).astype(np.float64)


def run(net: torch.nn.Module, images: np.ndarray, keypoints: np.ndarray) -> torch.Tensor:
    return net(torch.tensor(images, dtype=torch.float32), torch.tensor(keypoints, dtype=torch.float32))


VARIANTS = {
    "plain": {},
    "irpe": {"position": "irpe"},
    "kprpe": {"position": "kprpe"},
    "kprpe, layers share": {"position": "kprpe", "kprpe_sharing": "layers"},
    "kprpe, heads share": {"position": "kprpe", "kprpe_sharing": "heads"},
    "kprpe, all share": {"position": "kprpe", "kprpe_sharing": "both"},
    "kprpe, 3 keypoints": {"position": "kprpe", "num_keypoints": 3},
    "kprpe, patches of the top left": {"position": "kprpe", "patch_size": 30},
}


def plain_settings(settings: dict) -> dict:
    return {"heads": HEADS, "position": settings.get("position"), "sharing": settings.get("kprpe_sharing", "none")}


@pytest.fixture(params=["over lines", "written out"])
def way(request, monkeypatch):
    """KPRPE has two ways to the same attention."""
    monkeypatch.setattr(offset_attention, "_FEW", -1)
    if request.param == "written out":
        monkeypatch.setattr(OffsetAttention, "can_run", staticmethod(lambda tokens: False))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_embeddings(settings):
    net, state = build(**settings)
    images, keypoints = draw_inputs()
    with torch.no_grad():
        found = run(net, images, keypoints)
    expected = vit.embed(state, images, keypoints, **plain_settings(settings))
    assert expected.std() > 0.5  # nothing has died on the way
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("irpe", "over lines"),
        ("kprpe", "over lines"),
        ("kprpe", "written out"),
        ("kprpe, heads share", "over lines"),
        ("kprpe, layers share", "written out"),
    ],
    indirect=["way"],
)
def test_gradients(name, way):
    """Of a weighted sum of the embeddings, for every weight, the pixels and the keypoints."""
    settings = VARIANTS[name]
    net, state = build(**settings)
    images, keypoints = draw_inputs()
    weights = np.random.default_rng(2).normal(size=(len(images), SIZES["num_features"]))
    inputs = {"images": images} | ({"keypoints": keypoints} if settings.get("position") == "kprpe" else {})

    leaves = {key: torch.tensor(value, dtype=torch.float32, requires_grad=True) for key, value in inputs.items()}
    (net(**leaves) * torch.tensor(weights)).sum().backward()
    gradients = {key: leaf.grad.numpy() for key, leaf in (*leaves.items(), *net.named_parameters())}

    def value(at):
        return (vit.embed(at, at["images"], at.get("keypoints"), **plain_settings(settings)) * weights).sum()

    assert_gradients(value, {**state, **inputs}, gradients, tolerance=1e-3)


@pytest.mark.parametrize("position", [None, "irpe", "kprpe"])
def test_training_with_hidden_patches(position):
    """Batch statistics in the head, and other patches hidden in each image."""
    net, state = build(position=position, mask_ratio=0.3)
    images, keypoints = draw_inputs(4)
    rng = np.random.default_rng(3)
    keep = np.stack([rng.permutation(49)[:34] for _ in images])
    net.train()._draw_kept_patches = lambda tokens: torch.tensor(keep)
    with torch.no_grad():
        found = run(net, images, keypoints)
    expected = vit.embed(state, images, keypoints, heads=HEADS, position=position, keep=keep, training=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)  # divided by the small deviations of four samples


def test_how_many_patches_are_hidden_and_which():
    net, _ = build(mask_ratio=0.25)
    images, keypoints = draw_inputs(2)
    seen = []
    net.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(40):
            run(net.train(), images, keypoints)
        run(net.eval(), images, keypoints)
    *masked, everything = seen
    assert everything.shape[1] == 49 and {tokens.shape[1] for tokens in masked} == {36}  # int(49 * 0.75)
    # Every patch is hidden as often as any other, and not the same ones in both images.
    kept = torch.stack([(everything[:, :, None] == tokens[:, None]).all(-1).any(-1) for tokens in masked])
    share = kept.float().mean(0)
    assert share.min() > 0.4 and share.max() < 1 and not torch.equal(kept[0, 0], kept[0, 1])


def test_stochastic_depth_grows_evenly_from_zero():
    net = ik.VisionTransformer(**{**SIZES, "depth": 4, "drop_path_rate": 0.3})
    for path in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, path), "drop_prob", 0.0) for block in net.blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("n", [1, 2, 7, 8, 16, 20])
def test_bucket_index(n):
    np.testing.assert_array_equal(bucket_index(n), vit.buckets(n))


@pytest.mark.parametrize("n", [10, 12, 14])
def test_plain_buckets_are_the_reference_ones(golden, n):
    np.testing.assert_array_equal(vit.buckets(n), golden(f"buckets_{n}x{n}.npz")["bucket"])


@pytest.mark.parametrize("name", ["vit", "vit_irpe", "kprpe_vit"])
def test_plain_form_gives_the_reference_embeddings(golden, name):
    """The form itself against the authors' implementation, where its vectors are available."""
    file, inputs = golden(f"{name}.npz"), golden("kprpe_vit.npz")
    state = {key.removeprefix("state."): np.float64(value) for key, value in file.items() if key.startswith("state.")}
    position = {"vit": None, "vit_irpe": "irpe", "kprpe_vit": "kprpe"}[name]
    found = vit.embed(state, np.float64(inputs["image"]), inputs["keypoints"], heads=4, position=position)
    np.testing.assert_allclose(found, file["embedding"], atol=1e-5)
