import numpy as np
import pytest

from insightface_kprpe.data import sampler as module
from insightface_kprpe.data.sampler import EpochSampler, ImagesOfPeople


@pytest.fixture
def labels():
    """2,000 images of 150 people, mixed up; some have one image, some a hundred."""
    rng = np.random.default_rng(0)
    return rng.permutation(np.sort((rng.random(2000) ** 3 * 150).astype(np.int64)))


def flat(sampler):
    return [index for batch in sampler for index in batch]


def test_ranks_share_every_block():
    alone = list(EpochSampler(103, batch_size=10, seed=1))
    ranks = [list(EpochSampler(103, batch_size=5, rank=rank, world_size=2, seed=1)) for rank in range(2)]
    assert len(alone) == len(ranks[0]) == 10
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    assert len({index for batch in alone for index in batch}) == 100


def test_it_continues_in_the_middle_and_changes_with_the_epoch():
    sampler = EpochSampler(50, batch_size=5)
    first = list(sampler)
    sampler.set_position(0, 7)
    assert len(sampler) == 3 and list(sampler) == first[7:]
    sampler.set_position(1, 0)
    assert list(sampler) != first


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_repetitions_are_images_of_the_person_before(labels, probability):
    plain = np.array(flat(EpochSampler(2000, 10, seed=3)))
    order = np.array(flat(EpochSampler(2000, 10, seed=3, repetition=probability, labels=labels)))
    assert len(order) == len(plain) == 2000
    changed = np.flatnonzero(order != plain)
    assert (labels[order[changed]] == labels[order[changed - 1]]).all()
    # a few of the drawn are the one that stood there anyway
    assert abs(len(changed) / 2000 - probability) < 3 * np.sqrt(probability * (1 - probability) / 2000)
    same_person = (labels[order[1:]] == labels[order[:-1]]).mean()
    by_chance = (labels[plain[1:]] == labels[plain[:-1]]).mean()
    assert same_person > probability * 0.9 + by_chance


def test_repetitions_do_not_depend_on_the_number_of_ranks_nor_on_where_a_run_starts(labels):
    options = {"seed": 5, "repetition": 0.5, "labels": labels}
    alone = list(EpochSampler(2000, 20, **options))
    for world_size in (2, 4):
        ranks = [list(EpochSampler(2000, 20 // world_size, rank, world_size, **options)) for rank in range(world_size)]
        shared = [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)]
        assert shared == alone
    halves = list(EpochSampler(2000, 10, **options))  # two batches per step
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == alone
    assert flat(EpochSampler(2000, 30, **options)) == flat(alone)[:1980]
    sampler = EpochSampler(2000, 20, **options)
    assert list(sampler) == alone
    sampler.set_position(0, 60)
    assert list(sampler) == alone[60:]
    sampler.set_position(1, 0)
    assert list(sampler) != alone


def test_large_epochs_are_worked_through_in_parts(labels, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 64)
    plain = np.array(flat(EpochSampler(2000, 10, seed=3)))
    order = np.array(flat(EpochSampler(2000, 10, seed=3, repetition=0.5, labels=labels)))
    assert (order[::64] == plain[::64]).all()  # the first of a part repeats nobody
    assert 0.4 < (order != plain).mean() < 0.55


def test_every_image_of_a_person_is_drawn_equally_often():
    people = ImagesOfPeople(np.array([7, 3, 7, 7, 3, 9]))
    draws = np.linspace(0, 1, 999, endpoint=False, dtype=np.float32)
    assert np.bincount(people.draw(np.full(999, 2), draws), minlength=6).tolist() == [333, 0, 333, 333, 0, 0]
    assert set(people.draw(np.full(999, 4), draws)) == {1, 4}
    assert people.draw(np.array([5, 5]), np.array([0.0, np.nextafter(np.float32(1), 0)])).tolist() == [5, 5]


def test_mistakes_are_named(labels):
    with pytest.raises(ValueError, match="images per rank: 3 images"):
        EpochSampler(3, batch_size=4)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        EpochSampler(2000, 10, repetition=1.0, labels=labels)
    with pytest.raises(ValueError, match="labels of all 1999 images, got 2000"):
        EpochSampler(1999, 10, repetition=0.5, labels=labels)
    with pytest.raises(ValueError, match="got 0"):
        EpochSampler(1999, 10, repetition=0.5)
