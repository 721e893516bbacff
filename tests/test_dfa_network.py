import numpy as np
import pytest
import torch

from insightface_kprpe.dfa import RETINAFACE, RetinaFaceNet, describe, network, start_from_retinaface
from insightface_kprpe.dfa.anchors import decode_points, make_anchors


def tensors(arrays):
    return {
        key.removeprefix("state."): torch.tensor(value) for key, value in arrays.items() if key.startswith("state.")
    }


@pytest.fixture(scope="module")
def reference(golden):
    return golden("dfa.npz")


@pytest.fixture(scope="module")
def net(reference):
    net = RetinaFaceNet().eval()
    net.load_state_dict(tensors(reference))
    return net


@pytest.fixture(scope="module")
def bgr(reference):
    return torch.tensor(reference["image"], dtype=torch.float32).flip(1)


@pytest.fixture(scope="module")
def retinaface_weights():
    """Random ones, with statistics in the norms that matter."""
    torch.manual_seed(0)
    state = RetinaFaceNet(**RETINAFACE).state_dict()
    state["body.stage1.0.1.running_mean"].normal_(std=50)
    state["body.stage1.0.1.running_var"].uniform_(100, 1000)
    return state


def test_output_is_the_reference_one(net, bgr, reference):
    with torch.no_grad():
        output = net(bgr)
    for name, value in {
        "bbox_regression": output.bbox_regression,
        "class_softmax": output.class_logits.softmax(-1),
        "landmark_regression": output.landmark_regression,
        "landmarks": output.keypoints,
        "bbox": output.bbox,
        "score": output.score[:, None],
    }.items():
        np.testing.assert_allclose(value, reference[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("body", ["mobilenet0.25", "resnet50"])
def test_faster_ways_of_inference_change_nothing(body, monkeypatch):
    """Folded BatchNorms, channels last and parts of a batch against layer after layer, in value and gradient."""
    torch.manual_seed(0)
    net = RetinaFaceNet(body, image_size=64).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values, lowest in ((module.running_mean, -0.2), (module.running_var, 0.5), (module.bias.data, -0.2)):
                values.uniform_(lowest, lowest + 1)
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    monkeypatch.setattr(network, "AT_ONCE", 2)
    with torch.no_grad():
        in_parts = net(images)

    def gradients():
        net.zero_grad()
        found = net(images)
        (found.keypoints.square().sum() + found.bbox_regression.square().sum()).backward()
        return found, [parameter.grad.clone() for parameter in net.body.parameters()]

    folded, folded_gradients = gradients()
    monkeypatch.setattr(network._ConvNorms, "forward", torch.nn.Sequential.forward)
    expected, expected_gradients = gradients()
    for found in (in_parts, folded):
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-3)
    for gradient, wanted in zip(folded_gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() <= 1e-3 * wanted.abs().max() + 1e-6


def test_size_and_cost():
    assert describe() == {
        "parameters": 486_775,
        "gflop": pytest.approx(0.14, abs=0.005),
        "anchors": 1050,
        "image_size": 160,
    }


@pytest.mark.parametrize("aggregator", [True, False])
def test_resnet50_body(aggregator):
    net = RetinaFaceNet("resnet50", aggregator=aggregator).eval()
    with torch.no_grad():
        output = net(torch.rand(1, 3, 160, 160) * 2 - 1)
    assert output.landmark_regression.shape == (1, 1050, 10) and output.keypoints.shape == (1, 5, 2)
    assert {"body.conv1.weight", "body.layer1.0.downsample.0.weight", "body.layer4.2.bn3.weight"} <= set(
        net.state_dict()
    )


def test_without_aggregator_the_best_anchor_is_read():
    net = RetinaFaceNet(aggregator=False).double().eval()  # in float32 an untrained one may say the same of two anchors
    with torch.no_grad():
        output = net(torch.rand(3, 3, 160, 160, dtype=torch.float64) * 2 - 1)
    probability = output.class_logits.softmax(-1)[..., 1]
    torch.testing.assert_close(output.score, probability.max(1).values)
    best = probability.argmax(1)
    regression = output.landmark_regression[torch.arange(3), best].view(3, 5, 2)
    expected = net.anchors[best, None, :2] + 0.1 * regression * net.anchors[best, None, 2:]
    torch.testing.assert_close(output.keypoints, expected)


def test_anchors_follow_the_network_and_stay_out_of_its_weights(net, bgr):
    assert "anchors" not in net.state_dict()
    double = RetinaFaceNet().double().eval()
    double.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert double(bgr.double()).keypoints.dtype == torch.float64
        torch.testing.assert_close(double(bgr.double()).keypoints.float(), net(bgr).keypoints, atol=1e-5, rtol=0)


@pytest.mark.parametrize("aggregator", [True, False])
def test_autocast_keeps_coordinates_precise(aggregator):
    """Whatever the 16-bit heads say, it is decoded and averaged in 32 bits."""
    net = RetinaFaceNet(aggregator=aggregator).eval()
    if aggregator:  # all anchors weigh the same
        torch.nn.init.zeros_(net.aggregator[3].weight)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = net(torch.rand(2, 3, 160, 160) * 2 - 1)
    assert output.keypoints.dtype == output.score.dtype == torch.float32
    points = decode_points(output.landmark_regression, net.anchors).unflatten(-1, (5, 2))
    best = (output.class_logits[..., 1] - output.class_logits[..., 0]).argmax(1)
    expected = points.mean(1) if aggregator else points[torch.arange(2), best]
    torch.testing.assert_close(output.keypoints, expected, atol=1e-5, rtol=0)


def test_public_retinaface_weights_load_strictly_and_find_faces(shared):
    from insightface_kprpe.evaluation.landmarks import LandmarkDataset, evaluate_landmarks
    from insightface_kprpe.state_dict import load_weights

    file = shared / "data" / "models" / "retinaface_mobilenet0.25.pth"
    net = load_weights(RetinaFaceNet(**RETINAFACE), file).eval()
    dataset = LandmarkDataset(shared / "data" / "faces" / "landmarks" / "val", labeled_only=True)
    dataset.labels = dataset.labels[::10]

    def predict(images):
        output = net(images.flip(1))
        return output.keypoints, output.score

    result = evaluate_landmarks(predict, dataset)
    assert result.nme < 0.05 and result.score > 0.99


def test_starting_from_retinaface_moves_the_pixel_scale_into_the_first_layer(retinaface_weights):
    published = RetinaFaceNet(**RETINAFACE).eval()
    published.load_state_dict(retinaface_weights)
    net = RetinaFaceNet().eval()
    aggregator = {key: value.clone() for key, value in net.aggregator.state_dict().items()}
    start_from_retinaface(net, {f"module.{key}": value for key, value in retinaface_weights.items()})
    image = torch.rand(1, 3, 160, 160) * 2 - 1
    pixels = (image + 1) * 127.5 - torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)
    with torch.no_grad():
        old = published.body.stage1[0][:2](pixels)
        new = net.body.stage1[0][:2](image)
    torch.testing.assert_close(new[..., 1:-1, 1:-1], old[..., 1:-1, 1:-1], atol=1e-3, rtol=1e-3)
    changed = ("body.stage1.0.0.weight", "body.stage1.0.1.running_mean")
    for key, value in net.state_dict().items():
        if key.startswith("aggregator."):
            torch.testing.assert_close(value, aggregator[key.removeprefix("aggregator.")])
        elif key not in changed:
            torch.testing.assert_close(value, retinaface_weights[key])


def test_starting_from_retinaface_changes_nothing_for_its_own_pixels(retinaface_weights):
    net = RetinaFaceNet(**RETINAFACE)
    start_from_retinaface(net, retinaface_weights)
    for key, value in retinaface_weights.items():
        torch.testing.assert_close(net.state_dict()[key], value)


def test_bad_arguments():
    with pytest.raises(ValueError, match="body must be"):
        RetinaFaceNet("vgg")
    with pytest.raises(ValueError, match="two sides for each of three strides"):
        RetinaFaceNet(anchor_sizes=((16,), (32,), (64,)))
    net = RetinaFaceNet(anchor_sizes=RETINAFACE["anchor_sizes"])
    torch.testing.assert_close(net.anchors, make_anchors(160, RETINAFACE["anchor_sizes"]))
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 160, 160\).*got \(1, 3, 112, 112\)"):
        net(torch.zeros(1, 3, 112, 112))
