"""Checks the redundant entries of a record file against each other: record 0, ids, identity records and labels."""

from __future__ import annotations

import logging

import numpy as np

from ..files import read_text
from .record_format import RecordError
from .recordio import RecordReader

logger = logging.getLogger(__name__)

_FIRST = 16  # records at the start of the file that show whether ids are positions
_SAMPLE = 64  # more of them, spread over the file
_NEAR = 16  # an id so near to its key is that of a neighbor; others come from merged files
_NAMED = 5  # contradictions of a kind that are listed one by one


def check_records(reader: RecordReader, labels: np.ndarray) -> None:
    """The checks that cost next to nothing, for every use of a set; ``rec inspect`` makes all of them.

    Args:
        reader: of the file.
        labels: (N,) of its images.

    Raises:
        RecordError: the index belongs to another file or is shifted, or a label is beyond the number of people.
    """
    check_index(reader)
    for fault in _beyond(reader, labels)[:1]:
        raise RecordError(f"{reader.path}: {fault}")
    people = int(labels.max()) + 1 if len(labels) else 0
    distinct = len(np.unique(labels)) if people > len(labels) // 4 else people
    if people > 2 * distinct:
        logger.warning(
            "%s: labels go up to %d, but only %d people have images; classes without images cost memory and time: "
            "`insightface-kprpe rec repack` renumbers them",
            reader.path,
            people - 1,
            distinct,
        )


def check_index(reader: RecordReader) -> None:
    """Check some records' own ids, when the order of images decides which landmarks are theirs.

    Raises:
        RecordError: the index belongs to another file or is shifted.
    """
    spread = np.linspace(0, len(reader) - 1, min(_SAMPLE, len(reader))).round().astype(int)
    for fault in _shifted(reader, reader.keys[np.unique(spread)])[:1]:
        raise RecordError(f"{reader.path}: {fault}")


def find_contradictions(reader: RecordReader, labels: np.ndarray) -> list[str]:
    """Everything that does not agree, in words: of each kind the first few, and how many more there are."""
    kinds = (_shifted(reader, reader.keys), _beyond(reader, labels), _identities(reader, labels), _property(reader))
    messages = []
    for faults in kinds:
        more = [f"... and {len(faults) - _NAMED} more of this kind"] if len(faults) > _NAMED else []
        messages += faults[:_NAMED] + more
    return messages


def _shifted(reader: RecordReader, keys: np.ndarray) -> list[str]:
    """Records whose id is a neighbor's key, in a file whose ids are keys."""
    # Only where ids count the records as they lie: some writers put 0, or the label, in their place.
    first = reader.first_ids(_FIRST)
    if first != list(range(len(first))) or len(first) < 2:
        return []
    start = reader.keys[: len(first)]
    keys = np.unique(np.concatenate([start, keys]))
    ids = reader.ids(keys)
    wrong = (ids != keys) & (np.abs(ids - keys) <= _NEAR)
    return [
        f"record {key} claims to be record {id_}; the .idx is shifted or belongs to another file; delete it to "
        "have the .rec scanned"
        for key, id_ in zip(keys[wrong].tolist(), ids[wrong].tolist(), strict=True)
    ]


def _beyond(reader: RecordReader, labels: np.ndarray) -> list[str]:
    """Labels that are not below the number of people that record 0 says."""
    people = reader.identities
    if people is None:
        return []
    return [
        f"record {reader.image_keys[row]} has label {labels[row]}, but record 0 says that there are {people} people; "
        "`insightface-kprpe rec repack` renumbers the labels"
        for row in np.flatnonzero(labels >= people)
    ]


def _identities(reader: RecordReader, labels: np.ndarray) -> list[str]:
    """Identity records that do not say where the images of one person are."""
    faults, first_row, expected = [], len(reader.image_keys) + 1, 1
    if reader.identities is None or len(reader) == first_row:
        return faults
    identity_keys = reader.keys[first_row : first_row + reader.identities]  # others may follow
    for key in map(int, identity_keys):
        bounds = reader[key][0].label
        if np.shape(bounds) != (2,) or not np.isfinite(bounds).all():
            faults.append(f"identity record {key} must have two finite labels, got {bounds}")
            continue
        first, end = (int(bound) for bound in bounds)
        within = labels[max(first - 1, 0) : end - 1]
        if end - expected < 1 << 24 and first != expected:
            faults.append(f"identity record {key} starts at image {first}, the previous one ended at {expected}")
        elif len(within) and (within != within[0]).any():
            faults.append(f"identity record {key} has images {first} to {end - 1}, whose labels differ")
        expected = end
    if reader.identities != len(identity_keys):
        faults.append(f"record 0 says that there are {reader.identities} people, identity records {len(identity_keys)}")
    return faults


def _property(reader: RecordReader) -> list[str]:
    """A property file with another number of people than record 0."""
    file = reader.path.with_name("property")
    if not file.is_file() or reader.identities is None:
        return []
    try:
        text = read_text(file)
        people = int(text.split(",")[0])
    except ValueError as error:
        return [f"the property file is damaged: {error}"]
    return (
        [] if people == reader.identities else [f"the property file says {people} people, record 0 {reader.identities}"]
    )
