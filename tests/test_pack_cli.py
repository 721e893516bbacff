"""``pack`` from weights to an installed pack, and what can be done with it then."""

import json
import shutil

import cv2
import numpy as np
import onnx
import pytest
import tiny_packs as tiny
import torch
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.data.synthetic import verification_pairs
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.deployment import installed_packs, pack_sources, precision
from insightface_kprpe.deployment.model_pack import build
from insightface_kprpe.packs import layout
from insightface_kprpe.packs.layout import PackError
from insightface_kprpe.packs.metadata import add_metadata, read_metadata
from insightface_kprpe.packs.routing import stock_route

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def write_detector(path):
    """A file in SCRFD's layout for pictures of 64 x 64 that never finds a face."""
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes, outputs = [], []
    for columns in (1, 4, 10):
        for anchors in (128, 32, 8):
            name, shape = f"out_{columns}_{anchors}", (anchors, columns)
            zeros = helper.make_tensor(name, floats, shape, np.zeros(shape, np.float32).ravel())
            nodes.append(helper.make_node("Constant", [], [name], name=name, value=zeros))
            outputs.append(helper.make_tensor_value_info(name, floats, shape))
    image = helper.make_tensor_value_info("image", floats, (1, 3, 64, 64))
    model = helper.make_model(
        helper.make_graph(nodes, "detector", [image], outputs),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    onnx.save(model, str(path))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A training run, a detector in a pack of someone else's, a verification set, and the pack made of them."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    net = ik.get_model("vit_n_kprpe", num_features=16, **TINY)
    torch.nn.init.normal_(net.keypoint_linear.weight)
    config = {"network": "vit_n_kprpe", "network_kwargs": TINY, "embedding_size": 16}
    (folder / "run").mkdir()
    torch.save(net.state_dict(), folder / "run" / "model.pt")
    (folder / "run" / "config.json").write_text(json.dumps(config))
    (folder / "root" / "models" / "buffalo_x").mkdir(parents=True)
    detector = folder / "root" / "models" / "buffalo_x" / "det.onnx"
    write_detector(detector)
    images, is_same, _ = verification_pairs(10, 60, first_identity=50)
    jpegs = [cv2.imencode(".jpg", image[..., ::-1])[1].tobytes() for image in images]
    write_verification_bin(folder / "drawn.bin", jpegs, is_same)
    arguments = ["--recognition", folder / "run", "--detector", "buffalo_x", "--root", folder / "root"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "FPRS", (0.1, 0.01))
        result = call("pack", *arguments, "--evaluate", folder / "drawn.bin", "--licence", "MIT")
    return folder, result


@pytest.fixture
def pack(made, tmp_path):
    """A copy of the pack, to be spoilt."""
    return shutil.copytree(made[0] / "root" / "models" / "kprpe", tmp_path / "models" / "kprpe")


def test_the_manifest_says_what_every_file_is(made):
    folder, result = made
    files = json.loads((folder / "root" / "models" / "kprpe" / "pack.json").read_text())["files"]
    assert set(files) == {"detection.onnx", "recognition.onnx", "keypoints/recognition.onnx"}
    detector = files["detection.onnx"]
    assert detector["source"] == "buffalo_x/det.onnx"
    assert detector["licence"] == pack_sources.INSIGHTFACE_LICENCE and detector["architecture"] == "SCRFD"
    for name in ("recognition.onnx", "keypoints/recognition.onnx"):
        record = files[name]
        assert record["source"] == str(folder / "run") and record["licence"] == "MIT"
        assert "ViT with KPRPE (5 keypoints, 2 tables): 1 layers, width 32" in record["architecture"]
        assert (record["colour_order"], record["mean"], record["std"]) == ("RGB", "127.5", "127.5")
        assert set(record["evaluation"]["thresholds"]) == {"0.1"}  # 30 negatives cannot tell of 0.01
        assert record["evaluation"]["pairs"] == 60
    assert "left eye" in files["keypoints/recognition.onnx"]["keypoint_convention"]
    assert "at FPR 0.1\n" in result.output
    assert f"FaceAnalysis(name='kprpe', root='{folder / 'root'}')" in result.output


def test_thresholds_are_those_of_unmirrored_embeddings(made):
    from insightface_kprpe.data.verification_pairs import open_verification

    folder, _ = made
    file = folder / "root" / "models" / "kprpe" / "recognition.onnx"
    record = json.loads(read_metadata(file)["evaluation"])
    pairs = open_verification(str(folder / "drawn.bin"))
    vectors = precision.measure(file, pairs).embeddings
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = (vectors[0::2] * vectors[1::2]).sum(1)
    accepted = scores[~pairs.is_same] >= record["thresholds"]["0.1"] - 1e-6
    assert accepted.sum() == 3  # of 30


def test_inspect_and_load_note(made, caplog):
    folder, _ = made
    result = call("pack", "inspect", "kprpe", "--root", folder / "root")
    for part in ("recognition.onnx (", "RGB, (pixel - 127.5) / 127.5", "licence      MIT", "cosine "):
        assert part in result.output
    result = call("pack", "inspect", folder / "root" / "models" / "buffalo_x")
    assert "not built by this package" in result.output and "det.onnx: detection (SCRFD)" in result.output
    note = layout.load_note(folder / "root" / "models" / "kprpe" / "keypoints" / "recognition.onnx")
    assert note.startswith("kprpe/keypoints/recognition.onnx: ViT with KPRPE") and note.endswith("licence MIT")
    assert layout.load_note(folder / "root" / "models" / "buffalo_x" / "det.onnx") is None
    with pytest.raises(FileNotFoundError, match="pack not found: absent .* which holds buffalo_x, kprpe; --root"):
        call("pack", "inspect", "absent", "--root", folder / "root")
    with pytest.raises(FileNotFoundError, match="which holds none"):
        call("pack", "inspect", "absent", "--root", folder)


def test_verify_finds_what_is_wrong(made, pack):
    assert "files unchanged, taken as intended, and working" in call("pack", "verify", pack).output
    add_metadata(pack / "recognition.onnx", {"licence": "changed"})
    for added in ("added.onnx", "keypoints/extra.onnx"):
        shutil.copy(pack / "detection.onnx", pack / added)
    (pack / "keypoints" / "recognition.onnx").unlink()
    with pytest.raises(ValueError) as error:
        call("pack", "verify", pack)
    for part in ("added.onnx was added", "keypoints/extra.onnx was added", "recognition.onnx has changed"):
        assert part in str(error.value)
    assert "keypoints/recognition.onnx is missing" in str(error.value)
    assert "\nkeypoints/recognition.onnx (missing)\n" in call("pack", "inspect", pack).output


def test_verify_runs_every_file(pack):
    """Files that are whole, but not what the pack takes them for."""
    manifest = json.loads((pack / "pack.json").read_text())
    shutil.copy(pack / "detection.onnx", pack / "recognition.onnx")
    manifest["files"]["recognition.onnx"]["sha256"] = manifest["files"]["detection.onnx"]["sha256"]
    (pack / "pack.json").write_text(json.dumps(manifest))
    assert installed_packs.verify(pack) == [
        "recognition.onnx does not work: InsightFace takes it for detection, not recognition"
    ]
    (pack / "pack.json").write_text('{"files": {"detection.onnx": {}}}')
    with pytest.raises(PackError, match="is damaged"):
        installed_packs.verify(pack)


def test_remove_deletes_packs_of_this_package_only(made, pack):
    (pack / "notes.txt").write_text("mine")
    with pytest.raises(PackError, match=r"also holds notes\.txt"):
        call("pack", "remove", pack)
    (pack / "notes.txt").unlink()
    assert "removed" in call("pack", "remove", "kprpe", "--root", pack.parents[1]).output
    assert not pack.exists()
    other = made[0] / "root" / "models" / "buffalo_x"
    with pytest.raises(PackError, match="not built by this package"):
        call("pack", "remove", other)
    assert (other / "det.onnx").is_file()


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["recognition.onnx", "keypoints/recognition.onnx"])
def test_lower_precisions_are_smaller_and_close(pack, tmp_path, form, name):
    out = tmp_path / "low.onnx"
    try:
        change, measured = precision.lower_precision(pack / name, out, form)
    except precision.PrecisionError as error:
        if "make no valid file" in str(error) and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
            pytest.skip("this exporter's files are beyond onnxruntime's converters")
        raise
    assert precision.MINIMAL_COSINE[form] <= change.minimal_cosine <= change.mean_cosine <= 1 + 1e-6
    assert change.minimal_cosine < 1 and abs(change.accuracy - change.accuracy_fp32) <= 3
    assert len(measured.embeddings) == 200 and out.stat().st_size < (pack / name).stat().st_size
    model = onnx.load(str(out))
    floats = onnx.TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {floats}
    assert read_metadata(out)["inputs"] == read_metadata(pack / name)["inputs"]
    if name == "recognition.onnx":
        route = stock_route(out)
        assert (route.task, route.input_mean, route.input_std) == ("recognition", 127.5, 127.5)


