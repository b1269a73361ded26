"""The journal: what survives a kill, what is refused, and who may write."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from silkie.feedback.journal import Journal, JournalError, encode_line, read_journal, record_offsets
from silkie.io import journal as module


def append_all(journal: Journal, records: list[dict]) -> None:
    async def run() -> None:
        await asyncio.gather(*(journal.append(record) for record in records))

    asyncio.run(run())


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    records = [{"id": str(i), "text": "naïve 漢字 \u2028 \n end"} for i in range(50)]
    with Journal(path) as journal:
        append_all(journal, records)
    assert list(read_journal(path)) == records
    assert len(path.read_bytes().splitlines()) == 50
    seen: list[dict] = []
    with Journal(path, on_record=seen.append) as journal:
        append_all(journal, [{"id": "new"}])
    assert seen == records
    assert list(read_journal(path))[-1] == {"id": "new"}


def test_half_a_surrogate_pair_is_kept(tmp_path):
    record = {"id": "a", "raw": "broken \ud83d end"}
    assert json.loads(encode_line(record)) == record


def test_cut_at_every_byte_the_whole_lines_survive(tmp_path):
    path = tmp_path / "j.jsonl"
    lines = [encode_line({"id": str(i), "text": "é" * i}) for i in range(3)]
    whole = b"".join(lines)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        seen: list[dict] = []
        with Journal(path, on_record=seen.append) as journal:
            append_all(journal, [{"id": "next"}])
        complete = sum(cut >= sum(map(len, lines[: i + 1])) - 1 for i in range(3))  # whole even without its line break
        assert [record["id"] for record in seen] == [str(i) for i in range(complete)]
        assert [record["id"] for record in read_journal(path)] == [*(str(i) for i in range(complete)), "next"]


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b'{"id": 1', b"[1, 2]\n", b"garbage\n"])
def test_a_damaged_last_line_is_removed(tmp_path, tail, caplog):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"id": "a"}\n' + tail)
    with Journal(path):
        pass
    assert path.read_bytes() == b'{"id": "a"}\n'
    assert "incomplete last line" in caplog.text


def test_a_file_that_never_was_a_journal_is_kept(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary")
    with pytest.raises(JournalError, match="not a journal"), Journal(path):
        pass
    assert path.read_text() == "dear diary"


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": \n{"id": "c"}\n')
    with pytest.raises(JournalError, match="line 2 is not a JSON object"), Journal(path):
        pass
    assert path.read_bytes().count(b"\n") == 3, "nothing was changed"
    with pytest.raises(JournalError, match="line 2"):
        list(read_journal(path))


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as first:
        with pytest.raises(JournalError, match="another process is writing this journal"), Journal(path):
            pass
        append_all(first, [{"id": "a"}])
    with Journal(path) as again:
        append_all(again, [{"id": "b"}])
    assert [record["id"] for record in read_journal(path)] == ["a", "b"]


def test_a_record_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (synced.append(path.stat().st_size), real(fd))[1])
    with Journal(path) as journal:
        synced.clear()
        append_all(journal, [{"id": "a"}])
        assert synced == [path.stat().st_size]
        synced.clear()
        append_all(journal, [{"id": str(i)} for i in range(200)])
        assert len(synced) < 20, "records that arrive together share a flush"
        assert synced[-1] == path.stat().st_size


def test_a_closed_journal_says_so_to_whoever_appends(tmp_path):
    async def late() -> None:
        with Journal(tmp_path / "j.jsonl") as journal:
            pass
        with pytest.raises(JournalError, match="closed"):
            await asyncio.wait_for(journal.append({"id": "x"}), timeout=5)

    asyncio.run(late())


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        append_all(journal, [{"id": "a"}])
        real = os.write

        def full(descriptor, data):
            if len(data) > 5:
                return real(descriptor, bytes(data[:5]))
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="No space left on device: .*j.jsonl"):
            append_all(journal, [{"id": "b"}])
        monkeypatch.undo()
        append_all(journal, [{"id": "c"}])
    assert [record["id"] for record in read_journal(path)] == ["a", "c"]


def test_offsets_name_the_last_line_of_an_id(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for value, item in enumerate("aba"):
            append_all(journal, [{"id": item, "value": value}])
    offsets = record_offsets(path)
    with path.open("rb") as file:
        file.seek(offsets["a"])
        assert json.loads(file.readline())["value"] == 2
    assert set(offsets) == {"a", "b"}
