"""Published weights, in folders written here as arcface_torch, CVLface and the Hugging Face Hub lay them out."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli, hub
from insightface_kprpe.backbones import registry
from insightface_kprpe.dfa.network import RetinaFaceNet
from insightface_kprpe.dfa.weights import load_dfa
from insightface_kprpe.inference.models import OnnxEmbedder, open_model
from insightface_kprpe.losses import ArcFace
from insightface_kprpe.packs.metadata import read_metadata
from insightface_kprpe.partial_fc import PartialFC
from insightface_kprpe.training.initialization import initialize
from insightface_kprpe.weights import architecture, cvlface
from insightface_kprpe.weights.network import load_run
from insightface_kprpe.weights.sources import convert, load_published

# The golden files' sizes, in place of CVLface's "base".
TINY = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 3.0, "num_features": 32}
COMMIT = "6530d73fb0af4d1d8287f31d559780c648ebd22a"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for suffix, position in (("", None), ("_irpe", "irpe"), ("_kprpe", "kprpe")):
        build = registry._vit({**TINY, "position": position})
        monkeypatch.setitem(registry._BACKBONES, f"tiny{suffix}", build)
    monkeypatch.setitem(registry._BACKBONES, "tiny_kprpe_dfa", registry._vit(TINY, registry.ViTWithDFA))
    monkeypatch.setitem(cvlface._SIZES, "base", "tiny")


def model_yaml(family="vit_kprpe", **changes):
    """What CVLface writes besides its weights."""
    content = {"input_size": [3, 112, 112], "color_space": "RGB", "name": "base", "output_dim": 32}
    content |= {"start_from": "", "freeze": False, "mask_ratio": 0.0}
    if family == "vit_kprpe":
        content["rpe_config"] = {
            "name": "KPRPE_shared", "rpe_on": "k", "shared_head": True, "mode": "ctx", "method": "product",
            "ratio": 1.9, "ctx_type": "rel_keypoint_splithead_unshared", "num_keypoints": 5,
        }  # fmt: skip
    content["yaml_path"] = f"models/{family}/configs/v1_base.yaml"
    return content | changes


def write_folder(folder, state, content):
    """A CVLface checkpoint: model.pt and model.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({f"net.{key}": value for key, value in state.items()}, folder / "model.pt")
    (folder / "model.yaml").write_text(yaml.safe_dump(content))
    return folder


def write_snapshot(folder, state, content):
    """A CVLface model of the Hub, with files that must not be touched."""
    (folder / "pretrained_model").mkdir(parents=True)
    save_file({f"model.net.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    (folder / "pretrained_model" / "model.yaml").write_text(yaml.safe_dump(content))
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["CVLFaceRecognitionModel"], "auto_map": {"AutoModel": "wrapper.X"}})
    )
    (folder / "wrapper.py").write_text("raise SystemExit('remote code was run')")
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# a model card\n")
    return folder


def golden_state(file):
    return {key[6:]: torch.tensor(value) for key, value in file.items() if key.startswith("state.")}


def random_net(name="tiny_kprpe", **kwargs):
    torch.manual_seed(0)
    net = ik.get_model(name, **kwargs).eval()
    if hasattr(net, "keypoint_linear"):
        torch.nn.init.normal_(net.keypoint_linear.weight)
    return net


def inputs():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 112, 112, generator=generator) * 2 - 1
    return images, torch.rand(2, 5, 2, generator=generator)


@pytest.mark.parametrize("layout", ["folder", "file", "snapshot"])
@pytest.mark.parametrize(
    ("name", "family"), [("vit.npz", "vit"), ("vit_irpe.npz", "vit_irpe"), ("kprpe_vit.npz", "vit_kprpe")]
)
def test_cvlface_layouts_give_the_reference_embeddings(golden, tmp_path, layout, name, family):
    file, images = golden(name), golden("kprpe_vit.npz")
    write = write_snapshot if layout == "snapshot" else write_folder
    source = write(tmp_path / "model", golden_state(file), model_yaml(family))
    source = source / "model.pt" if layout == "file" else source
    net, description = load_published(source)
    with torch.no_grad():
        embedding = net(torch.tensor(images["image"]).float(), torch.tensor(images["keypoints"]))
    torch.testing.assert_close(embedding, torch.tensor(file["embedding"]), atol=1e-4, rtol=1e-4)
    assert description.config["network"] == "tiny" + {"vit": ""}.get(family, family.removeprefix("vit"))
    assert description.licence == ("mit" if layout == "snapshot" else "unknown")
    assert "2 layers, width 64" in description.text() and "RGB" in description.text()


