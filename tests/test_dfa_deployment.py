import json

import cv2
import insightface
import numpy as np
import pytest
import torch
from insightface.app import FaceAnalysis
from insightface.app.common import Face
from typer.testing import CliRunner

import insightface_kprpe as ik
from insightface_kprpe import cli
from insightface_kprpe.app.aligner import MIN_SIDE, AlignedCrops, FaceAligner
from insightface_kprpe.data.synthetic import SyntheticFaces, draw_scene
from insightface_kprpe.deployment import detector_export, model_pack
from insightface_kprpe.deployment.detector_export import OneFaceLayout, export_detector
from insightface_kprpe.deployment.onnx_export import ExportError, export_onnx
from insightface_kprpe.dfa import DFA, RetinaFaceNet
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, align_face
from insightface_kprpe.packs.metadata import read_metadata

CPU = {"providers": ["CPUExecutionProvider"]}


class Facing(DFA):
    """Untrained, but its landmarks are a face that turns and moves with what the network says."""

    def _read_face(self, *heads):
        keypoints, bbox, _ = super()._read_face(*heads)
        # what an untrained network says hardly differs from image to image: look at that little through a magnifier
        keypoints = self.template.to(keypoints) + 0.1 * torch.tanh(50 * (keypoints - 0.53))
        return keypoints, bbox, keypoints.mean((1, 2)) + 0.3


@pytest.fixture(scope="module")
def dfa():
    torch.manual_seed(0)
    return Facing().eval()


@pytest.fixture(scope="module")
def file(dfa, tmp_path_factory):
    return export_detector(dfa, tmp_path_factory.mktemp("dfa") / "dfa.onnx", licence="MIT")


@pytest.fixture(scope="module")
def stock(file):
    detector = insightface.model_zoo.get_model(str(file), **CPU)
    detector.prepare(-1, det_thresh=0.0)
    return detector


@pytest.fixture
def registered():
    ik.register()
    yield
    ik.unregister()


@pytest.fixture
def aligner(file, registered):
    aligner = insightface.model_zoo.get_model(str(file), **CPU)
    aligner.prepare(-1)
    return aligner


def crop(width, height, index=0):
    """A drawn face, BGR."""
    size = max(width, height)
    image = np.ascontiguousarray(SyntheticFaces(9, 1, aligned=False, size=size)[index][0][..., ::-1])
    left, top = (size - width) // 2, (size - height) // 2
    return image[top : top + height, left : left + width]


def torch_says(dfa, image):
    """Landmarks and box in pixels, and score."""
    tensor = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        face = dfa(tensor)
    scale = np.array(image.shape[1::-1])
    return face.keypoints[0].numpy() * scale, face.bbox[0].numpy() * np.tile(scale, 2), face.score.item()


@pytest.mark.parametrize("size", [(160, 160), (112, 112), (192, 192), (80, 160), (160, 96), (320, 200)])
def test_the_stock_detector_finds_what_torch_finds(stock, dfa, size):
    image = crop(*size)
    boxes, landmarks = stock.detect(image)
    expected, bbox, score = torch_says(dfa, image)
    assert type(stock).__name__ == "SCRFD" and boxes.shape == (1, 5) and landmarks.shape == (1, 5, 2)
    tolerance = 0.5 * max(size) / 160  # half a pixel of what the network sees
    np.testing.assert_allclose(landmarks[0], expected, atol=tolerance)
    np.testing.assert_allclose(boxes[0, :4], bbox, atol=tolerance)
    assert boxes[0, 4] == pytest.approx(score, abs=0.01)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((160, 160, 3), np.uint8),
        np.full((100, 80, 3), 255, np.uint8),
        np.full((1, 1, 3), 130, np.uint8),
        np.pad(np.full((60, 60, 3), 90, np.uint8), ((20, 20), (0, 40), (0, 0))),
        crop(112, 112)[:, 50:60],
        cv2.resize(crop(112, 112), (4, 4), interpolation=cv2.INTER_AREA),
        cv2.resize(crop(112, 112), (4, 3), interpolation=cv2.INTER_AREA),
    ],
    ids=["black", "white", "one pixel", "framed gray", "sliver", "4x4", "4x3"],
)
def test_the_stock_detector_finds_nothing_where_nothing_is(stock, image):
    boxes, landmarks = stock.detect(image)
    assert boxes.shape == (0, 5) and landmarks.shape == (0, 5, 2)


def scrfd_input(*images):
    return torch.from_numpy(np.stack(images)[..., ::-1].copy()).permute(0, 3, 1, 2).sub(127.5).div(128)


