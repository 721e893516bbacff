"""Which pictures make a verification set's pairs: LFW's ``pairs.txt``, a CSV file, or drawn from folders of people."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import read_text
from .picture_files import list_pictures, nfc, readable_suffixes

PAIRS_FILE = "pairs.txt"
FOLDS = 10
_ANSWERS = {"1": True, "0": False, "true": True, "false": False, "same": True, "different": False}


class PairList(NamedTuple):
    """Pairs of pictures, in their order.

    Attributes:
        pictures: path below the set's folder, with slashes, of 2P pictures; 2i and 2i + 1 are pair i. A file that
            ``pairs.txt`` names has no suffix.
        is_same: P answers.
        folds: how many parts of equal size, one after the other, share no person; 10 where nothing says it.
    """

    pictures: list[str]
    is_same: list[bool]
    folds: int = FOLDS


def read_pair_list(path: str | Path) -> PairList:
    """Read a list of pairs.

    Args:
        path: a ``.csv`` file with the columns ``first,second,is_same``, of which the first two are paths and the last
            is 1 or 0; any other name is taken for LFW's ``pairs.txt``: the first line has the number of pairs of each
            kind, or before it the number of folds; the others ``NAME i j`` for NAME/NAME_000i and NAME/NAME_000j,
            or ``NAME i OTHER j`` for two people. Tabs or spaces are between.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is neither; it is named.
    """
    path = Path(path)
    text = read_text(path, "list of pairs")
    return _parse_csv(text, path) if path.suffix.lower() == ".csv" else _parse_lfw(text, path)


def _parse_lfw(text: str, path: Path) -> PairList:
    lines = [(number, _cells(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or len(lines[0][1]) > 2 or not all(cell.isdecimal() for cell in lines[0][1]):
        raise ValueError(f"{path}: line 1: must be the number of pairs of each kind, or the number of folds before it")
    *folds, of_each = map(int, lines[0][1])
    pictures, is_same = [], []
    for number, cells in lines[1:]:
        names, digits = (cells[:1] * 2, cells[1:]) if len(cells) == 3 else (cells[0::2], cells[1::2])
        if len(names) != 2 or len(digits) != 2 or not all(digit.isdecimal() for digit in digits):
            raise ValueError(f"{path}: line {number}: must be NAME i j, or NAME i OTHER j, got {' '.join(cells)!r:.80}")
        pictures += [f"{nfc(name)}/{nfc(name)}_{int(digit):04d}" for name, digit in zip(names, digits, strict=True)]
        is_same.append(len(cells) == 3)
    expected = 2 * of_each * (folds[0] if folds else 1)
    if len(is_same) != expected:
        raise ValueError(f"{path}: its first line promises {expected} pairs, got {len(is_same)}; is it cut short?")
    if folds and folds[0] < 2:
        raise ValueError(f"{path}: line 1: there must be 2 folds or more, got {folds[0]}")
    return PairList(pictures, is_same, folds[0] if folds else FOLDS)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in (line.strip().split("\t") if "\t" in line else line.split())]


def _parse_csv(text: str, path: Path) -> PairList:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    pictures, is_same = [], []
    try:
        for cells in rows:
            cells = [cell.strip() for cell in cells]
            if not any(cells) or cells == ["first", "second", "is_same"]:
                continue
            if len(cells) != 3 or not all(cells) or cells[2].lower() not in _ANSWERS:
                raise ValueError(f"must be first,second,is_same with 1 or 0 at the end, got {','.join(cells)!r:.80}")
            pictures += [nfc(cell.replace("\\", "/")) for cell in cells[:2]]
            is_same.append(_ANSWERS[cells[2].lower()])
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: line {max(rows.line_num, 1)}: {error}") from error
    if not is_same:
        raise ValueError(f"{path}: holds no pairs")
    return PairList(pictures, is_same)


def draw_pair_list(people: Mapping[str, Sequence[str]], count: int, seed: int = 0, folds: int = FOLDS) -> PairList:
    """Draw pairs, half of them of one person; every person is in one fold only, and no pair is drawn twice.

    Args:
        people: pictures of each person.
        count: of pairs; a multiple of twice the folds.
        seed: of the choice.
        folds: parts that share no person.

    Raises:
        ValueError: the count does not fit, or there are too few people or pictures.
    """
    if count < 2 * folds or count % (2 * folds):
        raise ValueError(f"pairs must be a multiple of {2 * folds}, half of each kind in {folds} folds, got {count}")
    rng = np.random.default_rng(seed)
    half = count // folds // 2
    pictures, is_same = [], []
    for fold, names in enumerate(_deal(people, folds, rng)):
        groups = [people[name] for name in names]
        sizes = np.array([len(group) for group in groups])
        first = np.cumsum(sizes) - sizes
        everybody = [picture for group in groups for picture in group]
        owner = np.repeat(np.arange(len(groups)), sizes)
        same = sum(size * (size - 1) // 2 for size in sizes.tolist())
        different = len(everybody) * (len(everybody) - 1) // 2 - same
        if min(same, different) < half:
            raise ValueError(
                f"{count} pairs need {half} of each kind from the people of every fold, got at most {same} of one "
                f"person and {different} of two in fold {fold}; ask for fewer, or add people with 2 pictures or more"
            )
        pairs = [*_draw(rng, half, sizes, first, owner, True), *_draw(rng, half, sizes, first, owner, False)]
        pictures += [everybody[place] for pair in pairs for place in pair]
        is_same += [True] * half + [False] * half
    return PairList(pictures, is_same, folds)


def _deal(people: Mapping[str, Sequence[str]], folds: int, rng: np.random.Generator) -> list[list[str]]:
    """People of each fold: those with several pictures are dealt first, so that every fold has its share of them."""
    names = list(people)
    shuffled = [names[place] for place in rng.permutation(len(names))]
    shuffled.sort(key=lambda name: len(people[name]) < 2)
    return [shuffled[fold::folds] for fold in range(folds)]


def _draw(
    rng: np.random.Generator, count: int, sizes: np.ndarray, first: np.ndarray, owner: np.ndarray, same: bool
) -> list[tuple[int, int]]:
    """Pairs of places, none twice: a person is drawn, one of their pictures, and another one of theirs or not."""
    several = np.flatnonzero(sizes >= 2)
    drawn: dict[tuple[int, int], None] = {}
    tries = 0
    while len(drawn) < count and tries < 50 * count:
        tries += 1
        person = rng.choice(several) if same else rng.integers(len(sizes))
        if same:
            pair = first[person] + rng.choice(sizes[person], 2, replace=False)
        else:
            pair = np.array([first[person] + rng.integers(sizes[person]), rng.integers(len(owner))])
        if same or owner[pair[1]] != person:
            drawn[int(pair.min()), int(pair.max())] = None
    if len(drawn) < count:  # nearly all pairs that there are: take them in random order
        places = np.arange(len(owner))
        every = [(i, int(j)) for i in range(len(owner)) for j in places[i + 1 :][(owner[i + 1 :] == owner[i]) == same]]
        for number in rng.permutation(len(every)):
            if len(drawn) == count:
                break
            drawn[every[number]] = None
    return list(drawn)


def find_pictures(folder: Path, names: Sequence[str]) -> list[Path]:
    """The file of each name, below the folder or its ``images``; where there is none, where it would be.

    Args:
        folder: of the set.
        names: of :class:`PairList`, with or without suffix; letters count as composed Unicode.
    """
    by_name: dict[str, Path] = {}
    for path in list_pictures(folder):
        whole = nfc(path.relative_to(folder).as_posix())
        for name in (whole, whole.removeprefix("images/")):
            by_name[name] = path
            by_name.setdefault(_without_suffix(name), path)
    # A list made for photos finds their crops, which are other kinds of files.
    return [by_name.get(name) or by_name.get(_without_suffix(name)) or folder / name for name in names]


def _without_suffix(name: str) -> str:
    suffix = Path(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in readable_suffixes() else name
