"""What every gallery does, wherever it is kept."""

import logging
import threading

import numpy as np
import pytest

from insightface_kprpe.app.file_gallery import FileGallery
from insightface_kprpe.app.galleries import editing, reading
from insightface_kprpe.app.gallery import Content

rng = np.random.default_rng(0)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.fixture
def place(gallery_place):
    """A gallery of two people."""
    with editing(gallery_place) as gallery:
        gallery.model = "model"
        rows = np.float32([[2, 0, 0], [0, 3, 0], [0, 0, 1]])
        contents = [Content(letter * 64, 5, 2**60 + 1) for letter in "abc"]
        gallery.add(["Ann", "Bob", "Ann"], rows, [0.9, 0.5, 0.3], ["/p/a", "/p/b", "/pp/c"], contents)
        gallery.commit()
    return gallery_place


def test_search_names_the_most_similar_person(place):
    """Ann is the mean of her images, weighted by quality."""
    with reading(place) as gallery:
        (ann, bob), (only,) = (
            gallery.search(np.float32([[5, 1, 0]]), top=5)[0],
            gallery.search(np.float32([[0, 2, 0.1]]))[0],
        )
        (third,) = gallery.search(np.float32([[0, 0, 2]]))[0]
        assert gallery.search(np.empty((0, 3))) == []
    assert (ann.name, bob.name, only.name, third.name) == ("Ann", "Bob", "Bob", "Ann")
    assert ann.similarity == pytest.approx(5 * 0.9 / np.sqrt(26 * 0.9), rel=1e-5)
    assert bob.similarity == pytest.approx(1 / np.sqrt(26), rel=1e-5)
    assert third.similarity == pytest.approx(0.3 / np.sqrt(0.9), rel=1e-5)
    assert type(bob.similarity) is float and type(bob.name) is str


def test_search_is_exact_and_in_order(gallery_place):
    people = 200
    rows = rng.normal(0, 1, (people, 32)).astype(np.float32)
    with editing(gallery_place) as gallery:
        gallery.add([f"p{i:03}" for i in range(people)], rows, np.ones(people), ["x"] * people)
        gallery.commit()
    probes = rng.normal(0, 1, (7, 32)).astype(np.float32)
    scores = unit(probes) @ unit(rows).T
    with reading(gallery_place) as gallery:
        found = gallery.search(probes, top=3)
    for matches, row in zip(found, scores, strict=True):
        best = np.argsort(-row)[:3]
        assert [match.name for match in matches] == [f"p{i:03}" for i in best]
        np.testing.assert_allclose([match.similarity for match in matches], row[best], atol=1e-5)


def test_a_gallery_of_a_place_answers_as_one_in_memory_does(gallery_place):
    """The same pictures, added and taken away in the same way."""
    names = [f"p{number}" for number in rng.integers(0, 12, 60)]
    rows, qualities = rng.normal(0, 1, (60, 16)), rng.uniform(0, 1, 60)
    qualities[:20] = 0  # so that somebody's pictures all count nothing
    sources, memory = [f"/x/{i % 4}/{i}" for i in range(60)], FileGallery()
    with editing(gallery_place) as kept_gallery:
        for gallery in (memory, kept_gallery):
            for part in (slice(0, 25), slice(25, 60)):
                gallery.add(names[part], rows[part], qualities[part], sources[part])
            gallery.remove("p3")
            gallery.drop(gallery.below("/x/2"))
            gallery.replace([old._replace(name="new") for old in gallery.from_sources(sources[:8])])
        kept_gallery.commit()
    probes = rng.normal(0, 1, (9, 16))
    with reading(gallery_place) as kept_gallery:
        assert kept_gallery.people() == memory.people() and "new" in memory.people()
        for one, other in zip(kept_gallery.search(probes, 30), memory.search(probes, 30), strict=True):
            assert len(one) == len(memory.people()) and dict(one).keys() == dict(other).keys()
            np.testing.assert_allclose([dict(one)[name] for name in dict(other)], list(dict(other).values()), atol=1e-6)
            assert [match.similarity for match in one] == sorted((match.similarity for match in one), reverse=True)


def test_removing_and_adding_change_what_is_found(place):
    with editing(place) as gallery:
        gallery.search(np.float32([[1, 0, 0]]))
        assert gallery.remove("Ann") == 2
        assert gallery.search(np.float32([[1, 0.1, 0]]))[0][0].name == "Bob"
        gallery.add(["Cid"], np.float32([[1, 0, 0]]), [1.0], ["d"])
        assert gallery.search(np.float32([[1, 0.1, 0]]))[0][0].name == "Cid"
        with pytest.raises(ValueError, match="nobody in the gallery is named 'Ann'"):
            gallery.remove("Ann")
        with pytest.raises(ValueError, match=r"embeddings must be \(B, 3\)"):
            gallery.add(["Dee"], np.ones((1, 4)), [1.0], ["e"])
        with pytest.raises(ValueError, match=r"embeddings must be \(B, 3\)"):
            gallery.search(np.ones((1, 4)))
        assert gallery.remove("Bob") + gallery.remove("Cid") == 2
        assert gallery.search(np.ones((2, 3)), top=2) == [[], []] and gallery.people() == {}


