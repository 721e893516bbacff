import json

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from distributed import run_on_ranks
from torch.nn.parallel import DistributedDataParallel

import insightface_kprpe as ik
from insightface_kprpe.backbones.relative_position import template_keypoints
from insightface_kprpe.backbones.vit_with_dfa import ViTWithDFA
from insightface_kprpe.deployment import model_pack
from insightface_kprpe.deployment.detector_export import export_detector
from insightface_kprpe.deployment.onnx_export import example_inputs, export_onnx
from insightface_kprpe.dfa import DFA, RetinaFaceNet
from insightface_kprpe.geometry import SCORE_THRESHOLD
from insightface_kprpe.inference.models import TorchEmbedder
from insightface_kprpe.packs.metadata import read_metadata
from insightface_kprpe.state_dict import load_weights
from insightface_kprpe.training import trainer
from insightface_kprpe.training.config import load_config
from insightface_kprpe.training.state import Schedule, build_state
from insightface_kprpe.weights.network import load_run

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "patch_size": 28}


class BrightFaces(DFA):
    """Finds a face, a little off the template, in bright images and none in dark ones."""

    def locate(self, images):
        keypoints, _, bbox = super().locate(images)
        brightness = images.mean((1, 2, 3))
        return self.template + 0.2 * torch.tanh(5 * (keypoints - 0.5)), (brightness > 0).float(), bbox


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = ViTWithDFA(dfa_weights=DFA().state_dict(), num_features=16, **TINY)
    torch.nn.init.normal_(net.keypoint_linear.weight, std=0.5)
    net.dfa = BrightFaces(net.dfa.state_dict()).requires_grad_(False)
    return net.eval()


@pytest.fixture
def images():
    images = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(1)) - 0.4  # bright
    images[1::2] -= 0.6
    return images


def test_every_kprpe_network_has_a_self_aligned_form():
    names = {name for name in ik.list_models() if name.endswith("_kprpe")}
    assert {f"{name}_dfa" for name in names} == {name for name in ik.list_models() if name.endswith("_dfa")}


def test_keypoints_are_the_aligners_or_below_the_threshold_the_template(net, images):
    found, score, _ = net.dfa.locate(images)
    assert score.tolist() == [1, 0, 1, 0]
    expected = torch.where((score == 1)[:, None, None], found, template_keypoints(4))
    torch.testing.assert_close(net.find_keypoints(images), expected)
    torch.testing.assert_close(net(images), net(images, expected))
    assert not torch.allclose(net(images)[0], net(images, template_keypoints(4))[0])


def test_explicit_keypoints_give_what_the_plain_network_gives(net, images):
    plain = ik.VisionTransformer(position="kprpe", num_features=16, **TINY).eval()
    plain.load_state_dict({key: value for key, value in net.state_dict().items() if not key.startswith("dfa.")})
    keypoints = template_keypoints(4) + 0.1
    torch.testing.assert_close(net(images, keypoints), plain(images, keypoints))
    with pytest.raises(ValueError, match="probably pixels"):
        net(images, keypoints * 112)


def test_the_aligner_never_trains(net, images):
    net.train()
    assert net.training and net.blocks[0].training and not any(module.training for module in net.dfa.modules())
    before = {name: value.clone() for name, value in net.dfa.state_dict().items()}
    optimizer = build_state(
        load_config("quickstart"), net, torch.nn.Linear(16, 3), Schedule(1, 1), torch.device("cpu")
    ).optimizer
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held.isdisjoint(map(id, net.dfa.parameters())) and id(net.pos_embed) in held
    images = images.requires_grad_()
    (net(images) * torch.arange(4)[:, None]).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.dfa.state_dict().items())
    assert all(parameter.grad is None for parameter in net.dfa.parameters())
    assert net.keypoint_linear.weight.grad.abs().sum() > 0 and images.grad.isfinite().all()
    net.zero_grad()
    net.eval()


def test_gradients_reach_the_image_through_the_keypoints(net, images):
    images.requires_grad_()
    net.find_keypoints(images).sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True, False]