def test_what_the_loader_moves_to_the_corner_is_seen_in_the_middle(dfa):
    layout = OneFaceLayout(dfa)
    face = cv2.resize(crop(160, 160), (96, 160))
    corner, middle, behind = (np.zeros((160, 160, 3), np.uint8) for _ in range(3))
    corner[:, :96], middle[:, 32:128], behind[:, 64:] = face, face, face
    with torch.no_grad():
        points = layout(scrfd_input(corner, middle, behind))[6][:, 0].view(3, 5, 2) * 8
    torch.testing.assert_close(points[0] + torch.tensor([32, 0]), points[1])
    assert not torch.allclose(points[2], points[1] + torch.tensor([32, 0]), atol=0.1)  # the loader does not do that


def test_one_anchor_has_the_face_and_all_others_none(dfa):
    with torch.no_grad():
        outputs = OneFaceLayout(dfa)(scrfd_input(crop(160, 160), np.zeros((160, 160, 3), np.uint8)))
    assert [tuple(value.shape) for value in outputs] == [
        (2, anchors, size) for size in (1, 4, 10) for anchors in (800, 200, 50)
    ]
    scores = torch.cat(outputs[:3], 1)
    assert (scores[0] >= 0).sum() == 1 and scores[0, 0] > 0 and (scores[1] < 0).all()


def test_blurred_faces_have_detail_and_smears_have_none(shared):
    """The limits in has_detail, on real faces."""
    from insightface_kprpe.data.face_dataset import open_faces

    faces = open_faces(shared / "data" / "faces" / "rec")
    images = [faces[i][0].permute(1, 2, 0).numpy() for i in range(0, len(faces), 60)]
    whole = torch.zeros(len(images), 2, dtype=torch.int64), torch.full((len(images), 2), 160)

    def share_with_detail(change):
        batch = np.stack([cv2.resize(change(image), (160, 160)) for image in images])
        return detector_export.has_detail(scrfd_input(*batch), *whole).float().mean()

    def shrink(side):
        return lambda image: cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)

    assert share_with_detail(lambda image: image) == 1
    assert share_with_detail(shrink(20)) == 1
    assert share_with_detail(lambda image: cv2.GaussianBlur(image, (0, 0), 2.8)) == 1
    assert share_with_detail(shrink(4)) == 0


def test_the_file_says_what_it_is(file):
    metadata = read_metadata(file)
    assert metadata["task"] == "detection" and metadata["detector"] == "dfa"
    assert metadata["keypoint_source"] == "dfa" and metadata["licence"] == "MIT"


