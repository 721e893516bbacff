import hashlib
import json
import os
import subprocess
import sys

import cv2
import insightface
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from insightface.app import FaceAnalysis

import insightface_kprpe as ik
from insightface_kprpe.app import recognizer
from insightface_kprpe.deployment import installed_packs, model_pack, precision
from insightface_kprpe.deployment.detector_export import export_detector
from insightface_kprpe.deployment.onnx_export import export_onnx
from insightface_kprpe.dfa.network import RetinaFaceNet
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS, align_face
from insightface_kprpe.packs import routing
from insightface_kprpe.packs.metadata import minimal_runtime

CPU = {"providers": ["CPUExecutionProvider"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny network, its two ONNX forms, and an untrained detector."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    net = ik.VisionTransformer(
        embed_dim=32, depth=1, num_heads=2, mlp_ratio=2, num_features=16, patch_size=28, position="kprpe"
    ).eval()
    torch.nn.init.normal_(net.keypoint_linear.weight, std=100.0)  # a small move of a keypoint is to be seen
    export_onnx(net, folder / "one.onnx", image_only=True, licence="MIT")
    export_onnx(net, folder / "two.onnx")
    export_detector(RetinaFaceNet(aggregator=False, image_size=64), folder / "detector.onnx", licence="MIT")
    return net, folder


@pytest.fixture
def root(files, tmp_path):
    _, folder = files
    model_pack.build(recognition=folder / "two.onnx", detector=folder / "detector.onnx", root=tmp_path)
    return tmp_path


@pytest.fixture
def registered():
    ik.register()
    yield
    ik.unregister()


@pytest.fixture
def picture():
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8), (400, 300))


def a_face():
    landmarks = (ARCFACE_TEMPLATE_112 * 1.3 + (90, 60) + np.random.default_rng(1).normal(0, 8, (5, 2))).astype(
        np.float32
    )
    return insightface.app.common.Face(bbox=np.array([80, 50, 240, 220.0]), kps=landmarks, det_score=0.9)