def test_autocast_does_not_move_the_keypoints(net, images):
    with torch.autocast("cpu", torch.bfloat16):
        keypoints, embeddings = net.find_keypoints(images), net(images)
    torch.testing.assert_close(keypoints, net.find_keypoints(images), atol=0, rtol=0)
    assert F.cosine_similarity(embeddings, net(images)).min() > 0.99


def test_weights_of_the_plain_network_leave_the_aligner_as_it_is(net):
    other = ViTWithDFA(dfa_weights=DFA().state_dict(), num_features=16, **TINY)
    aligner = {name: value.clone() for name, value in other.dfa.state_dict().items()}
    load_weights(other, {f"net.{k}": v for k, v in net.state_dict().items() if not k.startswith("dfa.")})
    assert torch.equal(other.pos_embed, net.pos_embed)
    assert all(torch.equal(value, aligner[name]) for name, value in other.dfa.state_dict().items())
    load_weights(other, net.state_dict())
    assert all(torch.equal(value, net.dfa.state_dict()[name]) for name, value in other.dfa.state_dict().items())
    with pytest.raises(ValueError, match=r"missing dfa\.body"):
        load_weights(other, {k: v for k, v in net.state_dict().items() if k != "dfa.body.stage1.0.0.weight"})


def test_random_weights_are_said_once(caplog):
    ik.get_model("vit_n_kprpe_dfa", depth=1)
    assert [record.levelname for record in caplog.records if record.levelname == "WARNING"] == ["WARNING"]
    assert "pass dfa_weights=FILE" in caplog.text
    caplog.clear()
    ik.get_model("vit_n_kprpe_dfa", depth=1, dfa_weights=DFA().state_dict())
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"position": "irpe"}, 'position must be "kprpe"'),
        ({"dfa_threshold": 1.5}, "dfa_threshold must be in"),
        ({"dfa_weights": {"nonsense": torch.zeros(1)}}, "missing body"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ViTWithDFA(**TINY, **kwargs)


def test_an_aligner_that_its_weights_do_not_tell_is_refused(tmp_path):
    """Such a network could be trained, but not be built again from its own model.pt."""
    torch.save(RetinaFaceNet(aggregator=False).state_dict(), tmp_path / "model.pt")
    config = {"body": "mobilenet0.25", "aggregator": False, "image_size": 160}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="dfa_weights must be those of a DFA with aggregator"):
        ViTWithDFA(dfa_weights=tmp_path, **TINY)
    with pytest.raises(FileNotFoundError, match="absent"):
        ViTWithDFA(dfa_weights=tmp_path / "absent.pt", **TINY)


def test_retinafaces_published_weights_serve_as_an_aligner(shared, images):
    file = shared / "data" / "models" / "retinaface_mobilenet0.25.pth"
    net = ViTWithDFA(dfa_weights=file, num_features=16, **TINY).eval()
    assert net.dfa.aggregator is None and net(images).isfinite().all()


def test_evaluators_leave_the_keypoints_to_the_network(net, images):
    torch.testing.assert_close(TorchEmbedder(net)(images, template_keypoints(4) * 0), net(images).detach())


def test_training_run_is_self_contained(tmp_path):
    """Interrupted or not, a run keeps the aligner that it was given, and its folder needs no other file."""
    torch.manual_seed(3)
    aligner = DFA().state_dict()
    torch.save(aligner, tmp_path / "dfa.pt")
    overrides = {
        "network": "vit_n_kprpe_dfa",
        "network_kwargs": {**TINY, "dfa_weights": str(tmp_path / "dfa.pt"), "dfa_threshold": 0.1},
        "embedding_size": 16,
        "num_classes": 8,
        "num_image": 32,
        "batch_size": 16,
        "num_epoch": 1,
        "num_workers": 0,
        "val_targets": (),
        "output": tmp_path / "run",
    }
    config = load_config("quickstart", [f"{key}={value}" for key, value in overrides.items()])
    trainer.train(config)
    config.resume = True  # nothing is left to do, but all states are loaded
    trainer.train(config)
    (tmp_path / "dfa.pt").unlink()
    net = load_run(tmp_path / "run")
    assert isinstance(net, ViTWithDFA) and net.dfa_threshold == 0.1
    assert all(torch.equal(value, aligner[name]) for name, value in net.dfa.state_dict().items())
    plain = ik.get_model("vit_n_kprpe", num_features=16, **TINY).state_dict()
    assert set(net.state_dict()) == set(plain) | {f"dfa.{name}" for name in aligner}


