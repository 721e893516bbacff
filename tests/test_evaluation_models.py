"""Models from all kinds of files, each fed in the way it was made for."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

import insightface_kprpe as ik
from insightface_kprpe.data.synthetic import draw_face
from insightface_kprpe.deployment.onnx_export import export_onnx
from insightface_kprpe.inference import models
from insightface_kprpe.inference.models import OnnxEmbedder, TorchEmbedder, open_model
from insightface_kprpe.packs.layout import KEYPOINT_RECOGNITION, MANIFEST
from insightface_kprpe.weights.sources import locate_weights

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = ik.get_model("vit_n_kprpe", num_features=16, **TINY).eval()
    torch.nn.init.normal_(net.keypoint_linear.weight, std=0.5)
    return net


@pytest.fixture(scope="module")
def files(tmp_path_factory, net):
    """A training run, bare weights, and both ONNX files."""
    folder = tmp_path_factory.mktemp("models")
    run = folder / "run"
    run.mkdir()
    config = {"network": "vit_n_kprpe", "network_kwargs": TINY, "embedding_size": 16}
    (run / "config.json").write_text(json.dumps(config))
    torch.save(net.state_dict(), run / "model.pt")
    save_file({f"net.{key}": value for key, value in net.state_dict().items()}, run / "net.safetensors")
    export_onnx(net, folder / "two.onnx")
    export_onnx(net, folder / "one.onnx", image_only=True)
    return folder


@pytest.fixture(scope="module")
def faces():
    drawn = [draw_face(person, 0, aligned=False) for person in range(3)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2) / 127.5 - 1
    return images, torch.from_numpy(np.stack([keypoints for _, keypoints in drawn]))


@pytest.mark.parametrize("file", ["run", "run/model.pt", "run/net.safetensors", "two.onnx"])
def test_every_form_of_a_network_gives_its_embeddings(files, net, faces, file):
    embed = open_model(files / file)
    with torch.no_grad():
        expected = net(*faces)
    np.testing.assert_allclose(embed(*faces), expected, atol=2e-4)
    assert embed.needs_keypoints and not embed.finds_keypoints
    assert embed.name == {"run": "run", "run/model.pt": "run", "run/net.safetensors": "net"}.get(file, "two")
    assert embed.fingerprint() == open_model(files / file).fingerprint()
    assert "RGB" in embed.describe()


def test_hidden_files_beside_models_are_none(tmp_path, files, net):
    """What macOS leaves beside each file of a folder that it packs."""
    for name in ("pack/w600k.onnx", "weights/net.pt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).with_name(f"._{tmp_path.joinpath(name).name}").write_bytes(b"\0\5\x16\7")
    shutil.copy(files / "one.onnx", tmp_path / "pack" / "w600k.onnx")
    torch.save(net.state_dict(), tmp_path / "weights" / "net.pt")
    assert open_model(tmp_path / "pack").path.name == "w600k.onnx"
    assert locate_weights(tmp_path / "weights")[1].name == "net.pt"


@pytest.mark.parametrize("file", ["run", "two.onnx"])
def test_models_can_be_copied_and_pickled(files, faces, file):
    embed = open_model(files / file, name="mine")
    for copied in (pickle.loads(pickle.dumps(embed)), copy.deepcopy(embed)):
        assert copied.name == "mine" and torch.equal(copied(*faces), embed(*faces))


def test_image_only_file_and_a_name(files, net, faces):
    embed = open_model(files / "one.onnx", name="mine")
    with torch.no_grad():
        expected = net(faces[0], torch.tensor(ik.geometry.CANONICAL_KEYPOINTS).expand(3, 5, 2))
    np.testing.assert_allclose(embed(*faces), expected, atol=2e-4)
    assert embed.name == "mine" and not embed.needs_keypoints
    assert embed.fingerprint() != open_model(files / "two.onnx").fingerprint()


def arcface(path, batch, preprocessing):
    """An ArcFace-style file: red's mean of each of four quarters; perhaps with MXNet's normalization inside."""
    weight = np.zeros((4, 3, 112, 112), np.float32)
    for quarter in range(4):
        row, column = 56 * (quarter // 2), 56 * (quarter % 2)
        weight[quarter, 0, row : row + 56, column : column + 56] = 1 / 56**2
    nodes, constants, data = [], [numpy_helper.from_array(weight, "weight")], "data"
    if preprocessing:
        constants += [
            numpy_helper.from_array(np.float32(127.5), "mean"),
            numpy_helper.from_array(np.float32(0.0078125), "scale"),
        ]
        nodes += [
            helper.make_node("Sub", ["data", "mean"], ["centered"], name="_minusscalar0"),
            helper.make_node("Mul", ["centered", "scale"], ["scaled"], name="_mulscalar0"),
        ]
        data = "scaled"
    nodes += [
        helper.make_node("Conv", [data, "weight"], ["planes"], name="conv"),
        helper.make_node("Flatten", ["planes"], ["fc1"], name="flatten"),
    ]
    shape = [batch, 3, 112, 112]
    inputs = [helper.make_tensor_value_info("data", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [batch, 4])]
    graph = helper.make_graph(nodes, "arcface", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("batch", [1, 2, "None"])
@pytest.mark.parametrize("preprocessing", [False, True])
def test_arcface_files_as_insightface_feeds_them(tmp_path, faces, batch, preprocessing):
    """InsightFace's own class on the BGR images is the truth; batches of any fixed size are filled up."""
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    path = arcface(tmp_path / "w600k.onnx", batch, preprocessing)
    embed = open_model(path)
    assert (embed.mean, embed.std) == ((0, 1) if preprocessing else (127.5, 127.5))
    got = embed(*faces).numpy()
    stock = ArcFaceONNX(str(path), embed.session)
    bgr = ((faces[0] + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()[..., ::-1].copy()
    expected = [stock.get_feat([image, image][: 2 if batch == 2 else 1])[0] for image in bgr]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert got.shape == (3, 4) and not embed.needs_keypoints


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-2000], lambda b: b[:40], lambda b: b"", lambda b: b"no protobuf at all", lambda b: b[2000:]],
    ids=["cut", "head only", "empty", "text", "tail only"],
)
def test_damaged_onnx_files_are_one_sentence(tmp_path, files, damage):
    for name, place in (("one.onnx", "one.onnx"), ("two.onnx", "two.onnx")):
        (tmp_path / place).write_bytes(damage((files / name).read_bytes()))
        with pytest.raises(ValueError, match=rf"{name}.*(could not be|must take)") as caught:
            open_model(tmp_path / place)
        assert "\n" not in str(caught.value)