def test_the_reference_aligner_loads_as_a_dfa(golden, tmp_path):
    file = golden("dfa.npz")
    content = {"name": "differentiable_face_aligner", "arch": "mobile0.25", "input_size": 160, "output_size": 112}
    content |= {"input_padding_ratio": 0, "freeze": True, "start_from": ""}
    folder = write_snapshot(tmp_path / "dfa", golden_state(file), content)
    net, description = load_published(folder)
    assert isinstance(net, ik.DFA) and description.task == "aligner"
    with torch.no_grad():
        keypoints, score, _ = net.locate(torch.tensor(file["image"]).float())
    torch.testing.assert_close(score, torch.tensor(file["score"]).flatten(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(keypoints, torch.tensor(file["landmarks"]).view(-1, 5, 2), atol=1e-4, rtol=1e-4)
    again = load_dfa(convert(net, description, tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_landmark_networks_without_aggregator(tmp_path):
    """RetinaFace's weights say nothing of their pixels; a training run of this package does."""
    state = RetinaFaceNet(aggregator=False).state_dict()
    torch.save(state, tmp_path / "model.pt")
    net, description = load_published(tmp_path)
    assert description.architecture == "RetinaFace, mobilenet0.25, 160 pixels"
    assert not torch.equal(net.anchors, ik.DFA().anchors)
    with pytest.raises(ValueError, match=r"choose OUT\.safetensors"):
        convert(net, description, tmp_path / "out")
    again, _ = load_published(convert(net, description, tmp_path / "out.safetensors"))
    assert torch.equal(again.anchors, net.anchors)
    config = {"body": "mobilenet0.25", "aggregator": False, "image_size": 160}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net, description = load_published(tmp_path)
    assert torch.equal(net.anchors, ik.DFA().anchors) and description.config == config
    (tmp_path / "config.json").write_text(json.dumps(config | {"aggregator": True}))
    with pytest.raises(ValueError, match="aggregator True, but is a landmark network with .* no aggregator"):
        load_published(tmp_path)


def test_published_sizes_are_those_of_the_named_networks():
    """pretrained_model/model.pt of minchul/cvlface_adaface_vit_base_kprpe_webface12m has 460,381,841 bytes."""
    with torch.device("meta"):
        state = ik.get_model("cvlface_vit_b_kprpe").state_dict()
    tensors = sum(value.numel() * value.element_size() for value in state.values())
    per_tensor = (460_381_841 - tensors) / len(state)  # a name, a checksum, a place in the archive
    assert 100 < per_tensor < 500
    assert architecture.named_network(architecture.read_architecture(state)) == ("cvlface_vit_b_kprpe", {})


@pytest.mark.parametrize("name", ["tiny", "tiny_irpe", "tiny_kprpe"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_alone_are_recognized_by_their_shapes(tmp_path, name, suffix):
    source = random_net(name)
    path = tmp_path / f"model{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    net, description = load_published(path)
    assert description.config == {"network": name, "network_kwargs": {}, "embedding_size": 32}
    assert torch.equal(net(*inputs()), source(*inputs()))


@pytest.mark.parametrize("sharing", ["layers", "heads", "both"])
def test_sharing_of_tables_is_read_from_shapes_and_from_yaml(tmp_path, sharing):
    source = random_net(kprpe_sharing=sharing, num_keypoints=3)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    net, description = load_published(tmp_path)
    assert description.config["network_kwargs"] == {"num_keypoints": 3, "kprpe_sharing": sharing}
    assert torch.equal(net(*inputs()), source(*inputs()))
    names = {"layers": "rel_keypoint_splithead", "heads": "rel_keypoint_unshared", "both": "rel_keypoint"}
    content = model_yaml()
    content["rpe_config"] |= {"ctx_type": names[sharing], "num_keypoints": 3}
    net, _ = load_published(write_folder(tmp_path / "cvlface", source.state_dict(), content))
    assert torch.equal(net(*inputs()), source(*inputs()))


def test_a_network_without_named_size_needs_a_name(tmp_path, monkeypatch):
    net = ik.get_model("tiny", depth=3)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match='not a named size.*put a config.json next to it: .*"depth": 3'):
        load_published(tmp_path)
    with pytest.raises(ValueError, match="2 layers.*but is a ViT: 3 layers"):
        load_published(tmp_path, network="tiny")


@pytest.mark.parametrize("layout", ["folder", "snapshot", "conf"])
def test_load_weights_turns_bgr_weights_to_rgb(tmp_path, layout):
    source, images = random_net("tiny"), inputs()[0]
    content = model_yaml("vit", color_space="BGR")
    folder = (write_snapshot if layout == "snapshot" else write_folder)(tmp_path / "m", source.state_dict(), content)
    if layout == "conf":
        (folder / "model.yaml").unlink()
        (folder / "config.json").write_text(json.dumps({"conf": content}))
    file = folder / ("model.safetensors" if layout == "snapshot" else "model.pt")
    expected = source(images.flip(1))
    torch.testing.assert_close(ik.load_weights(random_net("tiny").eval(), file)(images), expected)
    torch.testing.assert_close(load_published(file, network="tiny")[0](images), expected)
    converted = convert(*load_published(file), folder / "converted.safetensors")  # RGB now, next to the same file
    torch.testing.assert_close(load_published(converted)[0](images), expected)


def test_bgr_weights_of_a_network_that_cannot_be_turned_are_refused(tmp_path):
    torch.save(ik.DFA().state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.yaml").write_text("color_space: BGR")
    with pytest.raises(ValueError, match="from a BGR network, according to .*model.yaml.*convert this one's"):
        ik.load_weights(ik.DFA(), tmp_path / "model.pt")


def test_bgr_weights_are_turned_to_rgb(tmp_path):
    source = random_net("tiny")
    images, _ = inputs()
    folder = write_folder(tmp_path / "bgr", source.state_dict(), model_yaml("vit", color_space="BGR"))
    net, description = load_published(folder)
    torch.testing.assert_close(net(images), source(images.flip(1)))
    assert "converted from BGR" in description.color_order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"yaml_path": "models/vit/configs/v1_base.yaml", "rpe_config": None},
            "tiny, a ViT: 2.*is a ViT with KPRPE",
        ),
        ({"output_dim": 512}, "embedding 512, but is a .*embedding 32; that is tiny_kprpe"),
        ({"name": "small"}, "cvlface_vit_s_kprpe, a .*12 layers.*but is a .*2 layers, width 64.*that is tiny_kprpe"),
        ({"name": "small", "yaml_path": "models/part_fvit/configs/v1_small.yaml"}, "a part_fvit network; of CVLface"),
        ({"yaml_path": "models/swin_kprpe/configs/v1_base.yaml"}, "a swin_kprpe network; of CVLface's"),
        ({"rpe_config": model_yaml()["rpe_config"] | {"ratio": 3.8}}, "ratio must be 1.9"),
        ({"rpe_config": model_yaml()["rpe_config"] | {"ctx_type": "keypoint"}}, "ctx_type must be one of"),
        (
            {"name": "differentiable_face_aligner", "arch": "mobile0.25", "input_size": 160},
            "claims to be an aligner.*ViT with KPRPE",
        ),
    ],
)
def test_a_yaml_that_does_not_fit_is_refused_with_what_the_file_is(tmp_path, changes, message):
    folder = write_folder(tmp_path / "m", random_net().state_dict(), model_yaml(**changes))
    with pytest.raises(ValueError, match=message):
        load_published(folder)


def test_a_config_that_makes_no_sense_is_refused(tmp_path):
    torch.save(random_net().state_dict(), tmp_path / "model.pt")
    for content, message in (
        ("{", "could not be read as JSON"),
        ("[]", "must hold an object, got list"),
        ('{"network": "tiny_kprp"}', "did you mean tiny_kprpe"),
        ('{"network": "tiny_kprpe", "network_kwargs": {"color": 1}}', "does not take these settings"),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_published(tmp_path)


def test_files_of_other_kinds_are_named(tmp_path):
    for state, message in (
        ({"layer1.0.prelu.weight": torch.zeros(1)}, "an arcface_torch IResNet.*pack accept any ArcFace ONNX file"),
        ({"state_dict": {"model.input_layer.0.weight": torch.zeros(1), "head.kernel": torch.zeros(2, 9)}}, "AdaFace"),
        ({"module.conv_sep.layers.0.weight": torch.zeros(1)}, "a MobileFaceNet, but not"),
        ({"weight": torch.zeros(10, 32)}, "class centers"),
        ({"first": torch.zeros(3)}, r"first \(3,\)"),
    ):
        torch.save(state, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=message):
            load_published(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="hf:OWNER/NAME"):
        load_published(tmp_path / "absent")
    (tmp_path / "run" / "checkpoints" / "best").mkdir(parents=True)
    torch.save({}, tmp_path / "run" / "checkpoints" / "best" / "model.pt")
    with pytest.raises(FileNotFoundError, match="did you mean .*best"):
        load_published(tmp_path / "run")


def test_settings_are_compared_with_the_weights_before_anything_is_built(tmp_path):
    torch.save(random_net().state_dict(), tmp_path / "model.pt")
    for changes, message in (
        ({"depth": 1_000_000}, "config.json|model.pt.*depth is 1000000, but the weights have 2"),
        ({"embed_dim": 65_536}, "embed_dim is 65536"),
        ({"img_size": 100_000}, "img_size is 100000"),
        ({"num_heads": 10**9}, "num_heads must be 1 to 64"),
        ({"mlp_ratio": 1e9}, "mlp_ratio is "),
        ({"drop_path_rate": "abc"}, "model.pt"),
    ):
        config = {"network": "tiny_kprpe", "network_kwargs": changes, "embedding_size": 32}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for load in (load_published, load_run):
            with pytest.raises(ValueError, match=message):
                load(tmp_path)
    for config, message in (
        ({"network": ["tiny"]}, "network must be of type str"),
        ({"network_kwargs": [1]}, "network_kwargs must be of type dict"),
        ({"embedding_size": 10**12}, "embedding_size must be a whole number from 1 to 65536"),
    ):
        whole = {"network": "tiny_kprpe", "network_kwargs": {}, "embedding_size": 32} | config
        (tmp_path / "config.json").write_text(json.dumps(whole))
        for load in (load_published, load_run):
            with pytest.raises(ValueError, match=f"config.json: {message}"):
                load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]), "10 aliases"),
        ("[" * 40 + "]" * 40, "30 levels"),
        ("a" * 100_000, "at most 64 KiB"),
        ("name: [", "could not be read as plain YAML"),
        ("? [a]\n: 1", "could not be read as plain YAML"),
        ("when: 2001-99-99", "could not be read as plain YAML"),
        ("name: [base]", "name .*base"),
        ("name: base\nrpe_config: abc", "rpe_config must be a mapping"),
        ("name: base\nrpe_config: {name: [1]}", "describes"),
        ("name: base\ncolor_space: [1]", "color_space must be RGB or BGR"),
    ],
)
def test_a_hostile_yaml_is_one_sentence_at_once(tmp_path, text, message):
    folder = write_folder(tmp_path / "m", random_net().state_dict(), model_yaml())
    (folder / "model.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)model.yaml.*{message}"):
        load_published(folder)


