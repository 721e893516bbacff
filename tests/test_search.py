"""1:N search against sorting the whole score matrix."""

from __future__ import annotations

import numpy as np
import pytest

from insightface_kprpe.evaluation.metrics import unit_rows
from insightface_kprpe.evaluation.search import match_scores, rank_k, search


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_search_equals_sorting(block_bytes):
    rng = np.random.default_rng(0)
    gallery_ids = np.array([f"person {n}" for n in rng.integers(0, 40, 300)])
    probe_ids = np.array([f"person {n}" for n in rng.integers(0, 60, 50)])  # some are not in the gallery
    probe, gallery = rng.normal(size=(50, 8)), 5 * rng.normal(size=(300, 8))
    matches = search(probe, gallery, probe_ids, gallery_ids, highest=70, block_bytes=block_bytes)
    scores = unit_rows(probe) @ unit_rows(gallery).T
    same = probe_ids[:, None] == gallery_ids
    for row in range(50):
        others = np.sort(scores[row, ~same[row]])[::-1]
        assert matches.nonmated_score[row] == pytest.approx(others[0], abs=1e-6)
        if same[row].any():
            best = scores[row, same[row]].max()
            assert matches.mated_score[row] == pytest.approx(best, abs=1e-6)
            assert matches.rank[row] == 1 + (others > best).sum()
        else:
            assert matches.mated_score[row] == -np.inf and matches.rank[row] == 0
    np.testing.assert_allclose(matches.highest_nonmated, np.sort(scores[~same])[::-1][:70], atol=1e-6)
    for field, expected in zip(match_scores(scores, same, 70), matches, strict=True):
        np.testing.assert_allclose(field, expected, atol=1e-6)


def test_ties_count_against_the_mate():
    assert rank_k(match_scores(np.ones((3, 4), dtype=int), np.eye(3, 4)), (1, 3, 4)) == {1: 0.0, 3: 0.0, 4: 1.0}
    collapsed = search(np.ones((5, 16)), np.ones((200, 16)), np.arange(5), np.arange(200))
    assert rank_k(collapsed, (1,)) == {1: 0.0}


def test_search_bad_input():
    probe, gallery = np.ones((2, 4)), np.ones((3, 4))
    with pytest.raises(ValueError, match="probe_ids and gallery_ids"):
        search(probe, gallery, [1, 2], [1, 2])
    with pytest.raises(ValueError, match=r"\(P, D\) and \(G, D\)"):
        search(probe, gallery[:, :3], [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="gallery must be finite"):
        search(probe, gallery * np.inf, [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="scores must be finite"):
        match_scores(np.full((2, 2), np.nan), np.eye(2))
    with pytest.raises(ValueError, match="must both be"):
        match_scores(np.ones((2, 3)), np.eye(2))
