"""Template fusion: the weights, and pooling per media and then per template."""

from __future__ import annotations

import numpy as np
import pytest
from reference import fusion as plain
from reference.metrics import unit

from insightface_kprpe.evaluation.fusion import (
    FUSION_METHODS,
    fusion_weights,
    landmark_weights,
    norm_weights,
    pool_templates,
)
from insightface_kprpe.geometry import CANONICAL_KEYPOINTS


def test_landmark_weights_by_hand():
    keypoints = np.repeat(CANONICAL_KEYPOINTS[None], 4, axis=0).astype(np.float64)
    keypoints[1] += [0.03, 0.04]  # every point 0.05 away
    keypoints[2, 0] += [0.3, 0.4]  # one point 0.5 away: mean 0.1
    keypoints[3] += 0.3  # beyond h
    score = np.array([1.0, 0.8, 0.5, 1.0])
    np.testing.assert_allclose(landmark_weights(keypoints, score), [1.0, 0.75 * 0.8, 0.5 * 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(landmark_weights(keypoints, score, h=0.1)[:3], [1.0, 0.5 * 0.8, 0.0], atol=1e-6)


def test_landmark_weights_equal_plain_form():
    rng = np.random.default_rng(0)
    keypoints = CANONICAL_KEYPOINTS + rng.uniform(0.01, 0.3, (50, 1, 1)) * rng.normal(size=(50, 5, 2))
    score = rng.random(50)
    for h in (0.2, 0.35):
        expected = [plain.landmark_weight(points, one, h) for points, one in zip(keypoints, score, strict=True)]
        np.testing.assert_allclose(landmark_weights(keypoints, score, h), expected, atol=1e-6)
        assert 5 < np.count_nonzero(expected) < 50
    np.testing.assert_array_equal(landmark_weights(keypoints, score), landmark_weights(keypoints, score, 0.2))


@pytest.mark.parametrize(
    ("keypoints", "score", "h", "message"),
    [
        (np.zeros((4, 10)), np.ones(4), 0.2, r"\(N, 5, 2\)"),
        (np.zeros((4, 5, 2)), np.ones(3), 0.2, r"score \(N,\)"),
        (np.full((4, 5, 2), 56.0), np.ones(4), 0.2, "divide pixels"),
        (np.full((4, 5, 2), np.nan), np.ones(4), 0.2, "finite"),
        (np.zeros((4, 5, 2)), np.ones(4), 0.0, "h must be"),
    ],
)
def test_landmark_weights_bad_input(keypoints, score, h, message):
    with pytest.raises(ValueError, match=message):
        landmark_weights(keypoints, score, h)


def test_every_method_by_name():
    rng = np.random.default_rng(0)
    embeddings, score = rng.normal(size=(6, 4)), rng.random(6)
    keypoints = np.repeat(CANONICAL_KEYPOINTS[None], 6, axis=0)
    norms = np.linalg.norm(embeddings, axis=1)
    expected = dict(zip(FUSION_METHODS, (np.ones(6), norms, score, norms * score, 0.5 * np.ones(6)), strict=True))
    for method, weights in expected.items():
        np.testing.assert_allclose(fusion_weights(method, embeddings, keypoints, np.full(6, 0.5), score), weights)


def test_methods_say_what_they_need():
    with pytest.raises(ValueError, match="must be one of average, norm"):
        fusion_weights("median", np.ones((2, 2)))
    with pytest.raises(ValueError, match="needs detector_score"):
        fusion_weights("norm_detector", np.ones((2, 2)))
    with pytest.raises(ValueError, match="needs keypoints and landmark_score"):
        fusion_weights("landmark", np.ones((2, 2)), landmark_score=np.ones(2))


def test_pooling_equals_plain_form_in_any_order():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 8)).astype(np.float32)
    templates, medias = rng.integers(5, 12, 60), rng.integers(0, 4, 60)  # media numbers repeat between templates
    weights = rng.random(60)
    for given, rows in ((None, np.float64(embeddings)), (weights, unit(np.float64(embeddings)) * weights[:, None])):
        expected = plain.pool(rows, templates, medias)
        pooled, numbers = pool_templates(embeddings, templates, medias, given)
        assert numbers.tolist() == list(expected)
        np.testing.assert_allclose(pooled, list(expected.values()), atol=1e-6)
        order = rng.permutation(60)
        shuffled, _ = pool_templates(
            embeddings[order], templates[order], medias[order], given if given is None else given[order]
        )
        np.testing.assert_allclose(shuffled, pooled, atol=1e-12)


def test_a_media_number_that_ends_one_template_and_begins_the_next():
    embeddings = np.random.default_rng(0).normal(size=(6, 4))
    templates, medias = np.array([1, 1, 1, 2, 2, 2]), np.array([4, 5, 5, 5, 5, 6])
    pooled, _ = pool_templates(embeddings, templates, medias)
    np.testing.assert_allclose(pooled, list(plain.pool(embeddings, templates, medias).values()), atol=1e-12)


def test_norm_weights_are_the_raw_embeddings():
    embeddings = np.random.default_rng(0).normal(size=(20, 8))
    templates, medias = np.arange(20) // 5, np.arange(20) // 2
    raw, _ = pool_templates(embeddings, templates, medias)
    weighted, _ = pool_templates(embeddings, templates, medias, norm_weights(embeddings))
    np.testing.assert_allclose(raw, weighted, atol=1e-12)


def test_single_image_and_weightless_templates(caplog):
    embeddings = np.array([[2.0, 0], [0, 3.0], [4.0, 0], [0, 0]])
    pooled, numbers = pool_templates(embeddings, [7, 9, 9, 11], [1, 1, 1, 1], np.array([0.5, 0, 0, 1]))
    np.testing.assert_array_equal(numbers, [7, 9, 11])
    np.testing.assert_allclose(pooled, [[1, 0], np.full(2, np.sqrt(0.5)), [0, 0]])  # 9: no weight, averaged
    assert "no image with a positive weight" in caplog.text


def test_memory_map(tmp_path):
    embeddings = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", embeddings)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    ids = np.arange(10) // 3
    np.testing.assert_array_equal(pool_templates(mapped, ids, ids)[0], pool_templates(embeddings, ids, ids)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": [1, 2]}, "one per embedding"),
        ({"weights": np.ones(2)}, "weights must be"),
        ({"weights": [1, -1, 1]}, "not negative"),
        ({"weights": [1, np.nan, 1]}, "finite"),
        ({"embeddings": np.full((3, 2), np.inf)}, "embeddings must be finite"),
        ({"embeddings": np.ones(3)}, r"\(N, D\)"),
    ],
)
def test_pooling_bad_input(change, message):
    arguments = {"embeddings": np.ones((3, 2)), "templates": [1, 1, 2], "medias": [1, 2, 3]} | change
    with pytest.raises(ValueError, match=message):
        pool_templates(**arguments)
