"""Warnings about inputs: silent where all is well, loud where faces are unaligned or channels are swapped."""

from __future__ import annotations

import numpy as np
import pytest

from insightface_kprpe.evaluation.result import Result
from insightface_kprpe.evaluation.sanity import (
    channel_order_warning,
    expected_rank_1,
    results_of_training,
    sanity_warnings,
    verification_separation,
)


def results(accuracy, rank_1, gallery=157_871, model="m"):
    return [
        Result(model, "bin lfw", {"accuracy": accuracy}),
        Result(model, "TinyFace", {"rank_1": rank_1}, {"gallery": gallery}),
    ]


@pytest.mark.parametrize(("accuracy", "rank_1"), [(0.998, 0.75), (0.998, 0.3), (0.7, 0.001), (0.977, 0.758)])
def test_plausible_results_are_passed_over(accuracy, rank_1):
    assert sanity_warnings(results(accuracy, rank_1)) == []


def test_low_rank_1_is_worth_a_warning():
    (warning,) = sanity_warnings(results(0.998, 0.05))
    assert warning.startswith("m on TinyFace: rank-1 is 5.0 %, while its verification on bin lfw suggests about 89 %")
    assert "unaligned" in warning
    assert sanity_warnings(results(0.998, 0.05) + results(0.99, 0.7, model="other")) == [warning]


def test_what_a_run_measured_in_training_counts(tmp_path):
    lines = [
        '{"step": 1, "loss": 9.0}',
        '{"step": 1, "accuracy/lfw": 60.0}',
        '{"step": 2, "accuracy/lfw": 99.8}',
        '{"step": 3, "accuracy/lfw": "high"}',
        '{"step": 3, "accuracy/cfp": NaN}',
        "[3]",
        "[" * 100_000,
        '{"st',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    known = results_of_training("m", tmp_path)
    assert known == [Result("m", "lfw in training", {"accuracy": 0.998})]
    (warning,) = sanity_warnings([*known, results(0.998, 0.05)[1]])
    assert "its verification on lfw in training suggests" in warning
    assert results_of_training("m", tmp_path / "model.onnx") == []


def test_the_best_verification_of_the_same_model_counts():
    weak = Result("m", "bin cplfw", {"accuracy": 0.55})
    assert len(sanity_warnings([weak, *results(0.998, 0.05), weak])) == 1
    mixed = [results(0.998, 0.75, model="a")[0], results(0.998, 0.05, model="b")[1]]
    assert sanity_warnings(mixed) == []  # nothing is known about b


def test_results_without_what_is_needed_say_nothing():
    verified, identified = results(0.998, 0.05)
    assert sanity_warnings([]) == sanity_warnings([verified]) == sanity_warnings([identified]) == []
    unknown_size = Result("m", "TinyFace", {"rank_1": 0.05})
    assert sanity_warnings([verified, unknown_size]) == []


def test_separation():
    assert verification_separation({"accuracy": 0.5}) == pytest.approx(0)
    assert verification_separation({"accuracy": 0.97725}) == pytest.approx(4, abs=1e-3)
    assert verification_separation({"tpr_at_fpr_0.001": 0.5}) == pytest.approx(3.0902, abs=1e-4)
    assert verification_separation({"accuracy": 1.0}) == pytest.approx(7.438, abs=1e-3)
    assert verification_separation({"rank_1": 0.5}) is None


@pytest.mark.parametrize(("separation", "gallery"), [(0.0, 10), (2.0, 2), (3.0, 500)])
def test_expected_rank_1_is_that_of_drawn_scores(separation, gallery):
    rng = np.random.default_rng(0)
    mate, best_other = rng.normal(size=4000) + separation, rng.normal(size=(4000, gallery - 1)).max(1)
    assert expected_rank_1(separation, gallery) == pytest.approx((mate > best_other).mean(), abs=0.025)
    assert expected_rank_1(separation, 1) == pytest.approx(1)


def test_expected_rank_1_bad_input():
    with pytest.raises(ValueError, match="gallery must be 1 or more"):
        expected_rank_1(1.0, 0)


def scores_of_quality(separation, seed, is_same):
    return np.random.default_rng(seed).normal(size=len(is_same)) + separation * is_same


def test_swapped_channels():
    is_same = np.arange(400) % 2
    good, bad = scores_of_quality(3.0, 0, is_same), scores_of_quality(1.5, 1, is_same)
    assert "channel order looks wrong" in channel_order_warning(bad, good, is_same)
    assert channel_order_warning(good, bad, is_same) is None
    assert channel_order_warning(good, good, is_same) is None
    equally_good = [scores_of_quality(1.5, seed, is_same) for seed in range(20)]
    assert all(channel_order_warning(bad, other, is_same) is None for other in equally_good)
    few = slice(0, 12)  # too few pairs to be sure
    assert channel_order_warning(bad[few], good[few], is_same[few]) is None


def test_area_is_the_mean_of_wins_with_ties():
    is_same = np.array([1, 1, 0, 0])
    warning = channel_order_warning(np.zeros(4), np.array([1.0, 1, 0, 0]), is_same)
    assert "(area under the ROC 1.000 instead of 0.500)" in warning


@pytest.mark.parametrize("is_same", [np.ones(4), [1, 1, 1, 0], np.ones(5)])
def test_channel_order_bad_input(is_same):
    with pytest.raises(ValueError, match="two same and two different pairs"):
        channel_order_warning(np.zeros(4), np.zeros(4), is_same)