def embed(net, crop, keypoints):
    images = torch.from_numpy(crop[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return net(images, torch.tensor(keypoints)[None]).detach().numpy()[0]


def test_pack_layout_and_manifest(root):
    folder = root / "models" / "kprpe"
    record = json.loads((folder / "pack.json").read_text())
    assert set(record["files"]) == {"detection.onnx", "recognition.onnx", "keypoints/recognition.onnx"}
    for name, entry in record["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == entry["sha256"]
    assert record["files"]["detection.onnx"]["licence"] == "MIT"


def test_stock_faceanalysis_loads_the_pack_and_embeds(files, root, picture):
    net, _ = files
    app = FaceAnalysis(name="kprpe", root=str(root), **CPU)
    app.prepare(ctx_id=-1)
    assert set(app.models) == {"detection", "recognition"}
    assert type(app.models["recognition"]).__name__ == "ArcFaceONNX"
    app.get(picture)  # an untrained detector finds what it likes
    face = a_face()
    embedding = app.models["recognition"].get(picture, face)
    crop, _ = align_face(picture, face.kps)
    np.testing.assert_allclose(embedding, embed(net, crop, CANONICAL_KEYPOINTS), atol=1e-3)


def test_registered_recognizer_gets_the_faces_keypoints(files, root, picture, registered):
    net, _ = files
    app = FaceAnalysis(name="kprpe", root=str(root), **CPU)
    app.prepare(ctx_id=-1)
    model = app.models["recognition"]
    assert isinstance(model, recognizer.KeypointRecognizer)
    face = a_face()
    embedding = model.get(picture, face)
    crop, keypoints = align_face(picture, face.kps)
    assert face.embedding is embedding
    np.testing.assert_allclose(embedding, embed(net, crop, keypoints), atol=1e-5)
    assert np.abs(embedding - embed(net, crop, CANONICAL_KEYPOINTS)).max() > 2e-4
    batch = model.get_feat([crop, crop[:, ::-1].copy()])
    np.testing.assert_allclose(batch[0], embed(net, crop, CANONICAL_KEYPOINTS), atol=1e-3)
    with pytest.raises(ValueError, match=r"face\.kps"):
        model.get(picture, insightface.app.common.Face(bbox=face.bbox))


def test_unregister_restores_the_stock_zoo(root):
    stock = insightface.model_zoo.model_zoo.get_model
    ik.register()
    ik.register()
    assert insightface.model_zoo.get_model is not stock
    ik.unregister()
    assert insightface.model_zoo.get_model is insightface.model_zoo.model_zoo.get_model is stock


def test_register_leaves_other_models_alone(files, registered):
    model = insightface.model_zoo.get_model(str(files[1] / "detector.onnx"), **CPU)
    assert type(model).__name__ == "SCRFD"


def test_a_pack_without_keypoint_twin_is_stock_also_when_registered(files, tmp_path, registered):
    _, folder = files
    model_pack.build(recognition=folder / "one.onnx", detector=folder / "detector.onnx", root=tmp_path, name="plain")
    app = FaceAnalysis(name="plain", root=str(tmp_path), **CPU)
    assert type(app.models["recognition"]).__name__ == "ArcFaceONNX"


def renamed(source, target, operator):
    model = onnx.load(str(source))
    for node, name in zip(model.graph.node[:2], ("Sub", "Mul"), strict=True):
        node.name = f"{name}_{operator}"
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize(
    ("recognition", "detector", "message"),
    [
        ("detector.onnx", "detector.onnx", "input images, or images and keypoints, got image and 9 outputs"),
        ("one.onnx", "one.onnx", "not an SCRFD-style detector"),
        ("one.onnx", "absent.onnx", r"absent\.onnx does not exist; give an ONNX file"),
        ("one.onnx", "garbage.onnx", r"garbage\.onnx could not be read as ONNX"),
        ("one.onnx", "cut.onnx", r"cut\.onnx could not be read as ONNX"),
        ("one.onnx", "empty.onnx", r"empty\.onnx could not be read as ONNX"),
        ("cut.onnx", "detector.onnx", r"cut\.onnx could not be read as ONNX"),
        ("sub_mul.onnx", "detector.onnx", "mean 0.0 and std 1.0 because of the node names"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(files, tmp_path, recognition, detector, message):
    _, folder = files
    (folder / "garbage.onnx").write_bytes(b"no model")
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.onnx").write_bytes((folder / "one.onnx").read_bytes()[:5000])
    renamed(folder / "one.onnx", folder / "sub_mul.onnx", 0)
    with pytest.raises(ValueError, match=message):
        model_pack.build(recognition=folder / recognition, detector=folder / detector, root=tmp_path)
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


def externalised(source, target):
    """The same model with its weights in a second file."""
    model = onnx.load(str(source))
    onnx.save(model, str(target), save_as_external_data=True, location=f"{target.name}.data", size_threshold=0)
    assert target.with_name(f"{target.name}.data").is_file()
    return target


def test_weights_in_a_second_file_come_into_the_pack(files, tmp_path, picture):
    _, folder = files
    parts = {
        "recognition": externalised(folder / "two.onnx", tmp_path / "two.onnx"),
        "detector": externalised(folder / "detector.onnx", tmp_path / "detector.onnx"),
    }
    pack = model_pack.build(**parts, root=tmp_path / "root")
    assert installed_packs.verify(pack) == []
    for path in tmp_path.glob("*.onnx*"):
        path.unlink()
    app = FaceAnalysis(name="kprpe", root=str(tmp_path / "root"), **CPU)
    app.prepare(ctx_id=-1)
    app.get(picture)


def without_operator(source, target):
    """A model whose last node asks for something that onnxruntime does not have."""
    model = onnx.load(str(source))
    model.graph.node[-1].op_type = "NoSuchOperator"
    onnx.save(model, str(target))
    return target


def test_a_pack_that_does_not_work_where_it_lies_is_not_published(files, tmp_path):
    _, folder = files
    parts = {"recognition": folder / "one.onnx", "detector": folder / "detector.onnx", "root": tmp_path / "root"}
    half = externalised(folder / "detector.onnx", tmp_path / "detector.onnx")
    (tmp_path / "detector.onnx.data").unlink()
    strange = without_operator(folder / "detector.onnx", tmp_path / "strange.onnx")
    for detector, message in (
        (half, r"detector\.onnx could not be read as ONNX"),
        (strange, r"strange\.onnx could not be loaded by onnxruntime"),
    ):
        with pytest.raises(ValueError, match=message):
            model_pack.build(**parts | {"detector": detector})
    parts["recognition"] = without_operator(folder / "one.onnx", tmp_path / "odd.onnx")
    with pytest.raises(
        model_pack.PackError, match=r"recognition\.onnx does not work: could not be loaded by onnxruntime"
    ):
        model_pack.build(**parts)
    assert list((tmp_path / "root").rglob("*.onnx")) == []


def test_what_the_files_need_to_run_is_low_and_is_said(root, caplog):
    files = json.loads((root / "models" / "kprpe" / "pack.json").read_text())["files"]
    for name, record in files.items():
        model = onnx.load(str(root / "models" / "kprpe" / name))
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        assert model.ir_version <= 8 and opsets[""] <= 18, name
        assert record["onnxruntime"] == ">= 1.14", name
        assert not any(node.metadata_props for node in model.graph.node)
    assert "insightface" not in files["detection.onnx"]


RUN_ELSEWHERE = """
import sys, numpy as np, onnxruntime
for path, values in zip(sys.argv[1::2], sys.argv[2::2]):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    values = np.load(values)
    feeds = {value.name: values[value.name] for value in session.get_inputs()}
    for name, got in zip([value.name for value in session.get_outputs()], session.run(None, feeds)):
        np.testing.assert_allclose(got, values[name], atol=1e-3)
print(onnxruntime.__version__)
"""


def test_the_oldest_runtime_gives_the_same_numbers(root, tmp_path):
    """With onnxruntime 1.14 in a Python of its own, as 1.14 is older than the Pythons and NumPys of today."""
    python = os.environ.get("KPRPE_OLD_PYTHON")
    if not python:
        pytest.skip("KPRPE_OLD_PYTHON names no Python with onnxruntime 1.14")
    folder = root / "models" / "kprpe"
    paths = [folder / name for name in ("detection.onnx", "recognition.onnx", "keypoints/recognition.onnx")]
    paths.append(tmp_path / "int8.onnx")
    precision.WRITERS["int8"](folder / "keypoints" / "recognition.onnx", paths[-1])
    arguments = []
    for number, path in enumerate(paths):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        sizes = [[size if isinstance(size, int) else 2 for size in value.shape] for value in session.get_inputs()]
        rng = np.random.default_rng(number)
        feeds = {
            value.name: rng.random(size, np.float32) for value, size in zip(session.get_inputs(), sizes, strict=True)
        }
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
        np.savez(tmp_path / f"{number}.npz", **feeds, **outputs)
        arguments += [str(path), str(tmp_path / f"{number}.npz")]
    result = subprocess.run(
        [python, "-c", RUN_ELSEWHERE, *arguments], capture_output=True, text=True, check=False, env={}
    )
    assert result.stdout.startswith("1.14"), result.stderr


def test_newer_files_say_what_they_need(files, tmp_path):
    precision.WRITERS["fp16"](files[1] / "one.onnx", tmp_path / "half.onnx")
    assert minimal_runtime(onnx.load(str(tmp_path / "half.onnx"))) == "1.17"
    model = onnx.load(str(files[1] / "one.onnx"))
    for version, ir, needed in (
        (18, 8, "1.14"),
        (18, 10, "1.18"),
        (20, 9, "1.17"),
        (21, 10, "1.18"),
        (99, 99, "unknown"),
    ):
        model.ir_version, model.opset_import[0].version = ir, version
        assert minimal_runtime(model) == needed


def test_a_detector_without_landmarks_is_refused(files, tmp_path):
    model = onnx.load(str(files[1] / "detector.onnx"))
    del model.graph.output[6:]
    onnx.save(model, str(tmp_path / "boxes.onnx"))
    with pytest.raises(model_pack.PackError, match="gives no landmarks"):
        model_pack.build(recognition=files[1] / "one.onnx", detector=tmp_path / "boxes.onnx", root=tmp_path)


def test_someone_elses_pack_is_not_overwritten(files, root, tmp_path):
    _, folder = files
    other = tmp_path / "models" / "buffalo_l"
    other.mkdir(parents=True)
    with pytest.raises(model_pack.PackError, match="was not built by this package"):
        model_pack.build(
            recognition=folder / "one.onnx", detector=folder / "detector.onnx", root=tmp_path, name="buffalo_l"
        )
    for blocked in (tmp_path / "file", tmp_path / "file" / "deeper"):
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(model_pack.PackError, match="root must be a folder, but .*file is a file"):
            model_pack.build(recognition=folder / "absent", detector=folder / "detector.onnx", root=blocked)
    with pytest.raises(model_pack.PackError, match="plain folder name"):
        model_pack.build(recognition=folder / "one.onnx", detector=folder / "detector.onnx", root=tmp_path, name="../x")
    model_pack.build(
        recognition=folder / "one.onnx", detector=folder / "detector.onnx", root=root
    )  # our own is replaced


def test_detector_export_decodes_as_the_network_does(files):
    """What insightface reads from the file is what the network says of its best anchor."""
    torch.manual_seed(0)
    net = RetinaFaceNet(aggregator=False, image_size=64).eval()
    export_detector(net, files[1] / "check.onnx")
    detector = routing.stock_model(files[1] / "check.onnx")
    detector.prepare(-1, det_thresh=0.0)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    boxes, points = detector.detect(image)
    with torch.no_grad():
        out = net(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1)
    best = boxes[:, 4].argmax()
    assert boxes[best, 4] == pytest.approx(out.score.item(), abs=1e-4)
    np.testing.assert_allclose(boxes[best, :4], out.bbox[0].numpy() * 64, atol=0.05)
    np.testing.assert_allclose(points[best], out.keypoints[0].numpy() * 64, atol=0.05)


@pytest.mark.slow
def test_faces_of_insightfaces_own_picture(files, shared, tmp_path):
    """SCRFD finds the six faces of t1 and the pack embeds them, without this package being imported."""
    _, folder = files
    detector = shared / "data" / "models" / "scrfd_2.5g_kps.onnx"
    model_pack.build(recognition=folder / "one.onnx", detector=detector, root=tmp_path)
    script = (
        "import cv2, os, sys, insightface\n"
        "from insightface.app import FaceAnalysis\n"
        f"app = FaceAnalysis(name='kprpe', root={str(tmp_path)!r}, providers=['CPUExecutionProvider'])\n"
        "app.prepare(ctx_id=-1)\n"
        "image = cv2.imread(os.path.join(os.path.dirname(insightface.__file__), 'data', 'images', 't1.jpg'))\n"
        "faces = app.get(image)\n"
        "assert 'insightface_kprpe' not in sys.modules\n"
        "print(len(faces), {face.embedding.shape for face in faces})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, cwd=tmp_path, check=False
    )
    assert "6 {(16,)}" in result.stdout, result.stderr