def ddp_step(rank, images):
    torch.manual_seed(rank)
    aligner = DFA().state_dict()
    net = ViTWithDFA(dfa_weights=aligner, num_features=16, **TINY)
    parallel = DistributedDataParallel(net)
    embeddings = parallel(images[rank::2])
    (embeddings * torch.arange(len(embeddings))[:, None]).sum().backward()
    untouched = all(torch.equal(value, aligner[name]) for name, value in net.dfa.state_dict().items())
    return {"gradient": net.keypoint_linear.weight.grad, "untouched": untouched}


@pytest.mark.slow
def test_ranks_share_gradients_and_leave_the_aligner_alone(images):
    first, second = run_on_ranks(ddp_step, 2, torch.cat([images, -images]))
    assert torch.equal(first["gradient"], second["gradient"]) and first["gradient"].abs().sum() > 0
    # Neither its weights nor the statistics of its norms are sent around: here every rank has others, and keeps them.
    assert first["untouched"] and second["untouched"]


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    return export_onnx(net, tmp_path_factory.mktemp("onnx") / "net.onnx", image_only=True, licence="MIT")


def test_image_only_export_holds_the_aligner_and_its_threshold(net, exported, images):
    session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["images"] and exported.cosine >= 0.9999
    for batch in (images, images[:1], images[1:2]):  # bright and dark
        with torch.no_grad():
            expected = net(batch)
        np.testing.assert_allclose(session.run(None, {"images": batch.numpy()})[0], expected, atol=1e-4)


def test_the_file_says_where_keypoints_come_from(exported):
    metadata = read_metadata(exported.path)
    assert metadata["keypoint_source"] == "dfa" and float(metadata["dfa_threshold"]) == SCORE_THRESHOLD
    assert "found by the built-in aligner" in metadata["keypoint_convention"]


@pytest.mark.slow
def test_two_inputs_take_keypoints_from_outside(net, images, tmp_path):
    report = export_onnx(net, tmp_path / "two.onnx")
    assert report.inputs == ("images", "keypoints") and report.metadata["keypoint_source"] == "input"
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    keypoints = template_keypoints(4) + 0.1
    got = session.run(None, {"images": images.numpy(), "keypoints": keypoints.numpy()})[0]
    np.testing.assert_allclose(got, net(images, keypoints).detach(), atol=1e-4)


@pytest.mark.slow
def test_compiles_to_the_same_numbers(net, images):
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), net(images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_aligner_goes_into_the_pack_too(net, tmp_path):
    """Where it refines the detector's landmarks after register()."""
    detector = export_detector(net.dfa, tmp_path / "detector.onnx")
    folder = model_pack.build(recognition=net, detector=detector, root=tmp_path)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.onnx")}
    assert files == {"detection.onnx", "recognition.onnx", "keypoints/recognition.onnx", "keypoints/dfa.onnx"}
    assert read_metadata(folder / "recognition.onnx")["keypoint_source"] == "dfa"
    images = example_inputs(4, 112)[0]
    session = onnxruntime.InferenceSession(folder / "recognition.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net.eval()(images)
    np.testing.assert_allclose(session.run(None, {"images": images.numpy()})[0], expected.numpy(), atol=1e-4)
    assert read_metadata(folder / "keypoints" / "recognition.onnx")["keypoint_source"] == "input"


def test_the_stock_loader_takes_the_file(exported):
    from insightface_kprpe.packs.routing import stock_route

    route = stock_route(exported.path)
    assert (route.task, route.input_mean, route.input_std, route.outputs) == ("recognition", 127.5, 127.5, 1)
