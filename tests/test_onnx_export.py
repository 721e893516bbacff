import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import insightface_kprpe as ik
from insightface_kprpe.deployment import onnx_export
from insightface_kprpe.deployment.onnx_export import ExportError, export_onnx
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS
from insightface_kprpe.packs.metadata import read_metadata


def tiny(position="kprpe", trained=True):
    torch.manual_seed(0)
    net = ik.VisionTransformer(
        embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_features=16, patch_size=28, position=position
    )
    if trained and position == "kprpe":
        torch.nn.init.normal_(net.keypoint_linear.weight, std=0.5)
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    net = tiny().train()
    return (
        net,
        export_onnx(net, folder / "two.onnx", licence="MIT"),
        export_onnx(net, folder / "one.onnx", image_only=True),
    )


def test_two_inputs_dynamic_batch_equal_torch(exported):
    net, report, _ = exported
    assert report.inputs == ("images", "keypoints") and report.cosine >= 0.9999
    assert net.training  # left as it was
    assert all(module.fused_attn for module in net.modules() if hasattr(module, "fused_attn"))
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images", "keypoints"]
    net.eval()
    for batch in (1, 5):
        images, keypoints = torch.rand(batch, 3, 112, 112) * 2 - 1, torch.rand(batch, 5, 2)
        got = session.run(None, {"images": images.numpy(), "keypoints": keypoints.numpy()})[0]
        np.testing.assert_allclose(got, net(images, keypoints).detach().numpy(), atol=1e-4)


def test_image_only_uses_the_template(exported):
    net, _, report = exported
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    expected = net.eval()(images, torch.tensor(CANONICAL_KEYPOINTS).expand(3, 5, 2)).detach().numpy()
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected, atol=1e-4)


def test_the_file_says_how_to_feed_it(exported):
    _, report, one = exported
    metadata = read_metadata(report.path)
    assert (metadata["colour_order"], metadata["mean"], metadata["std"]) == ("RGB", "127.5", "127.5")
    assert "left eye" in metadata["keypoint_convention"] and metadata["licence"] == "MIT"
    assert metadata["inputs"] == "images+keypoints" and read_metadata(one.path)["inputs"] == "images"
    model = onnx.load(str(one.path))
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == onnx_export.OPSET
    # The stock loader guesses the normalization from these names.
    assert not any(node.name.startswith(("Sub", "Mul", "_minus", "_mul")) for node in model.graph.node[:8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.half(), r"float32 weights, got torch\.float16; call net\.float\(\) first"),
        (lambda net: net.bfloat16(), r"float32 weights, got torch\.bfloat16"),
        (torch.nn.DataParallel, r"wrapped in DataParallel; pass net\.module"),
        (torch.compile, r"compiled by torch\.compile; pass net\._orig_mod"),
        (lambda net: ik.DFA(), "got a DFA; write it with detector_export"),
        (lambda net: torch.nn.Linear(3, 3), r"must be a .*\.Backbone or derive from it, got Linear"),
    ],
)
def test_networks_in_another_state_are_told_what_to_call(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(change(tiny()), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_too_large_for_a_file_is_told_at_once(tmp_path):
    with torch.device("meta"):
        net = ik.get_model("vit_h")
    with pytest.raises(ValueError, match=r"less than 2 GiB of weights.*got 2\.\d GiB"):
        export_onnx(net, tmp_path / "net.onnx")


@pytest.mark.parametrize("position", [None, "irpe"])
def test_networks_without_keypoints_have_one_input(tmp_path, position):
    report = export_onnx(tiny(position), tmp_path / "net.onnx")
    assert report.inputs == ("images",)


def test_keypoints_without_effect_are_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ExportError, match="changing the keypoints does not change"):
        export_onnx(tiny(trained=False), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_wrong_export_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MINIMAL_COSINE", 1.1)
    with pytest.raises(ExportError, match="differ from torch"):
        export_onnx(tiny(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())
