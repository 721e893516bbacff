"""Published convolutional networks: what they are, weights in every published layout, and the way to a pack."""

import json

import numpy as np
import onnxruntime
import pytest
import tiny_packs as tiny
import torch
import yaml
from insightface.app import FaceAnalysis
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.backbones import registry
from insightface_kprpe.backbones.iresnet import IResNet, IRNet
from insightface_kprpe.weights.network import load_run
from insightface_kprpe.weights.sources import convert, load_published

# Parameters and tensors of the public definitions (see the head of backbones/iresnet.py), counted there.
PUBLISHED = {
    "r18": (24_025_600, 187),
    "r34": (34_139_328, 331),
    "r50": (43_590_848, 475),
    "r100": (65_156_160, 925),
    "r200": (118_833_920, 1807),
    "mbf": (2_059_520, 333),
    "ir_18": (24_020_352, 179),
    "ir_50": (43_585_600, 467),
    "ir_101": (65_150_912, 917),
    "cvlface_ir18": (24_020_352, 179),
    "cvlface_ir50": (43_585_600, 467),
    "cvlface_ir101": (65_150_912, 917),
}
WIDTHS = (2, 4, 5, 6)
IMAGES = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def small(monkeypatch):
    """r18, ir_18 and cvlface_ir18 with few channels, so that their files are small."""
    for name, kind, settings in (("r18", IResNet, {}), ("ir_18", IRNet, {"bgr": True}), ("cvlface_ir18", IRNet, {})):
        monkeypatch.setitem(registry._BACKBONES, name, registry._build_with({"widths": WIDTHS, **settings}, kind))


def random_net(name, **settings):
    torch.manual_seed(0)
    net = ik.get_model(name, num_features=8, **settings)
    with torch.no_grad():
        net(IMAGES)  # running statistics other than the first
    return net.eval()


def same(net, source):
    with torch.no_grad():
        torch.testing.assert_close(net(IMAGES), source(IMAGES), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    with torch.device("meta"):
        net = ik.get_model(name)
    assert (sum(value.numel() for value in net.parameters()), len(net.state_dict())) == PUBLISHED[name]
    assert (net.img_size, net.num_features, net.needs_keypoints) == (112, 512, False)


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_t_dp005_mask0", 76_653_813), ("vit_s_dp005_mask_0", 304_196_926), ("vit_b_dp005_mask_005", 455_533_594)],
)
def test_lvfaces_files_are_of_arcface_torchs_vits(name, size):
    """Bytes of LVFace-T, -S and -B_Glint360K.onnx as published; the graph is what weights leave over."""
    with torch.device("meta"):
        state = ik.get_model(name).state_dict()
    weights = sum(value.numel() * 4 for key, value in state.items() if value.ndim and key != "mask_token")
    assert 50_000 < size - weights < 250_000


def test_arcface_torchs_last_normalization_has_no_scale_to_learn():
    frozen = [name for name, value in random_net("r18", widths=WIDTHS).named_parameters() if not value.requires_grad]
    assert frozen == ["features.weight"]


def test_dropout_is_where_it_is_published():
    assert ik.get_model("r18", dropout=0.4, widths=WIDTHS).dropout.p == 0.4
    assert ik.get_model("ir_18", widths=WIDTHS).output_layer[1].p == 0.4
    with pytest.raises(ValueError, match="dropout must be 0 for mbf, got 0.4; it has none"):
        ik.get_model("mbf", dropout=0.4)
    with pytest.raises(registry.UnknownArgument, match="IResNet has no argument 'widhts'; did you mean widths"):
        ik.get_model("r18", widhts=WIDTHS)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("name", "settings"), [("r18", {}), ("mbf", {"scale": 1})])
def test_arcface_torchs_weights_are_known_by_their_tensors(small, monkeypatch, tmp_path, name, settings, prefix):
    monkeypatch.setitem(registry._BACKBONES, "mbf", registry._build_with({"scale": 1}, registry.MobileFaceNet))
    source = random_net(name, **settings)
    torch.save({prefix + key: value for key, value in source.state_dict().items()}, tmp_path / "model.pt")
    net, description = load_published(tmp_path / "model.pt")
    same(net, source)
    assert description.config == {"network": name, "network_kwargs": {}, "embedding_size": 8}
    assert description.color_order == "RGB in [-1, 1]"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding_size": 60_000}, r"does not fit this IResNet: .*fc.weight is \(8, "),
        (
            {"network_kwargs": {"layers": [10**6, 1, 1, 1]}},
            "numbers in network_kwargs must be at most 65536, got 1000000",
        ),
        ({"network_kwargs": {"widths": [60_000] * 4}}, "does not fit this IResNet"),
    ],
)
def test_sizes_that_are_not_the_weights_take_no_memory(small, tmp_path, change, message):
    """The first would take 6 GB."""
    torch.save(random_net("r18").state_dict(), tmp_path / "model.pt")
    config = {"network": "r18", "network_kwargs": {}, "embedding_size": 8} | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_published, load_run):
        with pytest.raises(ValueError, match=rf"{tmp_path.name}.*{message}"):
            load(tmp_path)


