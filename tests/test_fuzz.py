import pytest
from fuzz.harness import Reader, outcome, try_all
from fuzz.mutator import mutate, mutate_document
from fuzz.readers import READERS

COUNT = 40  # for each reader; `make fuzz` tries many more


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_a_sentence_that_names_them(name):
    reader = READERS[name]
    if name == "TinyFace .mat":
        pytest.importorskip("scipy")
    found = try_all(name, reader, COUNT)
    assert not found.by_outcome["raw"] + found.by_outcome["traceback"]
    assert found.by_outcome["clean"] or reader.heals
    assert found.memory < 1 << 30


@pytest.mark.parametrize(
    ("change", "data"), [(mutate, bytes(range(256)) * 4), (mutate_document, b'{"a": [1, {"b": 2}]}')]
)
def test_damage_is_the_same_for_the_same_seed(change, data):
    assert [change(data, f"a {i}") for i in range(20)] == [change(data, f"a {i}") for i in range(20)]
    assert len({change(data, f"a {i}") for i in range(20)}) > 10


def test_a_reader_that_fails_badly_is_noticed(tmp_path):
    def failing(error):
        def read(folder):
            raise error

        return Reader(lambda folder: None, "a.txt", read)

    for error, expected in (
        (KeyError("x"), "traceback"),
        (EOFError(), "raw"),
        (ValueError("no name"), "raw"),
        (ValueError(f"{tmp_path / 'a.txt'}: wrong"), "clean"),
    ):
        assert outcome(failing(error), tmp_path, b"sound", "seed")[0] == expected
