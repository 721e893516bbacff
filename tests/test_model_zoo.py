import copy
import os
import pickle
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_all_start_methods, get_context

import insightface
import numpy as np
import onnxruntime
import pytest
import tiny_packs as tiny
from insightface.app import FaceAnalysis
from insightface.app.common import Face

import insightface_kprpe as ik
from insightface_kprpe.app.aligner import FaceAligner
from insightface_kprpe.app.recognizer import KeypointRecognizer
from insightface_kprpe.evaluation.fusion import landmark_weights
from insightface_kprpe.geometry import ARCFACE_TEMPLATE_112, CANONICAL_KEYPOINTS, align_face
from insightface_kprpe.packs import providers
from insightface_kprpe.packs.metadata import add_metadata

MANIFESTS = tuple(int(part) for part in insightface.__version__.split(".")[:1]) >= (2,)
PICTURE = tiny.draw_picture([(5, 5), (14, 20), (25, 9)])


@pytest.fixture(autouse=True)
def registered():
    ik.register()
    yield
    ik.unregister()


def open_app(root, **settings):
    app = FaceAnalysis(name="tiny", root=str(root), **(tiny.CPU | settings))
    app.prepare(ctx_id=-1)
    return app


@pytest.fixture
def recognizer(tmp_path):
    tiny.write_pack(tmp_path)
    return open_app(tmp_path).models["recognition"]


def a_face(seed=1, **more):
    rng = np.random.default_rng(seed)
    landmarks = (ARCFACE_TEMPLATE_112 * 0.6 + (90, 60) + rng.normal(0, 4, (5, 2))).astype(np.float32)
    return Face(bbox=np.array([100, 70, 160, 150.0]), kps=landmarks, det_score=0.8, **more)


def test_quality_and_norm(recognizer):
    """Quality is Eq. 17 and 18 of the keypoints that the network saw."""
    face = a_face()
    embedding = recognizer.get(PICTURE, face)
    crop, keypoints = align_face(PICTURE, face.kps)
    np.testing.assert_allclose(embedding, tiny.embedding_of(crop, keypoints), rtol=1e-4, atol=1e-4)
    assert face.quality == pytest.approx(landmark_weights(keypoints[None], np.array([0.8]))[0], abs=1e-6)
    assert 0.3 < face.quality < 0.79
    assert face.embedding_norm == pytest.approx(np.linalg.norm(embedding), rel=1e-6)
    straight = Face(bbox=face.bbox, kps=ARCFACE_TEMPLATE_112 + 50, det_score=0.8)
    recognizer.get(PICTURE, straight)
    assert straight.quality == pytest.approx(0.8, abs=1e-4)
    unscored = Face(kps=ARCFACE_TEMPLATE_112 + 50)
    recognizer.get(PICTURE, unscored)
    assert unscored.quality == pytest.approx(1, abs=1e-4)


def test_unaligned_crops_are_the_boxes_square(tmp_path):
    tiny.write_pack(tmp_path)
    recognizer = open_app(tmp_path, aligned=False).models["recognition"]
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[40:152, 50:162] = np.random.default_rng(0).integers(0, 255, (112, 112, 3))
    # a box of 80x112 pixels: its square is exactly the noise
    points = ARCFACE_TEMPLATE_112 + np.float32([53, 43])
    face = Face(bbox=np.array([66.0, 40, 146, 152]), kps=points, det_score=0.5)
    embedding = recognizer.get(picture, face)
    expected = tiny.embedding_of(picture[40:152, 50:162], CANONICAL_KEYPOINTS + 3 / 112)
    np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-4)
    distance = np.hypot(3, 3) / 112
    assert face.quality == pytest.approx(0.5 * (0.2 - distance) / 0.2, abs=1e-5)


def test_unaligned_needs_a_model_with_keypoints(tmp_path):
    tiny.write_pack(tmp_path, twin=False)
    with pytest.raises(ValueError, match="aligned=False needs a recognition model with a keypoint input"):
        open_app(tmp_path, aligned=False)


