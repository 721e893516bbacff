"""Drawn faces: reproducible, with exact landmarks, and with an identity that is not a color."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from insightface_kprpe.data import synthetic
from insightface_kprpe.data.synthetic import SyntheticFaces, draw_face, draw_scene, verification_pairs
from insightface_kprpe.data.synthetic_drawing import build_head, draw_head, pose_head
from insightface_kprpe.data.synthetic_people import EXPRESSIONS, Appearance, sample_identity
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS, estimate_alignment, transform_points


def plain_look(yaw: float = 0.0, **expression: float) -> Appearance:
    weights = {"eye_open": 1.0, **expression}
    return Appearance(
        yaw=yaw,
        pitch=0.0,
        expression=np.array([weights.get(name, 0.0) for name in EXPRESSIONS], dtype=np.float32),
        light=(0.0, 0.0, 1.0),
        ambient=0.8,
        clothes=(90.0, 90.0, 90.0),
    )


@pytest.fixture(scope="module")
def head():
    return build_head(sample_identity(np.random.default_rng(5)))


def test_items_have_the_promised_form():
    faces = SyntheticFaces(3, 4)
    assert len(faces) == 12
    assert faces.labels.dtype == np.int64
    assert faces.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for size, aligned in ((112, True), (112, False), (48, True)):
        image, label, keypoints = SyntheticFaces(3, 4, size=size, aligned=aligned)[5]
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert label == 1 and type(label) is int
        assert keypoints.shape == (5, 2) and keypoints.dtype == np.float32
        assert image.std() > 10
    with pytest.raises(IndexError):
        faces[12]


@pytest.mark.parametrize("aligned", [True, False])
def test_an_item_depends_on_its_number_alone(aligned):
    faces = SyntheticFaces(4, 3, seed=7, aligned=aligned)
    forward = [faces[i] for i in range(12)]
    synthetic._person.cache_clear()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - the global state must be left alone
    again = pickle.loads(pickle.dumps(faces))
    for i in reversed(range(12)):
        image, label, keypoints = again[i]
        assert (image == forward[i][0]).all() and label == forward[i][1] and (keypoints == forward[i][2]).all()
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert len({image.tobytes() for image, _, _ in forward}) == 12
    assert (SyntheticFaces(4, 3, seed=8, aligned=aligned)[0][0] != forward[0][0]).any()


def test_another_process_draws_the_same():
    code = (
        "import hashlib; from insightface_kprpe.data.synthetic import SyntheticFaces; "
        "print(hashlib.sha256(SyntheticFaces(4, 3, seed=7)[10][0].tobytes()).hexdigest())"
    )
    root = Path(__file__).resolve().parents[1]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(SyntheticFaces(4, 3, seed=7)[10][0].tobytes()).hexdigest()


def test_a_person_is_the_same_in_every_set():
    image, label, keypoints = SyntheticFaces(2, 5, first_identity=3)[6]
    expected_image, expected_label, expected_keypoints = SyntheticFaces(6, 5)[21]
    assert (image == expected_image).all() and (keypoints == expected_keypoints).all()
    assert (label, expected_label) == (1, 4)


def test_aligned_faces_lie_on_the_template():
    faces = SyntheticFaces(20, 3)
    keypoints = np.stack([faces[i][2] for i in range(len(faces))])
    error_px = 112 * np.linalg.norm(keypoints - CANONICAL_KEYPOINTS, axis=-1)
    assert error_px.mean() < 4 and error_px.max() < 16
    assert np.abs(112 * (keypoints.mean(0) - CANONICAL_KEYPOINTS)).max() < 2  # nothing off on average


def test_loose_crops_keep_the_landmarks_inside_and_vary():
    faces = SyntheticFaces(30, 4, aligned=False, size=32)
    keypoints = np.stack([faces[i][2] for i in range(len(faces))])
    assert keypoints.min() > 0 and keypoints.max() < 1
    eyes = keypoints[:, 1] - keypoints[:, 0]
    angle, distance = np.degrees(np.arctan2(eyes[:, 1], eyes[:, 0])), np.linalg.norm(eyes, axis=1)
    assert angle.min() < -20 and angle.max() > 20
    assert distance.max() > 1.4 * distance.min()


def test_what_is_drawn_lies_at_the_landmarks(head):
    look = plain_look()
    posed = pose_head(head, look)
    matrix = estimate_alignment(posed[head.landmarks], 224)
    canvas = np.full((224, 224, 4), 128, np.uint8)
    draw_head(canvas, head, look, posed, matrix)
    gray = canvas[..., :3].mean(-1)
    left_eye, right_eye, nose, left_mouth, right_mouth = np.rint(
        transform_points(posed[head.landmarks], matrix)
    ).astype(int)
    skin = gray[nose[1] + 8 : nose[1] + 14, nose[0] - 40 : nose[0] - 30].mean()
    for x, y in (left_eye, right_eye):
        assert gray[y - 3 : y + 4, x - 3 : x + 4].min() < 0.4 * skin  # the pupil
        assert gray[y - 3 : y + 4, x - 25 : x + 26].max() > skin  # the white of the eye
    x, y = (left_mouth + right_mouth) // 2
    assert gray[y - 3 : y + 4, x].min() < 0.6 * skin  # between the lips
    for x, y in (left_mouth, right_mouth):
        assert gray[y - 3 : y + 4, x - 3 : x + 4].min() < 0.8 * skin


def test_the_picture_moves_with_its_matrix(head):
    look = plain_look(yaw=0.3, smile=0.5)
    posed = pose_head(head, look)
    matrix = estimate_alignment(posed[head.landmarks], 224)
    turn = np.vstack([cv2.getRotationMatrix2D((112, 112), 25, 0.8), [0, 0, 1]])
    straight, turned = np.full((224, 224, 4), 128, np.uint8), np.full((224, 224, 4), 128, np.uint8)
    draw_head(straight, head, look, posed, matrix)
    draw_head(turned, head, look, posed, turn[:2] @ np.vstack([matrix, [0, 0, 1]]))
    expected = cv2.warpAffine(straight, turn[:2], (224, 224), borderMode=cv2.BORDER_REPLICATE)
    difference = np.abs(expected.astype(int) - turned)[60:164, 60:164, :3]
    assert difference.mean() < 4
    landmarks = transform_points(posed[head.landmarks], matrix)
    moved = transform_points(posed[head.landmarks], turn[:2] @ np.vstack([matrix, [0, 0, 1]]))
    np.testing.assert_allclose(transform_points(landmarks, turn[:2]), moved, atol=1e-3)


def test_pose_and_expression_move_landmarks(head):
    def seen(look: Appearance) -> np.ndarray:
        return pose_head(head, look)[head.landmarks]

    neutral, right = seen(plain_look()), seen(plain_look(yaw=0.4))
    smiling, open_mouth = seen(plain_look(smile=1.0)), seen(plain_look(mouth_open=1.0))
    assert right[2, 0] - right[:2, 0].mean() > neutral[2, 0] - neutral[:2, 0].mean() + 0.1  # the nose leads
    assert right[1, 0] - right[0, 0] < neutral[1, 0] - neutral[0, 0]  # the eyes come together
    assert smiling[4, 0] - smiling[3, 0] > neutral[4, 0] - neutral[3, 0]
    assert (smiling[3:, 1] < neutral[3:, 1]).all()
    assert open_mouth[4, 0] - open_mouth[3, 0] < neutral[4, 0] - neutral[3, 0]
    np.testing.assert_array_equal(smiling[:3], neutral[:3])


def best_accuracy(distance: np.ndarray, is_same: np.ndarray) -> float:
    return max(((distance <= limit) == is_same).mean() for limit in distance)


def test_identity_is_in_the_shapes_not_in_the_colors():
    images, is_same, _ = verification_pairs(60, 200, first_identity=1000)
    pixels = images.astype(np.float32)
    face = pixels[:, 30:100, 30:82].mean((1, 2))
    hair = pixels[:, :15, 40:72].mean((1, 2))
    for color in (pixels.mean((1, 2)), face, face / face.sum(1, keepdims=True), hair):
        assert best_accuracy(np.linalg.norm(color[::2] - color[1::2], axis=1), is_same) < 0.75
    raw = pixels.reshape(len(pixels), -1)
    assert best_accuracy(np.linalg.norm(raw[::2] - raw[1::2], axis=1), is_same) < 0.75

    faces = SyntheticFaces(20, 6, first_identity=1000)
    gray = np.stack([cv2.cvtColor(faces[i][0], cv2.COLOR_RGB2GRAY) for i in range(len(faces))]).astype(np.float32)
    gray = gray.reshape(len(gray), -1)
    gray = (gray - gray.mean(1, keepdims=True)) / gray.std(1, keepdims=True)
    likeness = gray @ gray.T
    np.fill_diagonal(likeness, -np.inf)
    assert (faces.labels[likeness.argmax(1)] == faces.labels).mean() > 0.3  # chance is 0.04


def test_pairs_are_balanced_and_truthful(monkeypatch):
    drawn = []

    def record(identity: int, instance: int, *args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
        drawn.append((identity, instance))
        return draw_face(identity, instance, *args, **kwargs)

    monkeypatch.setattr(synthetic, "draw_face", record)
    images, is_same, keypoints = verification_pairs(5, 40, seed=3, first_identity=100, aligned=False, size=32)
    assert images.shape == (80, 32, 32, 3) and images.dtype == np.uint8
    assert is_same.shape == (40,) and is_same.dtype == bool
    assert keypoints.shape == (80, 5, 2) and keypoints.dtype == np.float32
    assert (is_same.reshape(10, 4).sum(1) == 2).all()
    people = np.array([identity for identity, _ in drawn])
    assert set(people) == {100, 101, 102, 103, 104}
    assert ((people[::2] == people[1::2]) == is_same).all()
    assert len(set(drawn)) == 80  # nobody is compared with the very same image


@pytest.mark.parametrize(("people", "size", "face_size"), [(5, (240, 320), (24, 90)), (1, (320, 300), (150, 220))])
def test_scenes_hold_whole_faces_that_do_not_overlap(people, size, face_size):
    sizes = []
    for instance in range(6):
        scene = draw_scene(range(people), size, face_size=face_size, instance=instance)
        count = len(scene.identities)
        assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
        assert scene.boxes.shape == (count, 4) and scene.boxes.dtype == np.float32
        assert scene.landmarks_px.shape == (count, 5, 2) and scene.landmarks_px.dtype == np.float32
        assert count >= 1 and set(scene.identities) <= set(range(people))
        low, high = scene.boxes[:, :2], scene.boxes[:, 2:]
        assert (low >= 0).all() and (high <= np.array(size[::-1]) - 1).all()
        assert (scene.landmarks_px > low[:, None]).all() and (scene.landmarks_px < high[:, None]).all()
        apart = (low[:, None] >= high).any(-1) | (high[:, None] <= low).any(-1)
        assert (apart | np.eye(count, dtype=bool)).all()
        sizes.extend(high[:, 1] - low[:, 1])
    assert min(sizes) >= face_size[0] - 0.01 and max(sizes) <= face_size[1] + 0.01
    assert max(sizes) > 1.2 * min(sizes)


def test_scenes_are_reproducible_and_show_their_people():
    one, same, other = (draw_scene([3, 1, 4], (160, 160), instance=i, face_size=(24, 60)) for i in (0, 0, 1))
    assert (one.image == same.image).all() and (one.boxes == same.boxes).all()
    assert (one.image != other.image).any()
    scene = draw_scene([2], (200, 200), face_size=(100, 100))
    x1, y1, x2, y2 = scene.boxes[0].astype(int)
    assert y2 - y1 in (99, 100, 101)
    eyes = scene.landmarks_px[0, :2].astype(int)
    gray = scene.image.mean(-1)
    skin = np.median(gray[y1:y2, x1:x2])
    assert all(gray[y - 4 : y + 5, x - 4 : x + 5].min() < 0.7 * skin for x, y in eyes)


def test_who_finds_no_room_is_left_out():
    crowd = draw_scene(range(30), (96, 96), face_size=(40, 40))
    assert 1 <= len(crowd.boxes) < 30
    nobody = draw_scene([], (64, 64))
    assert nobody.boxes.shape == (0, 4) and nobody.landmarks_px.shape == (0, 5, 2) and nobody.image.shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: SyntheticFaces(0, 3), "num_identities must be at least 1, got 0"),
        (lambda: SyntheticFaces(3, 0), "images_per_identity must be at least 1"),
        (lambda: SyntheticFaces(3, 3, seed=-1), "seed"),
        (lambda: SyntheticFaces(3, 3, size=8), "size must be at least 16, got 8"),
        (lambda: SyntheticFaces(3, 3, first_identity=-2), "first_identity"),
        (lambda: draw_face(-1, 0), "identity"),
        (lambda: draw_face(0, 0, size=4), "size"),
        (lambda: verification_pairs(1, 10), "num_identities must be at least 2"),
        (lambda: verification_pairs(5, 11), "pairs must be even"),
        (lambda: draw_scene([0], (16, 200)), "height must be at least 32"),
        (lambda: draw_scene([0, -1]), "identities"),
        (lambda: draw_scene([0], face_size=(60, 30)), "face_size must be"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