def test_a_damaged_header_of_converted_weights(tmp_path):
    for header, message in (("{", "could not be read as JSON"), ("[]", "object"), ('{"network": 1}', "of type str")):
        save_file(random_net().state_dict(), tmp_path / "net.safetensors", {"insightface_kprpe": header})
        with pytest.raises(ValueError, match=rf"net\.safetensors.*{message}"):
            load_published(tmp_path / "net.safetensors")


def test_a_custom_network_of_a_run(tmp_path, monkeypatch):
    class Mean(ik.backbones.Backbone):
        img_size, num_features = 112, 3

        def __init__(self, num_features=3):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(num_features))

        def forward(self, images, keypoints=None):
            return images.mean((2, 3)) * self.scale

    monkeypatch.setitem(registry._BACKBONES, "mean", Mean)
    torch.save({"scale": torch.arange(3.0)}, tmp_path / "model.pt")
    config = {"network": "mean", "network_kwargs": {}, "embedding_size": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    net, description = load_published(tmp_path)
    assert torch.equal(net.scale, torch.arange(3.0)) and description.architecture == "Mean, embedding 3"


def test_a_yaml_cannot_make_objects(tmp_path):
    folder = write_folder(tmp_path / "m", random_net().state_dict(), model_yaml())
    (folder / "model.yaml").write_text("!!python/object/apply:os.system ['echo executed']")
    with pytest.raises(ValueError, match="could not be read as plain YAML"):
        load_published(folder)


@pytest.mark.parametrize("out", ["net.safetensors", "run"])
def test_converted_weights_describe_themselves(tmp_path, out):
    source = random_net(kprpe_sharing="layers")
    content = model_yaml()
    content["rpe_config"]["ctx_type"] = "rel_keypoint_splithead"
    net, description = load_published(write_snapshot(tmp_path / "hub", source.state_dict(), content))
    path = convert(net, description, tmp_path / "out" / out)
    again, found = load_published(path)
    assert torch.equal(again(*inputs()), source(*inputs()))
    assert found.config == description.config and found.licence == "mit"
    if out == "run":
        assert torch.equal(load_run(path)(*inputs()), source(*inputs()))
        with pytest.raises(ValueError, match="must not exist"):
            convert(net, description, path)
        with pytest.raises(ValueError, match=r"must be NAME\.safetensors or a new folder.* got .*net\.pt"):
            convert(net, description, tmp_path / "net.pt")


class Hub:
    """Stands in for the Hub: one repository, of which only the files that are asked for arrive."""

    def __init__(self, repository, cache):
        self.repository, self.cache, self.calls = repository, cache, []

    def list_repo_files(self, repo_id, revision=None):
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]

    def snapshot_download(self, repo_id, *, allow_patterns, revision, cache_dir, local_files_only):
        self.calls.append((repo_id, revision, cache_dir, local_files_only))
        folder = self.cache / "snapshots" / COMMIT
        if local_files_only and not folder.is_dir():
            raise FileNotFoundError("Cannot find the requested files in the disk cache")
        for name in allow_patterns:
            if (self.repository / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((self.repository / name).read_bytes())
        return str(folder)


@pytest.fixture
def online(tmp_path, monkeypatch):
    import huggingface_hub

    stub = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
    return stub


def test_the_hub_gives_the_files_that_are_needed_and_no_code(online):
    source = random_net()
    write_snapshot(online.repository, source.state_dict(), model_yaml())
    torch.save({"unused": torch.zeros(1)}, online.repository / "pretrained_model" / "model.pt")
    net, description = load_published("hf:minchul/a_model@main", cache="some/cache")
    assert torch.equal(net(*inputs()), source(*inputs()))
    assert description.source == f"hf:minchul/a_model@{COMMIT}" and description.licence == "mit"
    assert online.calls == [("minchul/a_model", "main", "some/cache", False)]
    names = {str(path.relative_to(online.cache)) for path in online.cache.rglob("*") if path.is_file()}
    wanted = {"README.md", "config.json", "model.safetensors", "pretrained_model/model.yaml"}
    assert names == {f"snapshots/{COMMIT}/{name}" for name in wanted}


def test_the_hub_falls_back_to_model_pt_and_works_offline(online):
    source = random_net()
    write_folder(online.repository / "pretrained_model", source.state_dict(), model_yaml())
    with pytest.raises(
        RuntimeError, match="not in the cache, and --offline or HF_HUB_OFFLINE forbids the download.*run once without"
    ):
        load_published("hf:minchul/a_model", offline=True)
    load_published("hf:minchul/a_model")
    net, _ = load_published("hf:minchul/a_model", offline=True)
    assert online.calls[-1] == ("minchul/a_model", None, None, True)
    assert torch.equal(net(*inputs()), source(*inputs()))


@pytest.mark.parametrize("path", ["/base/weights.pt", "/base", "/base/", ""])
def test_the_hub_gives_files_of_other_names_in_sub_folders(online, path):
    source = random_net()
    (online.repository / "base").mkdir(parents=True)
    torch.save(source.state_dict(), online.repository / "base" / "weights.pt")
    (online.repository / "base" / "weights.onnx").write_bytes(b"unused")
    (online.repository / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    net, description = load_published(f"hf:someone/models{path}@v1")
    assert torch.equal(net(*inputs()), source(*inputs()))
    assert description.source == f"hf:someone/models/base/weights.pt@{COMMIT}"
    assert description.licence == "apache-2.0"
    assert {call[:2] for call in online.calls} == {("someone/models", "v1")}
    names = {path.name for path in online.cache.rglob("*") if path.is_file()}
    assert names == {"weights.pt", "README.md"}
    load_published(f"hf:someone/models{path}@v1", offline=True)


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        (["a/one.pt", "a/two.pth"], "hf:x/y/a", "holds 2 weights files: a/one.pt, a/two.pth; specify which one to use"),
        (["a/one.onnx"], "hf:x/y", "only ONNX files, which evaluate, embed and pack accept: a/one.onnx; specify"),
        (["readme.txt"], "hf:x/y", "holds no weights"),
        (["a/one.pt"], "hf:x/y/a/two.pt", "the repository has no a/two.pt"),
        (["a/one.pt"], "hf:x/y/../z", r"must be hf:OWNER/NAME\[/PATH\]\[@REVISION\]"),
    ],
)
def test_a_repository_without_a_clear_choice_says_what_to_name(online, files, source, message):
    for name in files:
        (online.repository / name).parent.mkdir(parents=True, exist_ok=True)
        (online.repository / name).write_bytes(b"x")
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match=message):
        load_published(source)


