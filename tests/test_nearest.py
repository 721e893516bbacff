import numpy as np
import pytest

from insightface_kprpe.app import nearest
from insightface_kprpe.app.file_gallery import FileGallery


def unit(count, width, seed):
    rows = np.random.default_rng(seed).normal(0, 1, (count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def sorted_by_hand(rows, among, top):
    scores = rows.astype(np.float64) @ among.T.astype(np.float64)
    best = np.argsort(-scores, axis=1)[:, :top]
    return best, np.take_along_axis(scores, best, 1)


@pytest.fixture(params=["product", "faiss"])
def way(request):
    if request.param == "faiss":
        pytest.importorskip("faiss", reason="the extra faiss is not installed")
        return nearest.by_faiss
    return nearest.by_product


@pytest.mark.parametrize("top", [1, 4, 60])
@pytest.mark.parametrize("count", [1, 3, 40])  # faiss computes many in another way than few
def test_both_ways_find_the_best_of_all_in_order(way, count, top):
    rows, among = unit(count, 48, 0), unit(60, 48, 1)
    best, scores = way(rows, among, top)
    expected, expected_scores = sorted_by_hand(rows, among, top)
    np.testing.assert_array_equal(best, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_one_row_among_one(way):
    best, scores = way(np.float32([[0, 1]]), np.float32([[0, -1]]), 1)
    assert best.tolist() == [[0]] and scores.tolist() == [[-1]]


def test_rows_that_are_not_contiguous(way):
    rows, among = unit(2, 8, 0), unit(20, 8, 1)
    spread = np.asfortranarray(among)
    np.testing.assert_array_equal(way(rows, spread, 3)[0], sorted_by_hand(rows, among, 3)[0])


@pytest.fixture
def ways_taken(monkeypatch):
    taken = []
    for name in ("by_product", "by_faiss"):
        way = getattr(nearest, name)
        monkeypatch.setattr(nearest, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
    return taken


def test_a_large_gallery_goes_through_faiss_where_it_is_installed(ways_taken, monkeypatch):
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    monkeypatch.setattr(nearest, "FAISS_FROM", 50)
    monkeypatch.setattr(nearest, "FAISS_ROWS", 4)
    answers = []
    for people in (49, 50):
        gallery = FileGallery()
        gallery.add([f"p{i}" for i in range(people)], unit(people, 16, 2), [1.0] * people, ["x"] * people)
        answers += [gallery.search(unit(4, 16, 3), top=3), gallery.search(unit(5, 16, 3), top=3)]
    assert ways_taken == ["by_product", "by_product", "by_faiss", "by_product"]
    for few, many in zip(answers[2], answers[3], strict=False):
        assert [match.name for match in few] == [match.name for match in many]


def test_without_faiss_a_large_gallery_is_searched_all_the_same(ways_taken, monkeypatch):
    monkeypatch.setattr(nearest, "FAISS_FROM", 50)
    monkeypatch.setattr(nearest, "faiss", lambda: None)
    nearest.nearest_rows(unit(1, 16, 0), unit(60, 16, 1), 2)
    assert ways_taken == ["by_product"]


def test_faiss_is_not_imported_for_small_galleries(monkeypatch):
    monkeypatch.setattr(nearest, "faiss", lambda: pytest.fail("imported"))
    nearest.nearest_rows(unit(1, 16, 0), unit(60, 16, 1), 2)