@pytest.mark.parametrize(("score", "used"), [(0.9, "dfa_kps"), (0.3, "kps")])
def test_aligner_is_used_where_it_is_sure(tmp_path, score, used):
    folder = tiny.write_pack(tmp_path)
    tiny.write_aligner(folder / "keypoints" / "dfa.onnx", score)
    recognizer = open_app(tmp_path).models["recognition"]
    face = a_face()
    embedding = recognizer.get(PICTURE, face)
    crop, keypoints = align_face(PICTURE, face[used])
    np.testing.assert_allclose(embedding, tiny.embedding_of(crop, keypoints), rtol=1e-3, atol=1e-3)
    trusted = face.dfa_score if used == "dfa_kps" else 0.8
    assert face.quality == pytest.approx(landmark_weights(keypoints[None], np.array([trusted]))[0], abs=1e-5)


def test_files_mean_and_std_come_from_its_metadata(tmp_path, recognizer):
    """Also where the names of its first nodes look like normalization to InsightFace."""
    import onnx

    file = tmp_path / "models" / "tiny" / "keypoints" / "recognition.onnx"
    model = onnx.load(str(file))
    model.graph.node[0].name, model.graph.node[1].name = "Sub_0", "Mul_1"
    onnx.save(model, str(file))
    renamed = open_app(tmp_path).models["recognition"]
    assert (renamed.input_mean, renamed.input_std) == (127.5, 127.5)
    np.testing.assert_allclose(renamed.get(PICTURE, a_face()), recognizer.get(PICTURE, a_face()), atol=1e-5)
    for std in ("0", "x", "nan"):
        add_metadata(file, {"std": std})
        with pytest.raises(ValueError, match=r"recognition\.onnx does not say how to normalize its input"):
            open_app(tmp_path)


@pytest.mark.parametrize(
    ("picture", "face", "message"),
    [
        (PICTURE, None, "face must be insightface's Face, got None"),
        (None, a_face(), "image must be an array, got None; cv2.imread"),
        (PICTURE[:0], a_face(), "image must not be empty"),
        (PICTURE, Face(bbox=a_face().bbox), r"face\.kps must be \(5, 2\) landmarks, got None"),
        (PICTURE, Face(kps=np.full((5, 2), np.nan)), "finite pixels"),
        (PICTURE / 255, a_face(), "must be uint8"),
    ],
)
def test_what_cannot_be_embedded_is_said(recognizer, picture, face, message):
    with pytest.raises(ValueError, match=message):
        recognizer.get(picture, face)


@pytest.mark.parametrize("aligned", [True, False])
def test_pictures_larger_than_opencv_can_warp(recognizer, aligned):
    recognizer.aligned = aligned
    small = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    huge = np.zeros((200, 40_000, 3), np.uint8)
    huge[:, 39_000:39_300] = small
    near, far = a_face(), a_face()
    far.kps, far.bbox = far.kps + np.float32([39_000, 0]), far.bbox + np.array([39_000, 0, 39_000, 0])
    expected = recognizer.get(small, near)
    np.testing.assert_allclose(recognizer.get(huge, far), expected, rtol=0.05, atol=0.05)
    outside = Face(bbox=far.bbox + 90_000, kps=far.kps + 90_000, det_score=0.5)
    assert np.isfinite(recognizer.get(huge, outside)).all()


def test_get_feat_says_what_keypoints_must_be(recognizer):
    crops = [np.zeros((112, 112, 3), np.uint8)] * 2
    for keypoints in (np.zeros((1, 5, 2)), np.full((2, 5, 2), np.nan), np.full((2, 5, 2), 56.0)):
        with pytest.raises(ValueError, match="keypoints must be"):
            recognizer.get_feat(crops, keypoints)
    assert recognizer.get_feat([]).shape == (0, tiny.DIM)


def test_other_models_keep_their_classes_and_answers(tmp_path):
    tiny.write_recognition(tmp_path / "other.onnx", with_keypoints=False, ours=False)
    found = insightface.model_zoo.get_model(str(tmp_path / "other.onnx"), **tiny.CPU)
    ik.unregister()
    stock = insightface.model_zoo.get_model(str(tmp_path / "other.onnx"), **tiny.CPU)
    assert type(found) is type(stock) and vars(found).keys() == vars(stock).keys()
    face, same = a_face(), a_face()
    np.testing.assert_array_equal(found.get(PICTURE, face), stock.get(PICTURE, same))
    assert set(face) == set(same)