def test_the_only_weights_file_of_a_folder(tmp_path):
    source = random_net()
    torch.save(source.state_dict(), tmp_path / "backbone.pth")
    assert torch.equal(load_published(tmp_path)[0](*inputs()), source(*inputs()))
    save_file(source.state_dict(), tmp_path / "backbone.safetensors")  # the same in the other format
    load_published(tmp_path)
    torch.save(source.state_dict(), tmp_path / "ema.pth")
    with pytest.raises(ValueError, match=r"2 weights files: backbone\.safetensors, ema\.pth; specify which one to use"):
        load_published(tmp_path)
    with pytest.raises(ValueError, match="is an ONNX file, not weights; evaluate, embed, recognize and pack accept it"):
        load_published(tmp_path / "net.onnx")


def test_names_on_the_hub_are_understood_everywhere(online, tmp_path):
    source = random_net()
    write_snapshot(online.repository, source.state_dict(), model_yaml())
    images, keypoints = inputs()
    embed = open_model("hf:minchul/a_model@main")
    assert embed.name == "a_model@main"
    torch.testing.assert_close(embed(images, keypoints), source(images, keypoints).detach())
    match = initialize(random_net(), PartialFC(ArcFace(), 32, 4), "hf:minchul/a_model")
    assert match.fraction == 1
    result = CliRunner().invoke(
        cli.app, ["export", "hf:minchul/a_model", str(tmp_path / "a.onnx")], catch_exceptions=False
    )
    assert "images + keypoints -> embedding" in result.output
    assert read_metadata(tmp_path / "a.onnx")["licence"] == "mit"
    (tmp_path / "a.onnx").rename(online.repository / "net.onnx")
    assert isinstance(open_model("hf:minchul/a_model/net.onnx"), OnnxEmbedder)
    with pytest.raises(ValueError, match="names no such|hf:OWNER/NAME"):
        open_model("hf:minchul")