def test_networks_that_do_not_fit_the_layout_are_refused(dfa, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="net must be a DFA, or a RetinaFaceNet with aggregator=False"):
        export_detector(RetinaFaceNet(), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="multiple of 32"):
        export_detector(DFA(image_size=150), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"net\.float\(\) first"):
        export_detector(DFA().half(), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match=r"must be a .*RetinaFaceNet or derive from it, got Linear"):
        export_detector(torch.nn.Linear(3, 3), tmp_path / "net.onnx")
    monkeypatch.setattr(detector_export, "save_graph", lambda *args: args[2].write_bytes(b""))
    monkeypatch.setattr(detector_export, "_difference", lambda *args: 0.7)
    with pytest.raises(ExportError, match=r"differ from torch by 0\.70 pixels"):
        export_detector(dfa, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_register_gives_an_aligner_that_is_a_detector_too(aligner, stock):
    assert isinstance(aligner, FaceAligner) and aligner.taskname == "detection"
    image = crop(112, 112)
    for model in (aligner, stock):
        model.prepare(-1, det_thresh=0.0)
    for found, expected in zip(aligner.detect(image), stock.detect(image), strict=True):
        np.testing.assert_array_equal(found, expected)
    for height, width in ((0, 0), (0, 50), (50, MIN_SIDE - 1)):
        boxes, landmarks = aligner.detect(crop(112, 112)[:height, :width])
        assert boxes.shape == (0, 5) and landmarks.shape == (0, 5, 2)


def test_align_gives_batches_of_what_torch_gives(aligner, dfa):
    crops = [crop(112, 112), crop(90, 141, 1), crop(240, 160, 2), crop(160, 160, 3), crop(37, 30, 4)]
    found = aligner.align(crops, batch_size=2)
    assert isinstance(found, AlignedCrops)
    assert [value.shape for value in found] == [(5, 5, 2), (5,), (5, 4), (5, 112, 112, 3), (5, 5, 2)]
    assert [value.dtype for value in found] == [np.float32, np.float32, np.float32, np.uint8, np.float32]
    for i, image in enumerate(crops):
        keypoints, bbox, score = torch_says(dfa, image)
        scale = np.array(image.shape[1::-1])
        np.testing.assert_allclose(found.keypoints[i] * scale, keypoints, atol=0.01)
        np.testing.assert_allclose(found.bbox[i] * np.tile(scale, 2), bbox, atol=0.01)
        assert found.score[i] == pytest.approx(score, abs=1e-4)
        aligned, aligned_keypoints = align_face(image, keypoints)
        assert np.abs(found.aligned[i].astype(int) - aligned).mean() < 0.1
        np.testing.assert_allclose(found.aligned_keypoints[i], aligned_keypoints, atol=1e-4)


def test_align_has_a_row_for_every_crop(aligner):
    found = aligner.align(
        [crop(112, 112), np.zeros((0, 0, 3), np.uint8), crop(112, 112)[:3, :5], np.zeros((50, 50, 3), np.uint8)]
    )
    assert (found.score > 0).tolist() == [True, False, False, False]
    np.testing.assert_allclose(found.keypoints[[1, 3]], np.stack([CANONICAL_KEYPOINTS] * 2), atol=1e-6)
    assert (found.bbox[1:] == [0, 0, 1, 1]).all() and (found.aligned[[1, 3]] == 0).all()
    assert all(np.isfinite(value).all() for value in found)
    assert [value.shape[0] for value in aligner.align([])] == [0] * 5


@pytest.mark.parametrize(
    "bad",
    [np.zeros((112, 112), np.uint8), np.zeros((112, 112, 3), np.float32), "face.jpg"],
    ids=["gray", "float", "path"],
)
def test_bad_crops_are_refused(aligner, bad):
    with pytest.raises(ValueError, match=r"crops must be a list of \(H, W, 3\) uint8 BGR arrays"):
        aligner.align([bad])


def a_picture():
    scene = draw_scene([1, 2], (300, 400), face_size=(90, 120), instance=3)
    faces = [
        Face(bbox=np.array(box, np.float32), kps=points, det_score=0.9)
        for box, points in zip(scene.boxes, scene.landmarks_px, strict=True)
    ]
    return np.ascontiguousarray(scene.image[..., ::-1]), faces


def test_refine_looks_at_the_padded_box(aligner, dfa):
    picture, faces = a_picture()
    aligner.refine(picture, faces)
    for face in faces:
        side = 1.2 * (face.bbox[2:] - face.bbox[:2]).max()
        corner = (face.bbox[:2] + face.bbox[2:] - side) / 2
        matrix = np.array([[160 / side, 0, -corner[0] * 160 / side], [0, 160 / side, -corner[1] * 160 / side]])
        expected, _, score = torch_says(dfa, cv2.warpAffine(picture, matrix, (160, 160)))
        np.testing.assert_allclose(face.dfa_kps, expected * side / 160 + corner, atol=0.1)
        assert face.dfa_score == pytest.approx(score, abs=0.01) and isinstance(face.dfa_score, float)
    alone = Face(bbox=faces[0].bbox)
    assert aligner.get(picture, alone) is alone.dfa_kps
    np.testing.assert_allclose(alone.dfa_kps, faces[0].dfa_kps, atol=0.01)


@pytest.mark.parametrize("bbox", [[10, 10, 13, 60], [900, 900, 990, 999], [-300, -300, -200, -200]])
def test_boxes_without_a_face_get_score_zero(aligner, bbox):
    face = Face(bbox=np.array(bbox, np.float32))
    aligner.refine(a_picture()[0], [face])
    center = (face.bbox[:2] + face.bbox[2:]) / 2
    assert face.dfa_score == 0 and np.abs(face.dfa_kps.mean(0) - center).max() < 30


@pytest.fixture(scope="module")
def recognition(tmp_path_factory):
    """A tiny KPRPE network in its two forms."""
    folder = tmp_path_factory.mktemp("recognition")
    torch.manual_seed(0)
    net = ik.VisionTransformer(
        embed_dim=32, depth=1, num_heads=2, mlp_ratio=2, num_features=16, patch_size=28, position="kprpe"
    ).eval()
    torch.nn.init.normal_(net.keypoint_linear.weight)
    export_onnx(net, folder / "one.onnx", image_only=True)
    export_onnx(net, folder / "two.onnx")
    return net, folder


def embed(net, image, keypoints):
    images = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return net(images, torch.tensor(keypoints)[None]).detach().numpy()[0]


def test_a_pack_with_dfa_as_detector_serves_crops_without_plugin(recognition, file, dfa, tmp_path, caplog):
    net, folder = recognition
    model_pack.build(recognition=folder / "one.onnx", detector=file, root=tmp_path, name="crops")
    assert "outputs with a batch dimension, which insightface before 1.0.1 cannot read" in caplog.text
    manifest = json.loads((tmp_path / "models" / "crops" / "pack.json").read_text())
    assert manifest["files"]["detection.onnx"]["insightface"] == ">= 1.0.1"
    app = FaceAnalysis(name="crops", root=str(tmp_path), **CPU)
    app.prepare(ctx_id=-1, det_size=(640, 640), det_thresh=0.1)
    assert type(app.det_model).__name__ == "SCRFD"
    for index in range(3):
        image = crop(112, 112, index)
        (face,) = app.get(image)
        landmarks, _, _ = torch_says(dfa, image)
        np.testing.assert_allclose(face.kps, landmarks, atol=0.35)
        aligned, _ = align_face(image, face.kps)
        np.testing.assert_allclose(face.embedding, embed(net, aligned, CANONICAL_KEYPOINTS), atol=1e-3)
    assert app.get(np.zeros((112, 112, 3), np.uint8)) == []


@pytest.fixture
def refining(recognition, file, tmp_path, registered):
    """FaceAnalysis with a pack whose keypoints DFA refines."""
    _, folder = recognition
    pack = model_pack.build(recognition=folder / "two.onnx", detector=file, root=tmp_path, aligner=file)
    assert (pack / "keypoints" / "dfa.onnx").is_file()
    app = FaceAnalysis(name="kprpe", root=str(tmp_path), **CPU)
    app.prepare(ctx_id=-1)
    return app


def test_a_pack_can_refine_the_detectors_keypoints(recognition, refining, monkeypatch):
    net, _ = recognition
    recognizer = refining.models["recognition"]
    assert isinstance(recognizer.aligner, FaceAligner)
    picture, (face, other) = a_picture()
    for threshold, kind in ((0.0, "dfa_kps"), (1.0, "kps")):
        monkeypatch.setattr("insightface_kprpe.app.recognizer.SCORE_THRESHOLD", threshold)
        embedding = recognizer.get(picture, face)
        np.testing.assert_allclose(embedding, embed(net, *align_face(picture, face[kind])), atol=1e-3)
    boxed = Face(bbox=other.bbox)  # of a detector that gives no landmarks
    embedding = recognizer.get(picture, boxed)
    np.testing.assert_allclose(embedding, embed(net, *align_face(picture, boxed.dfa_kps)), atol=1e-3)


def test_without_registration_the_same_pack_is_stock(refining, tmp_path):
    ik.unregister()
    app = FaceAnalysis(name="kprpe", root=str(tmp_path), **CPU)
    assert {name: type(model).__name__ for name, model in app.models.items()} == {
        "detection": "SCRFD", "recognition": "ArcFaceONNX",
    }  # fmt: skip


def test_an_aligner_must_be_a_dfa_and_of_use(recognition, file, tmp_path):
    _, folder = recognition
    one, two = folder / "one.onnx", folder / "two.onnx"
    with pytest.raises(model_pack.PackError, match="aligner must be a DFA exported as a detector"):
        model_pack.build(recognition=two, detector=file, root=tmp_path, aligner=one)
    with pytest.raises(model_pack.PackError, match="keypoints, which this recognition model does not take"):
        model_pack.build(recognition=one, detector=file, root=tmp_path, aligner=file)


def test_command_line_export_knows_a_landmark_network(tmp_path, monkeypatch):
    torch.save(DFA().state_dict(), tmp_path / "dfa.pt")
    (tmp_path / "run").mkdir()
    torch.save(DFA().state_dict(), tmp_path / "run" / "model.pt")
    config = {"body": "mobilenet0.25", "aggregator": True, "image_size": 160}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    exported = []
    monkeypatch.setattr(detector_export, "export_detector", lambda net, path, licence: exported.append((net, licence)))
    for source in ("dfa.pt", "run"):
        arguments = ["export", str(tmp_path / source), str(tmp_path / "dfa.onnx"), "--licence", "MIT"]
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert "a detector for crops of one face" in result.output
    assert [(type(net), licence) for net, licence in exported] == [(DFA, "MIT")] * 2


@pytest.mark.slow
def test_the_reference_weights_through_the_stock_detector(golden, tmp_path):
    reference = golden("dfa.npz")
    dfa = DFA({key[6:]: torch.tensor(value) for key, value in reference.items() if key.startswith("state.")})
    detector = insightface.model_zoo.get_model(str(export_detector(dfa, tmp_path / "dfa.onnx")), **CPU)
    detector.prepare(-1, det_thresh=0.0)
    for index in range(4):
        image = crop(160, 160, index)
        boxes, landmarks = detector.detect(image)
        expected, bbox, score = torch_says(dfa.eval(), image)
        np.testing.assert_allclose(landmarks, expected[None], atol=0.5)
        np.testing.assert_allclose(boxes, np.append(bbox, score)[None], atol=0.5)
