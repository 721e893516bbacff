"""The convolutional backbones against their plain forms, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import insightface_kprpe as ik

from . import iresnet

LAYERS, WIDTHS = (2, 1, 3, 2), (2, 3, 3, 4)  # two stages of one width: a shortcut that is only thinned out
IRESNET = {"layers": LAYERS, "widths": WIDTHS, "num_features": 6}


def build(name: str, **settings) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """A network with random weights at which every constant counts, and the same weights for the plain form."""
    rng = np.random.default_rng(0)
    net = ik.get_model(name, **settings).double().eval()
    state = {}
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith("running_var"):
            state[key] = rng.uniform(1e-5, 1.0, value.shape)
        elif value.ndim > 1:
            state[key] = rng.normal(0, (1 / value[0].numel()) ** 0.5, value.shape)
        else:
            state[key] = rng.normal(0.4 if key.endswith("weight") else 0, 0.2, value.shape)
    ik.load_weights(net, {key: torch.tensor(value) for key, value in state.items()})
    return net, state


def embed(net: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return net.forward_head(net.forward_features(torch.tensor(images))).numpy()


IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 3, 112, 112))


def test_arcface_torchs_iresnet():
    net, state = build("r18", **IRESNET)
    np.testing.assert_allclose(embed(net, IMAGES), iresnet.iresnet(state, IMAGES, LAYERS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ir_50", "cvlface_ir50"])
def test_adafaces_and_cvlfaces_iresnet(name):
    net, state = build(name, **IRESNET)
    seen = IMAGES[:, ::-1] if name == "ir_50" else IMAGES  # AdaFace's weights are for BGR
    np.testing.assert_allclose(embed(net, IMAGES), iresnet.irnet(state, seen, LAYERS), rtol=1e-9, atol=1e-9)


def test_mobile_face_net():
    net, state = build("mbf", blocks=(1, 2, 1), scale=1, num_features=6)
    np.testing.assert_allclose(embed(net, IMAGES), iresnet.mobile_face_net(state, IMAGES), rtol=1e-9, atol=1e-9)
