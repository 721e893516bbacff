"""DFA against the plain form: anchors, decoding, the whole network with its aggregator, and the aligner."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from insightface_kprpe.dfa import DFA, RETINAFACE, RetinaFaceNet
from insightface_kprpe.dfa.anchors import decode_boxes, decode_points, make_anchors
from insightface_kprpe.dfa.network import NetworkOutput

from . import dfa, geometry
from .gradients import slope

SIZE = 64  # 168 anchors


def draw_weights(net: torch.nn.Module, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights for a network in double precision, and the same for the plain form."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        drawn = rng.normal(size=value.shape)
        if name.endswith("running_var"):
            drawn = rng.uniform(0.01, 0.03, value.shape)  # as small as where trained networks are quiet
        elif name.endswith(("running_mean", "bias")):
            drawn = 0.1 * drawn
        elif value.ndim == 1:  # of a norm
            drawn = 0.2 + 0.05 * drawn
        else:
            drawn = drawn / np.sqrt(value[0].numel())
        state[name] = drawn
    state["body.stage1.0.0.weight"] /= net.input_scale  # pixels up to 255 are no larger than others then
    net.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
    return state


VARIANTS = {
    "DFA": ({}, {}),
    "without aggregator": ({"aggregator": False}, {"aggregator": False}),
    "RetinaFace": (
        RETINAFACE,
        {"sizes": ((10, 20), (32, 64), (128, 256)), "mean": (104, 117, 123), "std": 1, "slope": 0, "aggregator": False},
    ),
}


@pytest.mark.parametrize(("arguments", "settings"), VARIANTS.values(), ids=VARIANTS)
def test_network(arguments, settings):
    net = RetinaFaceNet(image_size=SIZE, **arguments).double().eval()
    state = draw_weights(net)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 3, SIZE, SIZE))
    with torch.no_grad():
        output = net(torch.tensor(images))
    for i, image in enumerate(images):
        expected = dfa.run(state, image, **settings)
        for name in NetworkOutput._fields:
            np.testing.assert_allclose(getattr(output, name)[i], expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_gradient_through_the_aggregator_to_every_weight():
    """One direction through all weights and pixels at once."""
    net = RetinaFaceNet(image_size=SIZE).double().eval()
    state = draw_weights(net)
    rng = np.random.default_rng(2)
    images = rng.uniform(-1, 1, (1, 3, SIZE, SIZE))
    weights = {"keypoints": rng.normal(size=(5, 2)), "bbox": rng.normal(size=4), "score": rng.normal()}
    leaf = torch.tensor(images, requires_grad=True)
    output = net(leaf)
    sum((getattr(output, name)[0] * torch.tensor(weight)).sum() for name, weight in weights.items()).backward()
    gradients = {"image": leaf.grad[0].numpy()} | {name: p.grad.numpy() for name, p in net.named_parameters()}

    def value(at):
        found = dfa.run(at, at["image"])
        return sum((found[name] * weight).sum() for name, weight in weights.items())

    at = {**state, "image": images[0]}
    directions = {name: np.sqrt(np.mean(at[name] ** 2)) * rng.normal(size=at[name].shape) for name in gradients}
    found = sum((gradients[name] * direction).sum() for name, direction in directions.items())
    assert found == pytest.approx(slope(value, at, directions), rel=1e-4)


@pytest.mark.parametrize("image_size", [160, 100, 64])
def test_anchors(image_size):
    np.testing.assert_allclose(make_anchors(image_size), dfa.anchors(image_size), atol=1e-7)
    sizes = ((10, 20), (32, 64), (128, 256))
    np.testing.assert_allclose(make_anchors(image_size, sizes), dfa.anchors(image_size, sizes), atol=1e-7)


def test_dfa_has_the_published_anchors():
    assert len(dfa.anchors(160)) == 1050
    np.testing.assert_allclose(DFA().anchors, dfa.anchors(160), atol=1e-7)


def test_decoding():
    rng = np.random.default_rng(0)
    all_anchors = make_anchors(SIZE).double()
    boxes, points = rng.normal(size=(2, 168, 4)), rng.normal(size=(2, 168, 10))
    found = decode_boxes(torch.tensor(boxes), all_anchors), decode_points(torch.tensor(points), all_anchors)
    for image in range(2):
        for i, anchor in enumerate(all_anchors.numpy()):
            np.testing.assert_allclose(found[0][image, i], dfa.decode_box(boxes[image, i], anchor), atol=1e-12)
            np.testing.assert_allclose(found[1][image, i], dfa.decode_points(points[image, i], anchor), atol=1e-12)


@pytest.mark.parametrize(("height", "width", "ratio"), [(48, 37, 0.0), (30, 52, 0.25), (64, 64, 0.1)])
def test_aligner(height, width, ratio):
    """RGB crops of any shape: black around, blue first, back to the crop, and onto the template."""
    net = DFA(image_size=SIZE, padding_ratio=ratio).double().eval()
    state = draw_weights(net)
    image = np.random.default_rng(3).uniform(-1, 1, (3, height, width))
    with torch.no_grad():
        face = net(torch.tensor(image)[None])
    read = dfa.run(state, geometry.fit_to_square(image, SIZE, ratio)[::-1])
    keypoints = geometry.from_square(read["keypoints"], width, height, ratio)
    box = geometry.from_square(read["bbox"].reshape(2, 2), width, height, ratio).reshape(-1)
    assert face.score.item() == pytest.approx(read["score"]) != 0  # no fallback
    np.testing.assert_allclose(face.keypoints[0], keypoints, atol=1e-6)
    np.testing.assert_allclose(face.bbox[0], box, atol=1e-6)

    points = keypoints * [width, height]
    matrix = geometry.similarity(points, geometry.TEMPLATE * 112)
    theta = geometry.sampling_matrix(matrix, width, height, 112)
    np.testing.assert_allclose(face.theta[0], theta, rtol=1e-4, atol=1e-4)
    moved = (points @ matrix[:, :2].T + matrix[:, 2]) / 112
    np.testing.assert_allclose(face.aligned_keypoints[0], moved, atol=1e-4)
    np.testing.assert_allclose(face.aligned[0], geometry.warp(image, theta, 112), atol=5e-3)


@pytest.fixture(scope="module")
def published(golden):
    file = golden("dfa.npz")
    return {key.removeprefix("state."): np.float64(value) for key, value in file.items() if "state." in key}, file


def test_plain_form_gives_the_reference_output(published):
    """The form itself against the authors' implementation, where its vectors are available."""
    state, file = published
    found = dfa.run(state, np.float64(file["image"][0])[::-1])
    np.testing.assert_allclose(found["bbox_regression"], file["bbox_regression"][0], atol=1e-5)
    np.testing.assert_allclose(found["landmark_regression"], file["landmark_regression"][0], atol=1e-5)
    np.testing.assert_allclose(found["keypoints"], file["landmarks"][0], atol=1e-5)
    np.testing.assert_allclose(found["bbox"], file["bbox"][0], atol=1e-5)
    np.testing.assert_allclose(found["score"], file["score"][0, 0], atol=1e-5)