def test_aligners_on_the_hub(online):
    dfa = ik.DFA().eval()
    content = {"name": "differentiable_face_aligner", "arch": "mobile0.25", "input_size": 160}
    write_snapshot(online.repository, dfa.state_dict(), content)
    for name in ("hf:minchul/a_dfa", Path("hf:minchul/a_dfa")):
        torch.testing.assert_close(load_dfa(name).locate(images_of_faces()), dfa.locate(images_of_faces()))
    net = ik.get_model("tiny_kprpe_dfa", dfa_weights="hf:minchul/a_dfa")
    torch.testing.assert_close(net.dfa.locate(images_of_faces()), dfa.locate(images_of_faces()))


def images_of_faces():
    return torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_mistakes_with_the_hub_are_one_sentence(monkeypatch):
    import huggingface_hub

    with pytest.raises(ValueError, match="hf:OWNER/NAME"):
        load_published("hf:no-owner")

    def fail(*args, **kwargs):
        raise OSError("401 Client Error\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RuntimeError, match=r"hf:a/b could not be downloaded.*\(401 Client Error\); check the name"):
        load_published("hf:a/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match="hf:a/b is not in the cache.*HF_HUB_OFFLINE forbids"):
        load_published("hf:a/b")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"insightface-kprpe\[hf\]"):
        load_published("hf:a/b")
    assert hub.is_hub_source("hf:a/b") and hub.is_hub_source(Path("hf:a/b")) and not hub.is_hub_source("./hf:a/b")