def test_a_file_that_does_not_say_how_to_feed_it_is_named(tmp_path, files):
    model = onnx.load(str(files / "one.onnx"))
    kept = [entry for entry in model.metadata_props if not entry.key.endswith(".mean")]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, str(tmp_path / "net.onnx"))
    with pytest.raises(ValueError, match=r"net\.onnx does not say how to normalize its input"):
        open_model(tmp_path / "net.onnx")


def test_packs_by_folder_and_by_name(tmp_path, files, net, faces, monkeypatch):
    monkeypatch.setattr(models, "PACKS", str(tmp_path))
    ours = tmp_path / "kprpe"
    (ours / KEYPOINT_RECOGNITION).parent.mkdir(parents=True)
    (ours / KEYPOINT_RECOGNITION).write_bytes((files / "two.onnx").read_bytes())
    record = {"sha256": "0", "source": "run", "licence": "MIT"}
    (ours / MANIFEST).write_text(json.dumps({"name": "kprpe", "files": {KEYPOINT_RECOGNITION: record}}))
    embed = open_model("kprpe")
    assert isinstance(embed, OnnxEmbedder) and embed.needs_keypoints and embed.name == "kprpe"
    other = tmp_path / "buffalo"
    other.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        open_model(other)
    arcface(other / "w600k.onnx", "None", False)
    assert open_model(str(other))(*faces).shape == (3, 4)


def test_weights_alone(tmp_path, files, net, faces):
    """Named sizes are recognized by their shapes; others need the name of their network."""
    torch.manual_seed(0)
    named = ik.get_model("vit_n", num_features=24).eval()
    torch.save(named.state_dict(), tmp_path / "weights.pt")
    for network in (None, "vit_n"):
        embed = open_model(tmp_path / "weights.pt", network)
        with torch.no_grad():
            np.testing.assert_allclose(embed(*faces), named(faces[0]), atol=1e-5)
        assert not embed.needs_keypoints
    with pytest.raises(ValueError, match=r"weights\.pt.* claims to be vit_n_kprpe"):
        open_model(tmp_path / "weights.pt", network="vit_n_kprpe")
    torch.save(net.state_dict(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt .*holds a ViT with KPRPE"):
        open_model(tmp_path / "other.pt")


def test_bf16_is_close_to_fp32(files, faces):
    exact, rough = open_model(files / "run")(*faces), open_model(files / "run", precision="bf16")(*faces)
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.onnx",), "model not found: absent.onnx"),
        (("no_such_pack",), "nor a pack in"),
        (("{files}/run", None, "fp8"), "precision must be fp32 or bf16"),
        (("{files}/two.onnx", None, "bf16"), "leave both options out"),
        (("{files}/two.onnx", "vit_n"), "leave both options out"),
        (("{files}/run/config.json",), "could not be read as weights"),
    ],
)
def test_mistakes(files, arguments, message):
    path, *others = arguments
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_model(path.format(files=files), *others)


def test_files_that_are_no_recognition_model(tmp_path, files, shared):
    with pytest.raises(ValueError, match=r"must take images \(batch, 3, 112, 112\)"):
        open_model(shared / "data" / "models" / "scrfd_500m_kps.onnx")
    landmarks = tmp_path / "dfa"
    landmarks.mkdir()
    (landmarks / "config.json").write_text(json.dumps({"aggregator": True}))
    torch.save(ik.DFA().state_dict(), landmarks / "model.pt")
    with pytest.raises(ValueError, match="must be a recognition network"):
        open_model(landmarks)


def test_torch_embedder_checks_its_precision(net):
    with pytest.raises(ValueError, match="precision must be"):
        TorchEmbedder(net, precision="int8")