def write_adaface(path, source):
    """What AdaFace's training leaves: a Lightning checkpoint."""
    state = {f"model.{key}": value for key, value in source.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state | {"head.kernel": torch.rand(8, 20)}}, path)


def test_adafaces_checkpoints_take_bgr(small, tmp_path):
    trained = random_net("cvlface_ir18")  # the same network, without the turn
    write_adaface(tmp_path / "adaface.ckpt", trained)
    net, description = load_published(tmp_path / "adaface.ckpt")
    same(net, lambda images: trained(images.flip(1)))
    assert (
        description.config["network"] == "ir_18"
        and "BGR" in description.color_order
        and description.format == "AdaFace"
    )
    again, _ = load_published(convert(net, description, tmp_path / "again.safetensors"))
    same(again, net)


def test_weights_that_do_not_tell_their_colors_are_refused_until_told(small, tmp_path):
    source = random_net("cvlface_ir18")
    torch.save(source.state_dict(), tmp_path / "ir.pt")
    with pytest.raises(ValueError, match="holds the weights of cvlface_ir18 or ir_18, .*differ only in their input"):
        load_published(tmp_path / "ir.pt")
    same(load_published(tmp_path / "ir.pt", network="cvlface_ir18")[0], source)
    same(load_published(tmp_path / "ir.pt", network="ir_18")[0], lambda images: source(images.flip(1)))


@pytest.mark.parametrize("colors", ["RGB", "BGR"])
@pytest.mark.parametrize(("family", "name"), [("iresnet", "cvlface_ir18"), ("iresnet_insightface", "r18")])
def test_cvlfaces_folders_say_which_network_and_colors(small, tmp_path, family, name, colors):
    source = random_net(name)
    torch.save({f"net.{key}": value for key, value in source.state_dict().items()}, tmp_path / "model.pt")
    content = {"name": "ir18", "output_dim": 8, "color_space": colors, "yaml_path": f"models/{family}/configs/a.yaml"}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content))
    net, description = load_published(tmp_path)
    assert description.config["network"] == name and ("converted from BGR" in description.color_order) == (
        colors == "BGR"
    )
    same(net, source if colors == "RGB" else lambda images: source(images.flip(1)))


def test_colors_are_not_turned_twice(small, tmp_path):
    torch.save(random_net("ir_18").state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.yaml").write_text("name: ir18\ncolor_space: BGR\n")
    for load in (
        lambda: ik.load_weights(ik.get_model("ir_18", num_features=8), tmp_path / "model.pt"),
        lambda: load_published(tmp_path, network="ir_18"),
    ):
        with pytest.raises(ValueError, match="is for weights that stay BGR"):
            load()


def call(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r18", "ir_18"])
def test_an_iresnet_goes_the_whole_way(tmp_path, name):
    # Fewer than 16 channels crash torch 2.13's strided 1x1 convolutions in channels-last layout on CPUs.
    run, kwargs = tmp_path / "run", "network_kwargs={'widths': (16, 16, 32, 32)}"
    data = ["num_classes=8", "num_image=64", "batch_size=8", "num_epoch=1", "num_workers=0", "val_targets=()"]
    call("train", "quickstart", f"network={name}", kwargs, "embedding_size=16", *data, f"output={run}")
    assert json.loads((run / "config.json").read_text())["network"] == name
    assert "accuracy" in call("evaluate", "bin", "synthetic", "--model", run, "--no-flip")
    call("export", run, tmp_path / "net.onnx", "--image-only")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    tiny.write_detector(tmp_path / "detector.onnx")
    call("pack", run, "--detector", tmp_path / "detector.onnx", "--name", "own", "--root", tmp_path)
    app = FaceAnalysis(name="own", root=str(tmp_path), providers=["CPUExecutionProvider"])
    picture = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    embedding = app.models["recognition"].get_feat(picture)[0]
    with torch.no_grad():
        images = torch.tensor(picture[..., ::-1].copy()).permute(2, 0, 1)[None] / 127.5 - 1
        expected = load_published(run)[0](images)[0].numpy()
    assert embedding @ expected / np.linalg.norm(embedding) / np.linalg.norm(expected) > 0.9999