def test_a_packs_name_is_found_by_the_stock_loader(tmp_path):
    tiny.write_pack(tmp_path)
    model = insightface.model_zoo.get_model("tiny", root=str(tmp_path), **tiny.CPU)
    assert isinstance(model, KeypointRecognizer)
    assert insightface.model_zoo.get_model("absent", root=str(tmp_path), **tiny.CPU) is None


@pytest.mark.skipif(not MANIFESTS, reason="insightface 2 brought manifests")
def test_manifest_packs(tmp_path):
    folder = tiny.write_pack(tmp_path, aligner=True, manifest=True)
    app = open_app(tmp_path)
    recognizer = app.models["recognition"]
    assert app.model_package is not None and isinstance(recognizer, KeypointRecognizer)
    assert isinstance(recognizer.aligner, FaceAligner)
    assert len(app.get(PICTURE)) == 3
    by_task = insightface.model_zoo.get_model(str(folder), model_task="recognition", **tiny.CPU)
    assert isinstance(by_task, KeypointRecognizer)
    ik.unregister()
    assert type(open_app(tmp_path).models["recognition"]).__name__ == "ArcFaceONNX"


@pytest.mark.skipif(not MANIFESTS, reason="insightface 2 brought manifests")
def test_a_manifests_hash_is_verified(tmp_path):
    import json

    folder = tiny.write_pack(tmp_path, manifest=True)
    document = json.loads((folder / "manifest.json").read_text())
    document["tasks"]["recognition"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(RuntimeError, match="SHA-256 mismatch"):
        open_app(tmp_path)


def test_a_missing_provider_is_one_warning(tmp_path):
    tiny.write_pack(tmp_path, aligner=True)
    providers._warn_once.cache_clear()
    asked = ["TensorrtExecutionProvider", "CPUExecutionProvider"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        app = open_app(tmp_path, providers=asked, provider_options=[{"device_id": "0"}, {}])
    messages = [
        str(warning.message) for warning in caught if issubclass(warning.category, (RuntimeWarning, UserWarning))
    ]
    assert len(messages) == 1 and messages[0].startswith("TensorrtExecutionProvider requested, but this onnxruntime")
    assert app.models["recognition"].session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(RuntimeError, match="TensorrtExecutionProvider requested"):
        open_app(tmp_path, providers=asked, strict_providers=True)
    assert open_app(tmp_path, strict_providers=True)


def test_a_provider_that_does_not_start_is_said_too(recognizer):
    providers._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="could not be started; CPUExecutionProvider is used instead"):
        providers.check_session(recognizer.session, [("CUDAExecutionProvider", {}), "CPUExecutionProvider"])
    with pytest.raises(RuntimeError, match="could not be started"):
        providers.check_session(recognizer.session, ["CUDAExecutionProvider"], strict=True)


def test_nothing_asked_for_is_nothing_missing():
    assert providers.settle_providers({"root": "here"}, strict=True) == {"root": "here"}
    assert providers.settle_providers({"providers": []})["providers"] == ["CPUExecutionProvider"]


def test_threads_get_what_one_gets(tmp_path):
    tiny.write_pack(tmp_path, aligner=True)
    app = open_app(tmp_path)
    pictures = [tiny.draw_picture([(4 + i, 6), (20, 3 + i)], seed=i) for i in range(8)]
    alone = [[face.embedding for face in app.get(picture)] for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda picture: [face.embedding for face in app.get(picture)], pictures * 4))
    for found, expected in zip(together, alone * 4, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("manifest", [False, True])
def test_models_can_be_pickled(tmp_path, manifest):
    tiny.write_pack(tmp_path, aligner=True, manifest=manifest)
    app = open_app(tmp_path)
    again = pickle.loads(pickle.dumps(app))
    for face, expected in zip(again.get(PICTURE), app.get(PICTURE), strict=True):
        np.testing.assert_array_equal(face.embedding, expected.embedding)
        assert face.quality == expected.quality


def check_same_faces(found, expected):
    assert len(found) == len(expected) > 0
    for face, same in zip(found, expected, strict=True):
        assert type(face) is type(same) and set(face) == set(same)
        for key in same:
            np.testing.assert_array_equal(face[key], same[key], err_msg=key)
        assert face.embedding_norm == same.embedding_norm and face.no_such_thing is None


def test_faces_can_be_copied_and_pickled(tmp_path):
    tiny.write_pack(tmp_path, aligner=True)
    faces = open_app(tmp_path).get(PICTURE)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        check_same_faces(pickle.loads(pickle.dumps(faces, protocol)), faces)
    check_same_faces([copy.copy(face) for face in faces], faces)
    deep = copy.deepcopy(faces)
    check_same_faces(deep, faces)
    deep[0].kps[:] = 0
    assert faces[0].kps.any()


class OwnFace(Face):
    pass


def test_faces_of_a_subclass_stay_so():
    again = pickle.loads(pickle.dumps(OwnFace(kps=np.ones(2), nested={"a": 1}, several=[{"b": 2}])))
    assert type(again) is OwnFace and again.nested.a == 1 and again.several[0].b == 2


def _work(app, recognizer):
    return os.getpid(), app.get(PICTURE), recognizer.get(PICTURE, a_face())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_apps_models_and_faces_travel_between_processes(tmp_path, method):
    """Also to and from those in which nobody has called register()."""
    if method not in get_all_start_methods():
        pytest.skip(f"no {method} here")
    tiny.write_pack(tmp_path)
    app = open_app(tmp_path)
    recognizer, expected = app.models["recognition"], app.get(PICTURE)
    with ProcessPoolExecutor(1, mp_context=get_context(method)) as pool:
        check_same_faces(pool.submit(app.get_batch, [PICTURE]).result(120)[0], expected)
        pid, faces, embedding = pool.submit(_work, app, recognizer).result(120)
    assert pid != os.getpid()
    check_same_faces(faces, expected)
    np.testing.assert_array_equal(embedding, recognizer.get(PICTURE, a_face()))


def test_pools_and_joblib(tmp_path):
    tiny.write_pack(tmp_path)
    app = open_app(tmp_path)
    expected = app.get(PICTURE)
    if "fork" in get_all_start_methods():
        with get_context("fork").Pool(1) as pool:
            check_same_faces(pool.map_async(app.get, [PICTURE]).get(120)[0], expected)
    cloudpickle = pytest.importorskip("cloudpickle", reason="what joblib sends by")
    check_same_faces(pickle.loads(cloudpickle.dumps(app.get))(PICTURE), expected)
    check_same_faces(pickle.loads(cloudpickle.dumps(expected)), expected)


@pytest.mark.parametrize("with_keypoints", [False, True])
def test_a_batch_laid_out_for_the_network(recognizer, with_keypoints):
    rng = np.random.default_rng(0)
    crops = rng.integers(0, 255, (3, 112, 112, 3), dtype=np.uint8)
    keypoints = (CANONICAL_KEYPOINTS + rng.normal(0, 0.05, (3, 5, 2))).astype(np.float32) if with_keypoints else None
    batch = crops[..., ::-1].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(
        recognizer.forward(batch, keypoints), recognizer.get_feat(list(crops), keypoints), atol=1e-4
    )
    with pytest.raises(ValueError, match=r"keypoints must be \(3, 5, 2\)"):
        recognizer.forward(batch, CANONICAL_KEYPOINTS[None])


def test_nothing_public_of_the_stock_class_fails(recognizer):
    """Whatever ArcFaceONNX offers works on our class, too."""
    crop = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    blob = crop[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
    feature = recognizer.get_feat(crop)
    calls = {
        "prepare": lambda: recognizer.prepare(-1),
        "get": lambda: recognizer.get(PICTURE, a_face()),
        "get_feat": lambda: recognizer.get_feat([crop, crop]),
        "forward": lambda: recognizer.forward(blob),
        "compute_sim": lambda: recognizer.compute_sim(feature[0], feature[0]),
    }
    public = {name for name in dir(insightface.model_zoo.arcface_onnx.ArcFaceONNX) if not name.startswith("_")}
    assert public == set(calls)
    for call in calls.values():
        call()


def _resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_ten_thousand_calls_take_no_memory(tmp_path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # threads of tiny networks wait for each other
    tiny.write_pack(tmp_path)
    recognizer = open_app(tmp_path, sess_options=options).models["recognition"]

    def call(times):
        for seed in range(times):
            recognizer.get(PICTURE, a_face(seed))

    call(1000)
    before = _resident_bytes()
    call(10_000)
    assert _resident_bytes() - before < 4 << 20
