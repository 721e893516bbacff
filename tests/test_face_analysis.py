import numpy as np
import pytest
import tiny_packs as tiny
from insightface.app import FaceAnalysis
from insightface.app.common import Face

import insightface_kprpe as ik
from insightface_kprpe.app import face_analysis, registration
from insightface_kprpe.app.pictures import as_bgr
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def registered():
    ik.register()
    yield
    ik.unregister()


def open_app(root, **pack):
    tiny.write_pack(root, **pack)
    app = FaceAnalysis(name="tiny", root=str(root), **tiny.CPU)
    app.prepare(ctx_id=-1)
    return app


PICTURES = [
    tiny.draw_picture([(5, 5), (14, 20), (25, 9)]),
    tiny.draw_picture([], seed=1),
    tiny.draw_picture([(3 + 5 * column, 4 + 6 * row) for column in range(6) for row in range(4)], seed=2),
    tiny.draw_picture([(8, 8), (20, 20)], seed=3, side=512),
]


class Counting:
    """A session that counts."""

    def __init__(self, session):
        self.session, self.batches = session, []

    def run(self, names, feeds):
        self.batches.append(len(next(iter(feeds.values()))))
        return self.session.run(names, feeds)

    def __getattr__(self, name):
        return getattr(self.session, name)


@pytest.mark.parametrize("pack", [{}, {"aligner": True}, {"twin": False}], ids=["twin", "aligner", "stock"])
def test_batches_give_what_get_gives(tmp_path, pack):
    app = open_app(tmp_path, **pack)
    alone = [app.get(picture) for picture in PICTURES]
    recognizer = app.models["recognition"]
    recognizer.session = session = Counting(recognizer.session)
    if pack.get("aligner"):
        recognizer.aligner.session = refining = Counting(recognizer.aligner.session)
    together = app.get_batch(iter(PICTURES))
    assert [len(faces) for faces in together] == [len(faces) for faces in alone] == [3, 0, 24, 2]
    for faces, expected in zip(together, alone, strict=True):
        for face, same in zip(faces, expected, strict=True):
            assert set(face) == set(same)
            for key in face:
                np.testing.assert_allclose(face[key], same[key], atol=2e-5, err_msg=key)
    assert session.batches == [16, 8, 4, 1]
    if pack.get("aligner"):
        assert refining.batches == [29]
    assert type(app.models["recognition"]) is type(recognizer)


def test_many_faces_are_embedded_as_they_come(tmp_path):
    app = open_app(tmp_path)
    recognizer = app.models["recognition"]
    recognizer.session = session = Counting(recognizer.session)
    found = app.get_batch([PICTURES[2]] * 6)
    assert session.batches == [64, 64, 16]
    for faces in found:
        np.testing.assert_allclose([f.embedding for f in faces], [f.embedding for f in found[0]], atol=2e-5)


@pytest.mark.parametrize(("count", "lengths"), [(0, []), (1, [1]), (7, [4, 2, 1]), (130, [64, 64, 2])])
def test_batches_are_powers_of_two(count, lengths):
    parts = list(face_analysis.batches(count))
    assert [part.stop - part.start for part in parts] == lengths
    assert [i for part in parts for i in range(count)[part]] == list(range(count))


