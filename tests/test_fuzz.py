import pytest
from fuzz.mutator import mutate
from fuzz.readers import READERS, Reader, outcome, try_all

COUNT = 40  # for each reader; `make fuzz` tries many more


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_in_a_sentence_that_names_them(name):
    found = try_all(name, COUNT)
    assert not found["raw"] + found["traceback"]
    assert found["clean"] or name == "property"  # of which `rec inspect` says that it is damaged, and goes on


def test_damage_is_the_same_for_the_same_seed():
    data = bytes(range(256)) * 4
    assert [mutate(data, f"a {i}") for i in range(20)] == [mutate(data, f"a {i}") for i in range(20)]
    assert len({mutate(data, f"a {i}") for i in range(20)}) > 15


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