def test_only_what_was_committed_survives(place):
    with editing(place) as gallery:
        gallery.remove("Bob")
    with pytest.raises(RuntimeError, match="power cut"), editing(place) as gallery:
        gallery.add(["Cid"], np.float32([[1, 0, 0]]), [1.0], ["d"])
        gallery.commit()
        gallery.add(["Dee"], np.float32([[1, 1, 0]]), [1.0], ["e"])
        gallery.remove("Ann")
        raise RuntimeError("power cut")
    with reading(place) as gallery:
        assert gallery.people() == {"Ann": 2, "Bob": 1, "Cid": 1} and gallery.model == "model"
        assert gallery.search(np.float32([[1, 0, 0.4]]))[0][0].name == "Ann"


def test_a_new_gallery_is_empty_and_nothing_is_left_where_nothing_is_added(gallery_place):
    with editing(gallery_place) as gallery:
        assert (gallery.width, gallery.people(), gallery.model) == (None, {}, "")
        assert gallery.search(np.ones((2, 4))) == [[], []]
        assert gallery.from_sources(["a"]) == gallery.with_digests(["b"]) == gallery.below("/") == []
        gallery.add([], np.empty((0, 4)), [], [])
        with pytest.raises(ValueError, match="nobody in the gallery"):
            gallery.remove("Ann")
    with pytest.raises((FileNotFoundError, ValueError), match="insightface-kprpe gallery add"), reading(gallery_place):
        pass


def test_pictures_are_found_by_where_they_lay_and_what_they_were(place):
    with reading(place) as gallery:
        (bob,) = gallery.from_sources(["/p/b", "/nowhere"])
        assert bob[1:] == ("Bob", "/p/b", Content("b" * 64, 5, 2**60 + 1))
        assert gallery.with_digests(["b" * 64, ""]) == [bob]
        assert [picture.source for picture in gallery.below("/p")] == ["/p/a", "/p/b"]
        assert gallery.below("/p/b") == [bob] and gallery.below("/p/b/c") == [] and len(gallery.below("/")) == 3
        assert gallery.below("/p_") == gallery.below("/%") == []


def test_a_picture_of_another_name_counts_for_that_one(place):
    with editing(place) as gallery:
        (picture,) = gallery.from_sources(["/pp/c"])
        changed = picture._replace(name="Bob", source="/q/c", content=Content("d" * 64, 6, 7))
        gallery.replace([changed])
        gallery.commit()
    with reading(place) as gallery:
        assert gallery.people() == {"Ann": 1, "Bob": 2}
        assert gallery.from_sources(["/q/c"]) == [changed] and gallery.from_sources(["/pp/c"]) == []
        (match,) = gallery.search(np.float32([[0, 0, 1]]))[0]
        assert match.name == "Bob" and match.similarity == pytest.approx(0.3 / np.hypot(0.3, 0.5), rel=1e-5)


def test_dropped_pictures_count_nothing(place):
    with editing(place) as gallery:
        gallery.drop(gallery.from_sources(["/pp/c", "/p/b"]))
        gallery.commit()
    with reading(place) as gallery:
        assert gallery.people() == {"Ann": 1}
        assert gallery.search(np.float32([[1, 0, 0]]), top=2) == [[("Ann", pytest.approx(1, abs=1e-6))]]


def test_what_cannot_be_compared_is_not_added(place):
    with editing(place) as gallery:
        for row, message in ((np.nan, "must be finite"), (0, "must not be zero")):
            with pytest.raises(ValueError, match=message):
                gallery.add(["Eve"], np.float32([[row, 0, 0]]), [1.0], ["e"])
        with pytest.raises(ValueError, match=r"qualities must be in \[0, 1\]"):
            gallery.add(["Eve"], np.float32([[1, 0, 0]]), [1.5], ["e"])
        with pytest.raises(ValueError, match="must have the same length, got 2, 1, 1, 1, 1"):
            gallery.add(["Eve", "Eva"], np.float32([[1, 0, 0]]), [1], ["e"])
        assert gallery.people() == {"Ann": 2, "Bob": 1}


def test_names_are_composed_and_of_any_kind(place):
    odd = 'O\'Brien; "DROP" %s \\ 李'
    with editing(place) as gallery:
        gallery.add(["Zoe\u0308", odd], np.float32([[1, 0, 0], [0, 1, 1]]), [1, 1], ["e", "f"])
        gallery.commit()
    with editing(place) as gallery:
        assert list(gallery.people()) == ["Ann", "Bob", odd, "Zo\u00eb"]
        assert gallery.search(np.float32([[0, 1, 1]]))[0][0].name == odd
        assert gallery.remove("Zoe\u0308") == gallery.remove(odd) == 1


def test_two_writers_take_turns(gallery_place, caplog):
    """The second sees what the first has saved, instead of writing over it."""
    second_waits = threading.Event()

    def add(name):
        with editing(gallery_place) as gallery:
            gallery.add([name], np.ones((1, 4)), [1.0], [name])
            gallery.commit()

    class Signal(logging.Handler):
        def emit(self, record):
            second_waits.set()

    handler = Signal()
    logging.getLogger("insightface_kprpe.app").addHandler(handler)
    try:
        with editing(gallery_place) as gallery:
            other = threading.Thread(target=add, args=("Bob",))
            other.start()
            assert second_waits.wait(60)
            gallery.add(["Ann"], np.ones((1, 4)), [1.0], ["Ann"])
            gallery.commit()
        other.join()
    finally:
        logging.getLogger("insightface_kprpe.app").removeHandler(handler)
    with reading(gallery_place) as gallery:
        assert gallery.people() == {"Ann": 1, "Bob": 1}
    assert "being changed by another process" in caplog.text
