"""Verification and identification metrics against straightforward forms of the same and the reference vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import metrics as plain

from insightface_kprpe.evaluation.metrics import (
    inverse_norms,
    kfold_accuracy,
    roc,
    tpr_at_fpr,
    unit_rows,
    val_at_far,
)
from insightface_kprpe.evaluation.search import Matches, match_scores, rank_k, search, tpir_at_far, tpir_at_fpir


def draw_pairs(rng, count, noise=0.8, dim=16):
    is_same = rng.random(count) < 0.5
    is_same[:2] = True, False
    a = rng.normal(size=(count, dim))
    b = np.where(is_same[:, None], a + noise * rng.normal(size=a.shape), rng.normal(size=a.shape))
    return a, b, is_same


@pytest.mark.parametrize(("count", "folds"), [(10, 10), (37, 10), (603, 10), (50, 3)])
def test_kfold_equals_plain_form(count, folds):
    a, b, is_same = draw_pairs(np.random.default_rng(count), count)
    result = kfold_accuracy(a, b, is_same, folds)
    accuracies, thresholds = plain.kfold_accuracy(a, b, is_same, folds)
    np.testing.assert_allclose(result.fold_accuracies, accuracies)
    np.testing.assert_allclose(result.fold_thresholds, thresholds)
    summary = accuracies.mean(), accuracies.std(), thresholds.mean()
    np.testing.assert_allclose(result[:3], summary, atol=1e-9)
    assert result.cosine_threshold == pytest.approx(1 - result.threshold / 2)


def test_kfold_distances_on_thresholds():
    rng = np.random.default_rng(0)
    a, b = np.eye(4)[rng.integers(0, 2, (2, 60))]  # distances are 0 or 2, each of them a threshold
    is_same = rng.random(60) < 0.5
    result = kfold_accuracy(a, b, is_same)
    accuracies, thresholds = plain.kfold_accuracy(a, b, is_same, 10)
    np.testing.assert_allclose(result.fold_accuracies, accuracies)
    np.testing.assert_allclose(result.fold_thresholds, thresholds)


def test_kfold_zero_embedding_is_equally_unlike_everything():
    a, b, is_same = draw_pairs(np.random.default_rng(0), 60)
    result = kfold_accuracy(np.zeros_like(a), b, is_same, 2)  # every distance is 1: all are called the same or none
    assert set(result.fold_thresholds.round(2)) <= {0.0, 1.01}
    called = result.fold_thresholds > 1
    right = [(half == call).mean() for half, call in zip(np.split(is_same, 2), called, strict=True)]
    np.testing.assert_allclose(result.fold_accuracies, right)


def test_perfect_and_blind_models():
    a, _, is_same = draw_pairs(np.random.default_rng(1), 200)
    assert kfold_accuracy(a, np.where(is_same[:, None], a, -a), is_same).accuracy == 1
    assert kfold_accuracy(np.ones((200, 4)), np.ones((200, 4)), np.arange(200) % 2).accuracy == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, s: (a, b[:-1], s), "the same shape"),
        (lambda a, b, s: (a[:5], b[:5], s[:5]), "folds must be"),
        (lambda a, b, s: (a, b, s[:-1]), "is_same must be"),
        (lambda a, b, s: (a, b, np.ones(20)), "positive ones only"),
        (lambda a, b, s: (a, b, np.zeros(20)), "negative ones only"),
        (lambda a, b, s: (a, b, np.arange(20)), "zeros and ones"),
        (
            lambda a, b, s: (np.where(np.arange(20)[:, None] == 3, np.nan, a), b, s),
            "embeddings_a must be finite.*row 3",
        ),
        (lambda a, b, s: (a[0], b[0], s), r"must be \(N, D\)"),
    ],
)
def test_kfold_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        kfold_accuracy(*change(*draw_pairs(np.random.default_rng(0), 20)))


@pytest.mark.parametrize(("count", "folds", "noise"), [(300, 10, 0.8), (903, 10, 1.5), (60, 3, 0.5)])
def test_val_at_far_equals_plain_form(count, folds, noise):
    a, b, is_same = draw_pairs(np.random.default_rng(count), count, noise, dim=6)
    for far in (1e-3, 0.05, 1.0):
        val, reached = plain.val_at_far(a, b, is_same, far, folds)
        found = val_at_far(a, b, is_same, far, folds)
        assert found == pytest.approx((val.mean(), val.std(), reached.mean(), far), abs=1e-12)
    assert val_at_far(a, b, is_same, 0.05, folds).val > val_at_far(a, b, is_same, 0.001, folds).val


def test_val_at_far_where_no_threshold_reaches_it_or_folds_have_one_kind():
    opposite = np.tile([[1.0, 0]], (20, 1))  # different pairs at distance 4, beyond the last threshold
    is_same = np.arange(20) % 2 == 0
    assert val_at_far(opposite, np.where(is_same[:, None], opposite, -opposite), is_same, 0.1).val == 0
    a, b, _ = draw_pairs(np.random.default_rng(0), 40)
    assert np.isnan(val_at_far(a, b, np.arange(40) < 20, folds=4).val)  # each fold is of one kind
    with pytest.raises(ValueError, match=r"far must be a fraction in \[0, 1\], got 10"):
        val_at_far(a, b, np.arange(40) % 2, 10)


def test_tensors_with_gradients_are_taken_as_they_are():
    a, b, is_same = draw_pairs(np.random.default_rng(0), 60)
    expected = kfold_accuracy(a, b, is_same)
    tensors = [torch.tensor(values, requires_grad=True) for values in (a, b)]
    assert kfold_accuracy(*tensors, torch.tensor(is_same)).accuracy == expected.accuracy
    scores = torch.nn.functional.cosine_similarity(*tensors)
    assert tpr_at_fpr(scores, torch.tensor(is_same), [0.1]) == tpr_at_fpr(scores.detach().numpy(), is_same, [0.1])
    half = scores.bfloat16()
    assert tpr_at_fpr(half, is_same, [0.1]) == tpr_at_fpr(half.float().detach().numpy(), is_same, [0.1])
    assert search(tensors[0], tensors[1], torch.arange(60), torch.arange(60)).rank.tolist() == (
        search(a, b, np.arange(60), np.arange(60)).rank.tolist()
    )


@pytest.mark.parametrize("steps", [3, 30, None])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tpr_at_fpr_equals_plain_form(steps, share, dtype):
    rng = np.random.default_rng(3)
    labels = rng.random(400) < share
    scores = (rng.normal(size=400) + labels).astype(dtype)
    scores = scores if steps is None else np.round(scores * steps) / steps  # ties
    corners = plain.roc_corners(scores, labels)
    curve = roc(scores, labels)
    np.testing.assert_allclose(curve.false_positives[curve.is_corner] / (~labels).sum(), [row[0] for row in corners])
    np.testing.assert_allclose(curve.true_positives[curve.is_corner] / labels.sum(), [row[1] for row in corners])
    np.testing.assert_array_equal(curve.thresholds[curve.is_corner], [row[2] for row in corners])
    for target in (0.0, 1e-4, 0.013, 0.1, 0.5, 1.0):
        nearest = plain.nearest_on_roc(scores, labels, target)
        for rule, expected in (("insightface", nearest), ("at_most", plain.tpr_at_fpr(scores, labels, target))):
            point = tpr_at_fpr(scores, labels, [target], rule)[0]
            assert point.target == target
            np.testing.assert_allclose((point.fpr, point.tpr, point.threshold), expected, rtol=1e-12)


def test_the_default_rule_never_exceeds_the_target():
    scores, labels = np.array([0.9, 0.8, 0.7, 0.6]), np.array([1, 0, 1, 0])
    assert [tpr_at_fpr(scores, labels, [0.4], *rule)[0].fpr for rule in ((), ("insightface",))] == [0.0, 0.5]


@pytest.mark.parametrize("rule", ["at_most", "insightface"])
def test_tpr_at_fpr_sorts_only_the_head_and_finds_the_same(rule):
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.002  # long runs of negatives, so that the first cut may not settle the point
    scores = np.where(labels, rng.uniform(0.2, 1, 200_000), rng.random(200_000))
    targets = (1e-3, 1e-2, 1e-1, 0.3)
    whole = [tpr_at_fpr(scores, labels, [target, 1.0], rule)[0] for target in targets]
    assert tpr_at_fpr(scores, labels, targets, rule) == whole
    tied = np.round(scores, 1)  # the cut falls among thousands of equal scores, 5 % of all being the highest
    for target in (1e-3, 0.028):
        assert tpr_at_fpr(tied, labels, [target], rule)[0] == tpr_at_fpr(tied, labels, [target, 1.0], rule)[0]


def test_tpr_at_fpr_without_any_accepted_score():
    points = tpr_at_fpr([0.9, 0.5, 0.1], [0, 1, 1], [0.0, 1.0])
    assert points[0] == (0.0, 0.0, 0.0, np.inf)
    assert points[1] == (1.0, 1.0, 1.0, 0.1)


@pytest.mark.parametrize(
    ("scores", "labels", "fprs", "rule", "message"),
    [
        ([0.1, 0.2], [1, 1], [0.1], "at_most", "positive ones only"),
        ([0.1, np.nan], [0, 1], [0.1], "at_most", "finite"),
        ([0.1, 0.2], [0, 1, 1], [0.1], "at_most", "labels must be"),
        ([[0.1, 0.2]], [[0, 1]], [0.1], "at_most", "scores must be"),
        ([0.1, 0.2], [0, 1], [10], "at_most", r"fractions in \[0, 1\]"),
        ([0.1, 0.2], [0, 1], [0.1], "nearest", "rule must be"),
    ],
)
def test_tpr_at_fpr_bad_input(scores, labels, fprs, rule, message):
    with pytest.raises(ValueError, match=message):
        tpr_at_fpr(np.array(scores), np.array(labels), fprs, rule)


def test_unit_rows_keep_zero_rows():
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]])
    np.testing.assert_allclose(inverse_norms(np.array([[3, 4], [0, 0]])), [0.2, 0])


def test_open_set_golden(golden):
    truth = golden("open_set.npz")
    points = tpir_at_fpir(match_scores(truth["scores"], truth["labels"]), (0.01, 0.1))
    np.testing.assert_allclose([point.tpr for point in points], truth["dir"], atol=1e-9)
    np.testing.assert_allclose([point.fpr for point in points], truth["far"], rtol=1e-6)
    np.testing.assert_allclose([point.threshold for point in points], truth["threshold"], atol=1e-6)


def test_open_set_by_hand():
    matches = Matches(
        mated_score=np.array([0.9, 0.6, 0.8, -np.inf, -np.inf, -np.inf]),
        nonmated_score=np.array([0.1, 0.2, 0.85, 0.7, 0.3, 0.5]),
        rank=np.array([1, 1, 2, 0, 0, 0]),
    )
    none, one, all_alarms = tpir_at_fpir(matches, (0.0, 1 / 3, 1.0))
    assert none.fpr == 0 and none.threshold > 0.7 and none.tpr == pytest.approx(1 / 3)
    assert one.fpr == pytest.approx(1 / 3) and one.threshold == 0.7 and one.tpr == pytest.approx(1 / 3)
    assert all_alarms.threshold == 0.3 and all_alarms.tpr == pytest.approx(2 / 3)
    assert tpir_at_fpir(matches, (1.0,), rank=2)[0].tpr == pytest.approx(1)
    assert rank_k(matches, (1, 2)) == {1: pytest.approx(2 / 3), 2: 1}


def test_identification_equals_plain_form():
    rng = np.random.default_rng(0)
    for ties in (None, 10):
        scores = rng.normal(size=(80, 30))
        is_mate = rng.random((80, 30)) < 0.04  # some probes have several mates, many have none
        scores += 1.5 * is_mate
        scores = scores if ties is None else np.round(scores * ties) / ties
        expected = [plain.match(*rows) for rows in zip(scores, is_mate, strict=True)]
        mate, other, ranks = (np.array(column) for column in zip(*expected, strict=True))
        matches = match_scores(scores, is_mate)
        for found, column in zip(matches[:3], (mate, other, ranks), strict=True):
            np.testing.assert_array_equal(found, column)
        assert rank_k(matches, (1, 3, 10)) == {k: pytest.approx(plain.rank_k(ranks, k)) for k in (1, 3, 10)}
        for fpir in (0.0, 0.01, 0.1, 0.5, 1.0):
            for rank in (1, 5):
                point = tpir_at_fpir(matches, [fpir], rank)[0]
                reached, tpir, threshold = plain.tpir_at_fpir(mate, other, ranks, fpir, rank)
                assert (point.fpr, point.tpr) == pytest.approx((reached, tpir), rel=1e-12)
                assert threshold is None or point.threshold == threshold


def test_tpir_at_far_by_hand():
    scores = np.array([[0.9, 0.5, 0.4], [0.8, 0.7, 0.1], [0.6, 0.2, 0.3]])
    is_mate = np.eye(3, dtype=bool)  # mated 0.9, 0.7, 0.3; nonmated 0.8, 0.6, 0.5, ...
    one, two, three = tpir_at_far(match_scores(scores, is_mate, 3), (0.1, 0.5, 1.0))
    assert one == (0.1, 0.0, pytest.approx(1 / 3), 0.8)  # ceil(0.3) = 1: above the highest
    assert two == (0.5, pytest.approx(1 / 3), pytest.approx(2 / 3), 0.6)
    assert three == (1.0, pytest.approx(2 / 3), pytest.approx(2 / 3), 0.5)
    scores[1, 1] = 0.8  # a mate that ties with the threshold is not above it
    assert tpir_at_far(match_scores(scores, is_mate, 3), (0.1,))[0].tpr == pytest.approx(1 / 3)


def test_tpir_at_far_bad_input():
    scores, is_mate = np.random.default_rng(0).random((10, 4)), np.eye(10, 4, dtype=bool)
    with pytest.raises(ValueError, match="6 of 10 do not"):
        tpir_at_far(match_scores(scores, is_mate, 10))
    matches = match_scores(scores[:4], is_mate[:4], 1)
    with pytest.raises(ValueError, match="2 nonmated scores are needed, got 1"):
        tpir_at_far(matches, (0.5,))
    with pytest.raises(ValueError, match=r"fractions in \(0, 1\]"):
        tpir_at_far(matches, (0.0,))


def test_open_set_and_rank_bad_input():
    inside = Matches(np.ones(2), np.zeros(2), np.ones(2, dtype=int))
    outside = Matches(np.full(2, -np.inf), np.zeros(2), np.zeros(2, dtype=int))
    for matches in (inside, outside):
        with pytest.raises(ValueError, match="inside and outside"):
            tpir_at_fpir(matches)
    with pytest.raises(ValueError, match="same identity labels"):
        rank_k(outside)
    with pytest.raises(ValueError, match="1 or more"):
        rank_k(inside, (0,))