def test_embed_aligned(tmp_path):
    app = open_app(tmp_path)
    app.det_model = None  # not needed
    crops = [rng.integers(0, 255, (112, 112, 3), dtype=np.uint8) for _ in range(5)]
    embeddings = app.embed_aligned(crops)
    np.testing.assert_allclose(embeddings, [tiny.embedding_of(c, CANONICAL_KEYPOINTS) for c in crops], atol=1e-3)
    keypoints = CANONICAL_KEYPOINTS + rng.normal(0, 0.05, (5, 5, 2))
    moved = app.models["recognition"].embed_aligned(crops, keypoints)
    expected = [tiny.embedding_of(crop, points) for crop, points in zip(crops, keypoints, strict=True)]
    np.testing.assert_allclose(moved, expected, atol=1e-3)
    assert np.abs(moved - embeddings).max() > 0.1
    assert app.embed_aligned([]).shape == (0, tiny.DIM)
    np.testing.assert_array_equal(app.embed_aligned(np.stack(crops)), embeddings)
    for wrong in (crops[0][:0], crops[0][:, :100], np.zeros((224, 224, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"crops must be \(112, 112, 3\).* got crops\[1\] of shape"):
            app.embed_aligned([crops[0], wrong])
    with pytest.raises(ValueError, match=r"crops must be a list .* give a list: \[crop\]"):
        app.embed_aligned(crops[0])
    with pytest.raises(ValueError, match=r"images must be a list .* give a list: \[photo\]"):
        app.get_batch(PICTURES[0])
    with pytest.raises(ValueError, match=r"crops\[0\] must be an array, got None"):
        app.embed_aligned([None])


def test_embed_aligned_by_a_stock_model(tmp_path):
    app = open_app(tmp_path, twin=False)
    crops = [rng.integers(0, 255, (112, 112, 3), dtype=np.uint8) for _ in range(3)]
    np.testing.assert_allclose(app.embed_aligned(crops), app.models["recognition"].get_feat(crops), atol=1e-5)
    with pytest.raises(ValueError, match="has no keypoint input"):
        app.embed_aligned(crops, np.repeat(CANONICAL_KEYPOINTS[None], 3, 0))
    del app.models["recognition"]
    with pytest.raises(ValueError, match="needs a recognition model, this pack has only detection"):
        app.embed_aligned(crops)
    assert len(app.get_batch(PICTURES[:1])[0]) == 3  # found, not embedded


def test_models_of_other_kinds_are_asked_face_by_face(tmp_path):
    class Other:
        taskname = "recognition"

        def get(self, img, face):
            face.embedding = face.kps.ravel()

    app = open_app(tmp_path)
    app.models["recognition"] = Other()
    (faces,) = app.get_batch(PICTURES[:1])
    assert all((face.embedding == face.kps.ravel()).all() for face in faces)


def test_pictures_of_all_kinds(tmp_path):
    app = open_app(tmp_path)
    gray = PICTURES[0][..., 0]
    expected = [face.embedding for face in app.get(np.repeat(gray[..., None], 3, 2))]
    kinds = {
        "gray": gray,
        "gray, one channel": gray[..., None],
        "with alpha": np.dstack([gray] * 4),
        "16 bit": gray.astype(np.uint16) * 257,
    }
    for kind, picture in kinds.items():
        np.testing.assert_array_equal([face.embedding for face in app.get(picture)], expected, err_msg=kind)
    for nothing in (np.zeros((0, 0, 3), np.uint8), np.zeros((0, 40), np.uint8), np.zeros((1, 9000, 3), np.uint8)):
        assert app.get(nothing) == []
    assert len(app.get(np.zeros((20_000, 300, 3), np.uint8))) == 0


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "got None; cv2.imread returns None"),
        ("photo.jpg", "got str"),
        (np.zeros(5, np.uint8), r"got shape \(5,\)"),
        (np.zeros((3, 112, 112), np.uint8), "channels first"),
        (np.zeros((9, 9, 3), np.float32), "got float32; convert it first"),
        (np.zeros((9, 9, 3), np.int64), "got int64"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, picture, message):
    app = open_app(tmp_path)
    with pytest.raises(ValueError, match="image must .*" + message):
        app.get(picture)
    with pytest.raises(ValueError, match=r"images\[1\] must .*" + message):
        app.get_batch([PICTURES[0], picture])


def test_a_subclass_with_a_narrower_get(tmp_path):
    class Narrow(FaceAnalysis):
        def get(self, img, max_num=0):
            return super().get(img, max_num=max_num)[:2]

    tiny.write_pack(tmp_path)
    app = Narrow(name="tiny", root=str(tmp_path), **tiny.CPU)
    app.prepare(ctx_id=-1)
    assert [len(faces) for faces in app.get_batch(PICTURES[:2])] == [2, 0]
    assert [len(faces) for faces in app.get_batch(PICTURES[:2], max_num=1)] == [1, 0]
    assert [len(faces) for faces in app.get_batch(PICTURES[:2], 1)] == [1, 0]


def test_as_bgr_leaves_a_picture_alone_and_rounds_16_bit():
    picture = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    assert as_bgr(picture) is picture
    deep = np.array([[0, 128, 129, 257, 65535]], np.uint16)
    assert as_bgr(deep)[0, :, 0].tolist() == [0, 0, 1, 1, 255]


def test_unregister_takes_everything_back():
    ik.unregister()
    assert "__reduce_ex__" not in vars(FaceAnalysis) and "__reduce_ex__" not in vars(Face)
    assert not hasattr(FaceAnalysis, "get_batch") and not hasattr(FaceAnalysis, "embed_aligned")
    assert FaceAnalysis.get is registration._stock_get
    ik.unregister()
    ik.register()
    ik.register()
    ik.unregister()
    assert FaceAnalysis.get is registration._stock_get
