import hashlib
import json
import os
import subprocess
import sys

import cv2
import insightface
import numpy as np
import onnx
import pytest
import torch
from insightface.app import FaceAnalysis

import insightface_kprpe as ik
from insightface_kprpe.app import recognizer
from insightface_kprpe.deployment import model_pack
from insightface_kprpe.deployment.detector_export import export_detector
from insightface_kprpe.deployment.onnx_export import export_onnx
from insightface_kprpe.dfa.network import RetinaFaceNet
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS, align_face
from insightface_kprpe.packs import routing

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
    model_pack.build(folder / "one.onnx", folder / "detector.onnx", folder / "two.onnx", root=tmp_path)
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


def test_registered_recogniser_gets_the_faces_keypoints(files, root, picture, registered):
    net, _ = files
    app = FaceAnalysis(name="kprpe", root=str(root), **CPU)
    app.prepare(ctx_id=-1)
    recogniser = app.models["recognition"]
    assert isinstance(recogniser, recognizer.KeypointRecognizer)
    face = a_face()
    embedding = recogniser.get(picture, face)
    crop, keypoints = align_face(picture, face.kps)
    assert face.embedding is embedding
    np.testing.assert_allclose(embedding, embed(net, crop, keypoints), atol=1e-5)
    assert np.abs(embedding - embed(net, crop, CANONICAL_KEYPOINTS)).max() > 2e-4
    batch = recogniser.get_feat([crop, crop[:, ::-1].copy()])
    np.testing.assert_allclose(batch[0], embed(net, crop, CANONICAL_KEYPOINTS), atol=1e-3)
    with pytest.raises(ValueError, match=r"face\.kps"):
        recogniser.get(picture, insightface.app.common.Face(bbox=face.bbox))


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
    model_pack.build(folder / "one.onnx", folder / "detector.onnx", root=tmp_path, name="plain")
    app = FaceAnalysis(name="plain", root=str(tmp_path), **CPU)
    assert type(app.models["recognition"]).__name__ == "ArcFaceONNX"


def renamed(source, target, operator):
    model = onnx.load(str(source))
    for node, name in zip(model.graph.node[:2], ("Sub", "Mul"), strict=True):
        node.name = f"{name}_{operator}"
    onnx.save(model, str(target))
    return target


@pytest.mark.parametrize(
    ("recognition", "detector", "twin", "message"),
    [
        ("two.onnx", "detector.onnx", None, "one input and one output.*image_only=True"),
        ("detector.onnx", "detector.onnx", None, "got 1 and 9"),
        ("one.onnx", "one.onnx", None, "no SCRFD-style detector"),
        ("one.onnx", "absent.onnx", None, "does not exist"),
        ("one.onnx", "garbage.onnx", None, "must be an ONNX file"),
        ("one.onnx", "detector.onnx", "one.onnx", "inputs images and keypoints, got images"),
        ("sub_mul.onnx", "detector.onnx", None, "mean 0.0 and std 1.0 because of the node names"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(files, tmp_path, recognition, detector, twin, message):
    _, folder = files
    (folder / "garbage.onnx").write_bytes(b"no model")
    renamed(folder / "one.onnx", folder / "sub_mul.onnx", 0)
    with pytest.raises(model_pack.PackError, match=message):
        model_pack.build(folder / recognition, folder / detector, twin and folder / twin, root=tmp_path)
    assert not (tmp_path / "models").exists() or not list((tmp_path / "models").iterdir())


def test_a_detector_without_landmarks_is_refused(files, tmp_path):
    model = onnx.load(str(files[1] / "detector.onnx"))
    del model.graph.output[6:]
    onnx.save(model, str(tmp_path / "boxes.onnx"))
    with pytest.raises(model_pack.PackError, match="gives no landmarks"):
        model_pack.build(files[1] / "one.onnx", tmp_path / "boxes.onnx", root=tmp_path)


def test_someone_elses_pack_is_not_overwritten(files, root, tmp_path):
    _, folder = files
    other = tmp_path / "models" / "buffalo_l"
    other.mkdir(parents=True)
    with pytest.raises(model_pack.PackError, match="was not built by this package"):
        model_pack.build(folder / "one.onnx", folder / "detector.onnx", root=tmp_path, name="buffalo_l")
    with pytest.raises(model_pack.PackError, match="plain folder name"):
        model_pack.build(folder / "one.onnx", folder / "detector.onnx", root=tmp_path, name="../x")
    model_pack.build(folder / "one.onnx", folder / "detector.onnx", root=root)  # our own is replaced


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
    model_pack.build(folder / "one.onnx", shared / "data" / "models" / "scrfd_2.5g_kps.onnx", root=tmp_path)
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
