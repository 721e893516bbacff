"""A user's own backbone: docs/custom_backbone.md's trained, evaluated, exported and packed; and timm's ways."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import tiny_packs as tiny
import torch
import torch.nn as nn
from insightface.app import FaceAnalysis

import insightface_kprpe as ik
from insightface_kprpe.backbones import Backbone, registry
from insightface_kprpe.backbones.interface import check_backbone

PAGE = Path(__file__).resolve().parents[1] / "docs" / "custom_backbone.md"
SMALL = ["num_classes=8", "num_image=64", "batch_size=8", "num_epoch=1", "embedding_size=16", "num_workers=0"]


@pytest.fixture
def own_net(tmp_path):
    """The page's file in a folder, and the environment in which commands find it."""
    code = re.search(r"```python\n# my_net\.py\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    (tmp_path / "my_net.py").write_text(code)
    return {**os.environ, "PYTHONPATH": str(tmp_path), "INSIGHTFACE_KPRPE_BACKBONES": "my_net"}


def call(*arguments, cwd, env):
    command = [sys.executable, "-m", "insightface_kprpe.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_convolutional_network_goes_the_whole_way(own_net, tmp_path):
    run, settings = tmp_path / "run", ["network=small_conv", "network_kwargs={'width': 4}", "val_targets=()", *SMALL]
    call("train", "quickstart", *settings, f"output={run}", cwd=tmp_path, env=own_net)
    assert "accuracy" in call("evaluate", "bin", "synthetic", "--model", run, cwd=tmp_path, env=own_net)
    call("export", run, "net.onnx", cwd=tmp_path, env=own_net)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"]
    tiny.write_detector(tmp_path / "detector.onnx")
    pack = ["pack", run, "--detector", "detector.onnx", "--name", "own", "--root", "root"]
    assert "SmallConvNet, embedding 16" in call(*pack, cwd=tmp_path, env=own_net)
    app = FaceAnalysis(name="own", root=str(tmp_path / "root"), providers=["CPUExecutionProvider"])
    assert app.models["recognition"].get_feat(np.zeros((112, 112, 3), np.uint8)).shape == (1, 16)


class Looking(Backbone):
    """As small as can be, and with keypoints."""

    img_size, num_features, needs_keypoints = 112, 10, True

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, images, keypoints=None):
        return self.scale * keypoints.flatten(1) + images.mean((1, 2, 3))[:, None]


@pytest.fixture
def registered(monkeypatch):
    """A name of our own, gone afterwards."""
    monkeypatch.setattr(registry, "_BACKBONES", {**registry._BACKBONES})
    ik.register_backbone("looking", Looking)


def test_a_registered_network_keeps_its_keypoints_in_onnx(registered, tmp_path):
    report = ik.export_onnx(ik.get_model("looking"), tmp_path / "net.onnx")
    assert report.inputs == ("images", "keypoints")


class NoSize(Backbone):
    num_features = 8


class Contradiction(Looking):
    needs_keypoints, finds_keypoints = False, True


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "must be an insightface_kprpe.backbones.Backbone, got Linear"),
        (NoSize, "must set img_size to a positive integer, got None"),
        (Contradiction, "must set needs_keypoints if it sets finds_keypoints"),
    ],
)
def test_what_does_not_keep_to_the_interface_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        ik.register_backbone("wrong", build)
    assert "wrong" not in ik.list_models()


@pytest.mark.parametrize("name", ["vit_n", "vit_n_irpe", "vit_n_kprpe", "vit_n_kprpe_dfa"])
def test_our_own_networks_keep_to_it(name):
    net = check_backbone(ik.get_model(name, num_features=24, depth=1), name)
    assert (net.img_size, net.num_features) == (112, 24)
    assert (net.needs_keypoints, net.finds_keypoints) == ("kprpe" in name, name.endswith("dfa"))
    net.set_grad_checkpointing()


def test_defaults_of_the_interface():
    net = Looking()
    assert net.no_weight_decay() == net.position_tables() == set()
    with pytest.raises(ValueError, match="gradient_checkpointing must be False: Looking"):
        net.set_grad_checkpointing()
    with pytest.raises(NotImplementedError):
        net.find_keypoints(torch.zeros(1, 3, 112, 112))


def test_modules_that_cannot_be_imported_are_named(tmp_path):
    env = {**os.environ, "INSIGHTFACE_KPRPE_BACKBONES": "no_such_module"}
    command = [sys.executable, "-m", "insightface_kprpe.cli", "models"]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (
        result.returncode == 1
        and "could not import 'no_such_module'" in result.stderr
        and "Traceback" not in result.stderr
    )


# --- timm ------------------------------------------------------------------------------------------------------------

FACES = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make(**settings):
    torch.manual_seed(0)
    return timm.create_model("insightface_vit_n", depth=1, embed_dim=32, num_heads=2, **settings).eval()


def test_names_in_timm_have_a_prefix_of_ours():
    ours = set(timm.list_models("insightface_*"))
    assert "insightface_vit_b_kprpe" in ours and len(ours) >= len(ik.list_models()) - 1
    assert not timm.is_model("vit_n_kprpe") and not timm.is_model("vit_b")


def test_features_and_head_make_the_embedding():
    net = make(num_classes=16)
    tokens = net.forward_features(FACES)
    assert tokens.shape == (2, 64, 32)
    before = net.forward_head(tokens, pre_logits=True)
    assert before.shape == (2, 32)
    torch.testing.assert_close(net.feature[3](net.get_classifier()(before)), net(FACES))
    torch.testing.assert_close(net.forward_head(tokens), net(FACES))


def test_without_classes_the_last_layer_is_left_out():
    net = make(num_classes=0)
    assert net.num_features == 32 and net.num_classes == 0 and net(FACES).shape == (2, 32)
    other = make(num_classes=16)
    before = other.forward_head(other.forward_features(FACES), pre_logits=True)
    other.reset_classifier(0)
    torch.testing.assert_close(other(FACES), before)
    other.reset_classifier(5)
    assert other.eval()(FACES).shape == (2, 5) and other.num_features == other.num_classes == 5
    assert other.feature[2].weight.std().item() == pytest.approx(0.02, rel=0.3)
    with pytest.raises(ValueError, match="global_pool must be None"):
        other.reset_classifier(5, "avg")


def test_channels_and_what_timm_reads_of_the_data():
    net = make(num_classes=8, in_chans=1)
    assert net(FACES[:, :1]).shape == (2, 8)
    config = timm.data.resolve_model_data_config(make())
    assert config["input_size"] == (3, 112, 112) and config["crop_pct"] == 1
    assert config["mean"] == config["std"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "create", [ik.get_model, lambda name, **kwargs: timm.create_model("insightface_" + name, **kwargs)]
)
def test_a_misspelt_argument_gets_the_nearest_name(create):
    with pytest.raises(registry.UnknownArgument, match="has no argument 'drop_pth_rate'; did you mean drop_path_rate?"):
        create("vit_n_kprpe", drop_pth_rate=0.1)
