"""``pack`` from weights to an installed pack, and what can be done with it then."""

import json
import shutil

import cv2
import numpy as np
import onnx
import pytest
import tiny_packs as tiny
import torch
from insightface.app import FaceAnalysis
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli, files
from insightface_kprpe.data.synthetic import verification_pairs
from insightface_kprpe.data.verification_bin import write_verification_bin
from insightface_kprpe.deployment import installed_packs, model_pack, pack_sources, precision
from insightface_kprpe.deployment.model_pack import build
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS
from insightface_kprpe.packs import layout
from insightface_kprpe.packs.layout import PackError
from insightface_kprpe.packs.metadata import add_metadata, read_metadata
from insightface_kprpe.packs.routing import stock_model, stock_route

TINY = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 28}


def call(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)


def write_detector(path):
    """A file in SCRFD's layout for images of 64 x 64 that never finds a face."""
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
    (folder / "root" / "models" / "buffalo_x" / "cut.onnx").write_bytes(b"cut")
    result = call("pack", "inspect", folder / "root" / "models" / "buffalo_x")
    (folder / "root" / "models" / "buffalo_x" / "cut.onnx").unlink()
    assert "cut.onnx: could not be loaded by onnxruntime" in result.output
    assert "not built by this package" in result.output and "det.onnx: detection (SCRFD)" in result.output
    note = layout.load_note(folder / "root" / "models" / "kprpe" / "keypoints" / "recognition.onnx")
    assert note.startswith("kprpe/keypoints/recognition.onnx: ViT with KPRPE") and note.endswith("licence MIT")
    assert layout.load_note(folder / "root" / "models" / "buffalo_x" / "det.onnx") is None
    with pytest.raises(FileNotFoundError, match="pack not found: absent .* which holds buffalo_x, kprpe; use --root"):
        call("pack", "inspect", "absent", "--root", folder / "root")
    with pytest.raises(FileNotFoundError, match="which holds none"):
        call("pack", "inspect", "absent", "--root", folder)


def test_verify_finds_what_is_wrong(made, pack):
    assert "files unchanged, loaded as intended, and working" in call("pack", "verify", pack).output
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
        "recognition.onnx does not work: InsightFace loads it as detection, not recognition"
    ]
    record = {"sha256": "", "source": "", "licence": ""}
    for text in (
        '{"files": {"detection.onnx": {}}}', "{", "[]", '{"name": "x"}', '{"name": "x", "files": []}', "[" * 10_000,
        '{"name": "x", "files": {"a.onnx": 1}}', '{"name": "x", "files": {"a.onnx": {"sha256": 1}}}', "\xff",
        json.dumps({"name": "x", "files": {"../other/a.onnx": record}}),
        json.dumps({"name": "x", "files": {"/etc/passwd": record}}),
        json.dumps({"name": "x", "files": {"a.onnx": record | {"evaluation": {"thresholds": {"x": 1}}}}}),
        json.dumps({"name": "x", "files": {"a.onnx": record | {"change": [1]}}}),
        json.dumps({"name": "x", "files": {"a.onnx": record | {"colour_order": 1}}}),
    ):  # fmt: skip
        (pack / "pack.json").write_bytes(text.encode("latin-1"))
        for use in (installed_packs.verify, installed_packs.describe, installed_packs.remove):
            with pytest.raises(PackError, match=r"pack\.json is damaged"):
                use(pack)


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


