"""The journal of a server: what was written through is there, what was cut off is not, and damage is noticed."""

import json

import numpy as np
import pytest

from ergodica.run.checkpoint import CheckpointError
from ergodica.run.journal import Journal

RECORDS = [({"kind": "accept", "id": f"0.{i}.0"}, [np.arange(3.0) * i, np.asarray(i, np.int32)]) for i in range(4)]


@pytest.fixture
def path(tmp_path):
    with Journal(tmp_path / "run.journal", {"seed": "1"}) as journal:
        for entry, arrays in RECORDS:
            journal.append(entry, arrays)
    return tmp_path / "run.journal"


def read(path):
    with Journal(path, {"seed": "1"}) as journal:
        return journal.records, journal.dropped


def same(found, expected):
    assert [entry for entry, _ in found] == [entry for entry, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y, strict=True)


def test_what_was_written_is_read(path):
    same(read(path)[0], RECORDS)


def test_cut_at_any_byte_it_holds_the_whole_records_before(path):
    content = path.read_bytes()
    sizes = []
    for cut in range(len(content), -1, -47):
        path.write_bytes(content[:cut])
        records, dropped = read(path)
        same(records, RECORDS[: len(records)])
        sizes.append(len(records))
        if cut < len(content):
            assert dropped > 0 or len(records) < 4
        with Journal(path, {"seed": "1"}) as journal:  # and it is written on after what is whole
            journal.append(*RECORDS[0])
        same(read(path)[0], [*RECORDS[: len(records)], RECORDS[0]])
    assert set(sizes) == {0, 1, 2, 3, 4}


def test_damage_before_the_end_raises(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def test_another_run_and_another_file_are_refused(path, tmp_path):
    with pytest.raises(CheckpointError, match="another run: seed differ"):
        Journal(path, {"seed": "2"})
    (tmp_path / "other").write_text(json.dumps({"a": "this is no journal at all"}))
    with pytest.raises(CheckpointError, match="no journal"):
        Journal(tmp_path / "other", {})


def test_two_servers_cannot_write_at_once(path):
    with Journal(path, {"seed": "1"}), pytest.raises(CheckpointError, match="open in another process"):
        Journal(path, {"seed": "1"})
    same(read(path)[0], RECORDS)
