"""The reader of JSON lines and the files that are only appended to."""

from __future__ import annotations

import json
import os

import pytest

from silkie.io.journal import Appender, scan, truncate
from silkie.io.jsonl import json_lines


def test_lines_keep_their_numbers_and_broken_ones_say_why():
    lines = [b'{"a": 1}\n', b"  \n", b'{"a": \n', b"\xff\n", b"[" * 100_000 + b"\n", '"\u2028"'.encode()]
    read = list(json_lines(lines, first=5))
    assert [line.number for line in read] == [5, 7, 8, 9, 10]
    assert [line.value for line in read] == [{"a": 1}, None, None, None, "\u2028"]
    assert [line.error is None for line in read] == [True, False, False, False, True]
    assert read[1].problem.startswith("Expecting value at column 7 of")
    assert "utf-8" in read[2].problem and read[3].problem.startswith("nested too deeply to be read in '[[[")


def test_a_journal_is_scanned_with_offsets_and_cut_off(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"id": 1}\n[2]\n\n{"id": 3}')
    entries = list(scan(path))
    assert [(entry.number, entry.record, entry.ended) for entry in entries] == [
        (1, {"id": 1}, True),
        (2, None, True),
        (3, None, True),
        (4, {"id": 3}, False),
    ]
    assert [entry.end for entry in entries] == [10, 14, 15, 24]
    assert truncate(path, 24) == 0 and path.read_bytes().endswith(b'{"id": 3}\n')
    assert truncate(path, 10) == 15 and path.read_bytes() == b'{"id": 1}\n'
    assert truncate(path, 0) == 10 and path.read_bytes() == b""


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    file = Appender(path, sync=True)
    file.write(b'{"id": 1}\n')
    real = os.write

    def full(descriptor, data):
        if len(data) > 5:
            return real(descriptor, bytes(data[:5]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device: .*j.jsonl"):
        file.write(b'{"id": 2}\n')
    monkeypatch.undo()
    file.write(b'{"id": 3}\n')
    assert file.size == 20
    file.close()
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == [1, 3]