def test_a_removal_that_is_killed_leaves_no_half_pack(pack, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(installed_packs.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        installed_packs.remove(pack)
    monkeypatch.undo()
    assert not pack.exists()
    with files.atomic_folder(pack):  # as the next build does
        pass
    assert [path.name for path in pack.parent.glob(f".{pack.name}*")] == []


@pytest.mark.parametrize("form", ["fp16", "int8"])
@pytest.mark.parametrize("name", ["recognition.onnx", "keypoints/recognition.onnx"])
def test_lower_precisions_are_smaller_and_close(pack, tmp_path, form, name):
    out = tmp_path / "low.onnx"
    try:
        change, measured = precision.lower_precision(pack / name, out, form)
    except precision.PrecisionError as error:
        if "do not produce a valid file" in str(error) and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
            pytest.skip("this exporter's files are beyond onnxruntime's converters")
        raise
    assert precision.MINIMAL_COSINE[form] <= change.minimal_cosine <= change.mean_cosine <= 1 + 1e-6
    assert change.minimal_cosine < 1 and abs(change.accuracy - change.accuracy_fp32) <= 0.075
    assert len(measured.embeddings) == 80 and out.stat().st_size < (pack / name).stat().st_size
    model = onnx.load(str(out))
    floats = onnx.TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {floats}
    assert read_metadata(out)["inputs"] == read_metadata(pack / name)["inputs"]
    if name == "recognition.onnx":
        route = stock_route(out)
        assert (route.task, route.input_mean, route.input_std) == ("recognition", 127.5, 127.5)


def test_values_that_overflow_half_precision_are_refused_with_advice(tmp_path, monkeypatch):
    """On a CPU onnxruntime computes it in float32 after all: a file that overflows there, too, stands in."""
    source = tiny.write_recognition(tmp_path / "net.onnx", with_keypoints=False)

    def overflow(source, target):
        model = onnx.load(str(source))
        for stored in model.graph.initializer:
            if stored.name == "color":
                values = onnx.numpy_helper.to_array(stored) * np.float32(np.inf)
                stored.CopyFrom(onnx.numpy_helper.from_array(values, "color"))
        onnx.save(model, str(target))

    monkeypatch.setitem(precision.WRITERS, "fp16", overflow)
    with pytest.raises(precision.PrecisionError, match=r"net\.onnx in fp16: .*not finite; .* overflow .*; use int8"):
        precision.lower_precision(source, tmp_path / "half.onnx", "fp16")
    assert not (tmp_path / "half.onnx").exists()


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
    """What would be installed, with hand-made files in place of exported ones, which take time."""
    calls = []

    def export_onnx(net, path, image_only=False, licence="unknown", metadata=None):
        calls.append((net, licence, metadata))
        add_metadata(tiny.write_recognition(path, with_keypoints=True), metadata)

    def install(name, folder, files):
        calls.append((name, folder, {key: (found.path.name, *found[1:]) for key, found in files.items()}))
        return folder

    monkeypatch.setattr(model_pack, "export_onnx", export_onnx)
    monkeypatch.setattr(model_pack, "export_detector", lambda net, path, licence: tiny.write_aligner(path))
    monkeypatch.setattr(model_pack, "install", install)
    monkeypatch.setattr(installed_packs, "describe", lambda folder: f"{folder}: built")
    return calls


def test_the_first_argument_may_name_the_weights(made, asked, tmp_path, caplog):
    run, detector = made[0] / "run", made[0] / "root" / "models" / "buffalo_x" / "det.onnx"
    call("pack", run, "--detector", detector, "--name", "x", "--root", tmp_path, "--detector-licence", "MIT")
    (net, licence, facts), (name, folder, files) = asked
    assert (name, folder, licence) == ("x", tmp_path / "models" / "x", "unknown")
    assert facts["source"] == str(run) and net.keypoint_linear.num_keypoints == 5
    assert files == {
        "detection.onnx": ("det.onnx", "det.onnx", "MIT"),
        "recognition.onnx": ("image_only.onnx", "the network", "unknown"),
        "keypoints/recognition.onnx": ("recognition.onnx", "the network", "unknown"),
    }
    assert f"loading {run}" in caplog.messages  # what takes long is said, and how long it took
    assert any(message.startswith("exporting the network with its keypoints") for message in caplog.messages)
    assert any(message.endswith(" s") for message in caplog.messages)
    for arguments in ([], [run, "--recognition", run]):
        with pytest.raises(ValueError, match="recognition weights exactly once"):
            call("pack", "build", *arguments, "--detector", detector)


def test_the_aligner_may_be_the_detector(made, asked, tmp_path):
    run = made[0] / "run"
    torch.save(ik.DFA().state_dict(), tmp_path / "dfa.pt")
    call("pack", "--recognition", run, "--aligner", tmp_path / "dfa.pt", "--detector", "dfa", "--root", tmp_path)
    files = asked[-1][2]
    assert files["detection.onnx"] == ("dfa.onnx", "the aligner", "unknown") and "keypoints/dfa.onnx" not in files
    with pytest.raises(PackError, match="detector dfa needs a DFA: give one with --aligner"):
        call("pack", "--recognition", run, "--detector", "dfa")
    with pytest.raises(PackError, match="recognition must be a recognition network, .* is a DFA"):
        call("pack", "--recognition", tmp_path / "dfa.pt", "--detector", "dfa")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--aligner", "{run}"], "aligner must be a DFA, .* is a ViT"),
        (["--aligner", "{det}"], "aligner must be a DFA exported as a detector, .*det.onnx is not"),
        (["--aligner", "absent.onnx"], "absent.onnx"),
        (["--aligner", "absent"], "absent"),
        (["--root", "{det}"], "root must be a folder, but .*det.onnx is a file"),
        (["--root", "{det}/deeper"], "root must be a folder, but .*det.onnx is a file"),
        (["--with", "genderage"], r"\(--with\) and extra_pack \(--from\) go together"),
        (["--with", "age", "--from", "{packs}/buffalo_x"], "extra tasks must be of genderage, .*got 'age'"),
        (["--with", "genderage", "--from", "{packs}/buffalo_x"], "has no model for genderage; it has"),
        (["--with", "genderage", "--from", "no/pack"], "extra_pack no/pack does not exist; give an InsightFace pack"),
        (["--evaluate", "{short}"], "evaluate .*short.bin: it must hold at least 10 pairs"),
        (
            ["--evaluate", "{alike}"],
            "evaluate .*alike.bin: it must hold pairs of the same person and of different people",
        ),
        (["--evaluate", "{cut}"], "evaluate .*cut.bin: .*image 5"),
    ],
)
def test_what_cannot_be_built_is_refused_before_the_export(made, asked, tmp_path, arguments, message):
    images, is_same, _ = verification_pairs(8, 20, first_identity=10**6)
    encoded = [cv2.imencode(".jpg", image)[1].tobytes() for image in images]
    cut = [data[:60] if i == 5 else data for i, data in enumerate(encoded)]
    write_verification_bin(tmp_path / "short.bin", encoded[:8], [True, False] * 2)
    write_verification_bin(tmp_path / "alike.bin", encoded, [True] * 20)
    write_verification_bin(tmp_path / "cut.bin", cut, is_same)
    packs = made[0] / "root" / "models"
    places = {"run": made[0] / "run", "packs": packs, "det": packs / "buffalo_x" / "det.onnx"}
    places |= {name: tmp_path / f"{name}.bin" for name in ("short", "alike", "cut")}
    arguments = [argument.format(**places) for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call("pack", places["run"], "--detector", places["det"], *arguments)
    assert asked == []


def write_attributes(path):
    """What InsightFace takes for a model of gender and age: the mean colors of the face."""
    helper = onnx.helper
    nodes = [
        helper.make_node("GlobalAveragePool", ["data"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["fc1"]),
    ]
    return tiny.save(path, nodes, {"data": ["batch", 3, 96, 96]}, {"fc1": ["batch", 3]}, {})


def test_models_of_other_tasks_come_from_another_pack(made, tmp_path):
    root = tmp_path / "root"
    source = root / "models" / "buffalo_l"
    write_attributes(source / "genderage.onnx")
    tiny.write_detector(source / "det_10g.onnx")
    recognition = tiny.write_recognition(tmp_path / "w600k.onnx", with_keypoints=True)
    result = call(
        "pack", recognition, "--detector", "buffalo_l", "--with", "genderage", "--from", "buffalo_l", "--root", root
    )
    assert "genderage.onnx (" in result.output
    record = json.loads((root / "models" / "kprpe" / "pack.json").read_text())["files"]["genderage.onnx"]
    assert record["task"] == "genderage" and record["source"] == "buffalo_l/genderage.onnx"
    assert record["licence"] == pack_sources.INSIGHTFACE_LICENCE
    app = FaceAnalysis(name="kprpe", root=str(root), **tiny.CPU)
    assert set(app.models) == {"detection", "recognition", "genderage"}
    app.prepare(ctx_id=-1, det_size=(256, 256))
    (face,) = app.get(tiny.draw_picture([(10, 10)]))
    assert face.gender in (0, 1) and isinstance(face.age, int)
    assert installed_packs.verify(root / "models" / "kprpe") == []
    assert installed_packs.rebuild_command(root / "models" / "kprpe").split("--with")[1].split()[:3] == [
        "genderage", "--from", "buffalo_l",
    ]  # fmt: skip


def test_an_arcface_onnx_file_can_be_the_recognition_model(made, tmp_path):
    det = made[0] / "root" / "models" / "buffalo_x" / "det.onnx"
    plain = tiny.write_recognition(tmp_path / "w600k.onnx", with_keypoints=False, ours=False)
    folder = build(recognition=plain, detector=det, root=tmp_path / "r")
    record = json.loads((folder / "pack.json").read_text())["files"]
    assert set(record) == {"detection.onnx", "recognition.onnx"}
    assert record["recognition.onnx"]["source"] == "w600k.onnx"
    # The form without keypoints is made from the one with them, and gets the template's.
    two = tiny.write_recognition(tmp_path / "two.onnx", with_keypoints=True)
    folder = build(recognition=two, detector=det, root=tmp_path / "r")
    image = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    model = stock_model(folder / "recognition.onnx")
    expected = tiny.embedding_of(image, CANONICAL_KEYPOINTS)
    np.testing.assert_allclose(model.get_feat([image, image]), [expected] * 2, atol=1e-3)


def test_a_lower_precision_is_written_once_and_measured_on_the_form_with_keypoints(made, tmp_path):
    det = made[0] / "root" / "models" / "buffalo_x" / "det.onnx"
    run = made[0] / "root" / "models" / "kprpe" / "keypoints" / "recognition.onnx"
    try:
        folder = build(recognition=run, detector=det, root=tmp_path, precision="fp16")
    except precision.PrecisionError as error:
        if "do not produce a valid file" in str(error) and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
            pytest.skip("this exporter's files are beyond onnxruntime's converters")
        raise
    files = json.loads((folder / "pack.json").read_text())["files"]
    one, two = files["recognition.onnx"], files["keypoints/recognition.onnx"]
    assert one["precision"] == two["precision"] == "fp16" and one["onnxruntime"] == ">= 1.17"
    assert two["change"]["pairs"] == "40 drawn pairs" and two["change"]["minimal_cosine"] >= 0.999
    assert "evaluation" not in one and one["keypoint_convention"].startswith("none: faces must be aligned")
    assert "left eye" in two["keypoint_convention"]
    assert "--precision fp16" in installed_packs.rebuild_command(folder)


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
    with pytest.raises(PackError, match="has no face detector with landmarks"):
        pack_sources.find_detector("other", tmp_path)
    tiny.write_detector(other / "zoo" / "det.onnx")
    assert pack_sources.find_detector("other", tmp_path).source == "other/zoo/det.onnx"
    with pytest.raises(PackError, match=r"does not exist; give an ONNX file"):
        pack_sources.find_detector("no/such.onnx", tmp_path)
    with pytest.raises(PackError, match="not installed.*offline"):
        pack_sources.find_detector("buffalo_l", tmp_path, offline=True)


def test_the_detector_of_a_pack_with_an_aligner(tmp_path):
    source = tiny.write_pack(tmp_path, "source", aligner=True)
    one, two, dfa = (source / name for name in ("recognition.onnx", "keypoints/recognition.onnx", "keypoints/dfa.onnx"))
    folder = build(recognition=two, detector=source / "detection.onnx", name="ours", root=tmp_path, aligner=dfa)
    assert (folder / "keypoints" / "dfa.onnx").stat().st_size < (folder / "detection.onnx").stat().st_size
    assert pack_sources.find_detector("ours", tmp_path).path == folder / "detection.onnx"
    crops = build(recognition=one, detector=dfa, name="crops", root=tmp_path)
    files = {
        name: json.loads((path / "pack.json").read_text())["files"] for name, path in (("o", folder), ("c", crops))
    }
    assert [files[pack]["detection.onnx"]["architecture"] for pack in "oc"] == ["SCRFD", "DFA"]


@pytest.mark.parametrize("name", ["absent.bin", "README.md", "synthetic"])
def test_a_verification_set_that_is_none(tmp_path, name):
    (tmp_path / "README.md").write_text("a page")
    with pytest.raises(PackError, match=rf"evaluate must be an existing verification set \(a \.bin file\), .*{name}"):
        call("pack", "absent", "--detector", "absent", "--root", tmp_path, "--evaluate", tmp_path / name)


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
    with pytest.raises(RuntimeError, match=r"could not download its pack buffalo_l \(no route to host\)"):
        pack_sources.find_detector("buffalo_l", tmp_path)