def test_a_precision_that_changes_too_much_is_refused(pack, tmp_path, monkeypatch):
    monkeypatch.setitem(precision.MINIMAL_COSINE, "int8", 0.9999999)
    with pytest.raises(precision.PrecisionError, match=r"in int8: .*(use a higher|update)"):
        precision.lower_precision(pack / "recognition.onnx", tmp_path / "low.onnx", "int8")
    assert not (tmp_path / "low.onnx").exists()
    with pytest.raises(ValueError, match="precision must be fp16 or int8 to lower it, got 'fp32'"):
        precision.lower_precision(pack / "recognition.onnx", tmp_path / "low.onnx", "fp32")
    with pytest.raises(ValueError, match="precision must be fp32, fp16 or int8, got 'int4'"):
        call("pack", "absent", "--detector", "absent", "--precision", "int4")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What would be built, without the time that exports take."""
    calls = []

    def build(net, *args, **kwargs):
        calls.append((net, *args, kwargs))
        return tmp_path

    monkeypatch.setattr(pack_sources, "build_from_network", build)
    monkeypatch.setattr(pack_sources, "export_detector", lambda net, path, licence: path.write_bytes(b"") and path)
    monkeypatch.setattr(pack_sources, "add_metadata", lambda path, entries: None)
    return calls


def test_the_first_argument_may_name_the_weights(made, asked, tmp_path, caplog):
    run, detector = made[0] / "run", made[0] / "root" / "models" / "buffalo_x" / "det.onnx"
    call("pack", run, "--detector", detector, "--name", "x", "--root", tmp_path, "--precision", "fp16")
    net, path, name, root, licence, detector_licence, aligner, options = asked[0]
    assert (path, name, root, aligner, options["precision"]) == (detector, "x", tmp_path, None, "fp16")
    assert licence == detector_licence == "unknown" and options["origin"]["source"] == str(run)
    assert net.keypoint_linear.num_keypoints == 5
    assert f"loading {run}" in caplog.messages  # what takes long is said
    for arguments in ([], [run, "--recognition", run]):
        with pytest.raises(ValueError, match="recognition weights once"):
            call("pack", "build", *arguments, "--detector", detector)


def test_the_aligner_may_be_the_detector(made, asked, tmp_path):
    run = made[0] / "run"
    torch.save(ik.DFA().state_dict(), tmp_path / "dfa.pt")
    call("pack", "--recognition", run, "--aligner", tmp_path / "dfa.pt", "--detector", "dfa", "--root", tmp_path)
    _, detector, *_, aligner, options = asked[0]
    assert detector.name == "aligner.onnx" and aligner is None and options["detector_source"] == "the aligner"
    with pytest.raises(PackError, match="detector dfa needs the DFA: give it with --aligner"):
        call("pack", "--recognition", run, "--detector", "dfa")
    with pytest.raises(PackError, match="recognition must be a recognition network, .* is a DFA"):
        call("pack", "--recognition", tmp_path / "dfa.pt", "--detector", "dfa")
    with pytest.raises(PackError, match="aligner must be a DFA, .* is a ViT"):
        call("pack", "--recognition", run, "--aligner", run, "--detector", "dfa")


def test_detectors_of_installed_packs_are_found_by_name(made, tmp_path, monkeypatch):
    root = made[0] / "root"
    (tmp_path / "models" / "other").mkdir(parents=True)
    shutil.copy(root / "models" / "kprpe" / "recognition.onnx", tmp_path / "models" / "other")
    found = pack_sources.find_detector("buffalo_x", root)
    assert found.path.name == "det.onnx" and "non-commercial" in found.licence
    found = pack_sources.find_detector("kprpe", root)
    assert (found.path.name, found.licence) == ("detection.onnx", pack_sources.INSIGHTFACE_LICENCE)
    other = tmp_path / "models" / "other"
    tiny.write_aligner(other / "dfa.onnx")  # in a detector's layout, and smaller than one
    tiny.write_recognition(other / "keypoints" / "dfa.onnx", with_keypoints=False)
    with pytest.raises(PackError, match="holds no face detector with landmarks"):
        pack_sources.find_detector("other", tmp_path)
    tiny.write_detector(other / "zoo" / "det.onnx")
    assert pack_sources.find_detector("other", tmp_path).source == "other/zoo/det.onnx"
    with pytest.raises(PackError, match=r"does not exist; give an ONNX file"):
        pack_sources.find_detector("no/such.onnx", tmp_path)
    with pytest.raises(PackError, match="not installed.*offline"):
        pack_sources.find_detector("buffalo_l", tmp_path, offline=True)


def test_the_detector_of_a_pack_with_an_aligner(tmp_path):
    source = tiny.write_pack(tmp_path, "source", aligner=True)
    parts = [source / name for name in ("recognition.onnx", "detection.onnx", "keypoints/recognition.onnx")]
    folder = build(*parts, "ours", tmp_path, aligner=source / "keypoints" / "dfa.onnx")
    assert (folder / "keypoints" / "dfa.onnx").stat().st_size < (folder / "detection.onnx").stat().st_size
    assert pack_sources.find_detector("ours", tmp_path).path == folder / "detection.onnx"
    crops = build(parts[0], source / "keypoints" / "dfa.onnx", name="crops", root=tmp_path)
    files = {
        name: json.loads((path / "pack.json").read_text())["files"] for name, path in (("o", folder), ("c", crops))
    }
    assert [files[pack]["detection.onnx"]["architecture"] for pack in "oc"] == ["SCRFD", "DFA"]


@pytest.mark.parametrize("name", ["absent.bin", "README.md", "synthetic"])
def test_a_verification_set_that_is_none(tmp_path, name):
    (tmp_path / "README.md").write_text("a page")
    with pytest.raises(PackError, match=rf"evaluate must be a verification set \(a \.bin file\), .*{name}"):
        call("pack", "absent", "--detector", "absent", "--evaluate", tmp_path / name)


def test_insightface_fetches_packs_that_are_not_installed(made, tmp_path, monkeypatch):
    from insightface.utils import storage

    source = made[0] / "root" / "models" / "buffalo_x"
    fetched = []

    def ensure_available(sub_dir, name, root):
        fetched.append((sub_dir, name, root))
        shutil.copytree(source, tmp_path / sub_dir / name)

    monkeypatch.setattr(storage, "ensure_available", ensure_available)
    assert pack_sources.find_detector("buffalo_s", tmp_path).source == "buffalo_s/det.onnx"
    assert fetched == [("models", "buffalo_s", str(tmp_path))]

    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(storage, "ensure_available", fail)
    with pytest.raises(RuntimeError, match=r"could not fetch its pack buffalo_l \(no route to host\)"):
        pack_sources.find_detector("buffalo_l", tmp_path)
