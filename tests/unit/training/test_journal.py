"""A file of arrays that was cut, damaged or is of something else gives the records before that, and is written on."""

from pathlib import Path

import numpy as np
import pytest

from mpo_megatron.training.journal import Journal

LABELS = [np.array([3, 4, 5]), np.array([0]), np.array([1, 2])]
VALUES = [np.array(values, dtype=np.float32) for values in ([-1.5, -2.25, np.nan], [-3e38], [-0.0, -7.0])]
ENDS = [
    4 + 12,
    4 + 12 + 4 + 4,
    4 + 12 + 4 + 4 + 4 + 8,
]  # bytes: of each record four of checksum, then the values


def written(path: Path) -> bytes:
    journal = Journal(path, LABELS)
    assert journal.found == []
    for values in VALUES:
        journal.append(values)
    return path.read_bytes()


def same(found: list, values: list) -> bool:
    return [one.tobytes() for one in found] == [one.tobytes() for one in values]


def test_what_was_appended_is_found(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "journal"
    assert len(written(path)) == ENDS[-1]
    journal = Journal(path, LABELS)
    assert same(journal.found, VALUES)
    journal.remove()
    assert not path.exists()


@pytest.mark.parametrize("length", range(ENDS[-1]))
def test_a_write_that_was_cut_short_costs_its_record_alone(length: int, tmp_path: Path) -> None:
    content = written(tmp_path / "journal")
    (tmp_path / "journal").write_bytes(content[:length])
    journal = Journal(tmp_path / "journal", LABELS)
    whole = sum(end <= length for end in ENDS)
    assert same(journal.found, VALUES[:whole])
    for values in VALUES[whole:]:
        journal.append(values)
    assert (tmp_path / "journal").read_bytes() == content


@pytest.mark.parametrize("place", range(ENDS[-1]))
def test_a_damaged_record_ends_the_file(place: int, tmp_path: Path) -> None:
    content = bytearray(written(tmp_path / "journal"))
    content[place] ^= 1
    (tmp_path / "journal").write_bytes(content)
    assert same(Journal(tmp_path / "journal", LABELS).found, VALUES[: sum(end <= place for end in ENDS)])


def test_records_of_something_else_are_none(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    other = [LABELS[0], np.array([6]), LABELS[2]]  # as many values, of other responses
    assert same(Journal(tmp_path / "journal", other).found, VALUES[:1])
    assert (tmp_path / "journal").stat().st_size == ENDS[0]
