"""Reading in slices: same rows whatever the slices, nothing decoded, cached, resumed after a stop, flat in memory."""

from __future__ import annotations

import json
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from silkie.data import DataError, load_preferences, raw
from tests.support import preference_files as files


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def pair(index: int, **extra):
    return {"prompt": f"Question {index}" + " x" * (index % 7), "chosen": "yes", "rejected": "no", **extra}


@pytest.mark.parametrize("size", [1, 64, 300, 10**6])
@pytest.mark.parametrize("end", ["\n", "", "\n\n\n"])
def test_slices_of_a_file_give_every_line_once(size, end, tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "SHARD_BYTES", size)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(pair(index, note="é" * index)) for index in range(50)) + end)
    shards = raw.file_shards(str(path), None)
    lines = 50 + max(0, len(end) - 1)
    assert len(shards) == {1: lines, 10**6: 1}.get(size, len(shards))
    found = [item for shard in shards for item in raw.read(shard)]
    assert [location for location, _ in found] == [f"line {index + 1}" for index in range(50)]
    assert [record["prompt"] for _, record in found] == [pair(index)["prompt"] for index in range(50)]


def test_block_reads_cut_lines_right(tmp_path, monkeypatch):
    """Lines longer than the 1 MiB that are read at a time, so that a shard has to wait for its line end."""
    monkeypatch.setattr(raw, "SHARD_BYTES", 2**20)
    path = files.write_lines(tmp_path / "rows.jsonl", [pair(index, note="y" * 1_500_000) for index in range(3)])
    found = [item for shard in raw.file_shards(str(path), None) for item in raw.read(shard)]
    assert [(location, record["prompt"]) for location, record in found] == [
        (f"line {i + 1}", pair(i)["prompt"]) for i in range(3)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_worker_processes_keep_the_order(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "SHARD_BYTES", 500)
    monkeypatch.setattr(raw, "SHARD_ROWS", 7)
    rows = [pair(index) for index in range(60)]
    if kind == "jsonl":
        source = files.write_lines(tmp_path / "rows.jsonl", rows)
    elif kind == "parquet":
        source = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source, row_group_size=7)
    else:
        source = datasets.Dataset.from_list(rows)
    one = load_preferences(source, cache_dir=tmp_path / "one", regroup_pairs=False)
    two = load_preferences(source, cache_dir=tmp_path / "two", regroup_pairs=False, num_proc=2)
    assert one.to_list() == two.to_list() and len(one) == 60


def test_loading_opens_no_image(tmp_path, monkeypatch):
    files.write_images(tmp_path, 1)
    path = files.write_lines(tmp_path / "rows.jsonl", [files.vlfeedback(0)])
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("an image was opened"))
    embedded = datasets.Dataset.from_list([pair(0, image=files.embedded(0))]).cast_column("image", datasets.Image())
    assert load_preferences(path, cache_dir=tmp_path)[0]["images"][0]["path"] == str(tmp_path / "0.png")
    assert load_preferences(embedded, cache_dir=tmp_path)[0]["images"][0]["bytes"] == files.png(0)


def test_a_second_load_reads_nothing(tmp_path, monkeypatch):
    path = files.write_lines(
        tmp_path / "rows.jsonl", [files.group_record(images=[], id=str(index)) for index in range(5)]
    )
    first = load_preferences(path, cache_dir=tmp_path)
    monkeypatch.setattr("silkie.data.convert.stored_row", lambda *_, **__: pytest.fail("a row was converted again"))
    assert load_preferences(path, cache_dir=tmp_path).to_list() == first.to_list()


def test_a_stopped_run_goes_on_at_the_block_it_stopped_in(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "SHARD_BYTES", 300)
    monkeypatch.setattr("silkie.data.convert.BLOCK_SHARDS", 2)
    path = files.write_lines(
        tmp_path / "rows.jsonl", [files.group_record(images=[], id=str(index)) for index in range(40)]
    )
    from silkie.data import convert

    real, converted = convert.stored_row, []

    def stop_at_30(group, *arguments, **options):
        if group.id == "30" and "stopped" not in converted:
            converted.append("stopped")
            raise DataError("the power went out")
        converted.append(group.id)
        return real(group, *arguments, **options)

    monkeypatch.setattr(convert, "stored_row", stop_at_30)
    with pytest.raises(DataError, match="the power went out"):
        load_preferences(path, cache_dir=tmp_path)
    before = converted.index("stopped")
    groups = load_preferences(path, cache_dir=tmp_path)
    assert groups["id"][:] == [str(index) for index in range(40)]
    again = converted[before + 1 :]
    assert int(again[0]) > 20 and again[-1] == "39"


def peak_memory(path, cache) -> int:
    tracemalloc.start()
    try:
        load_preferences(path, cache_dir=cache)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow  # tracing every allocation takes most of the time
def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """Three times the rows: the Python heap grows by row numbers, a small part of the records that were added."""
    monkeypatch.setattr(raw, "SHARD_BYTES", 2**16)  # also the block read at a time, which both files have to exceed
    small, large = (
        files.write_lines(
            tmp_path / f"{count}.jsonl",
            [
                files.group_record(images=[], id=str(index), responses=["good " * 100, "bad " * 100])
                for index in range(count)
            ],
        )
        for count in (1100, 3300)
    )
    load_preferences(small, cache_dir=tmp_path / "warm")
    growth = peak_memory(large, tmp_path / "b") - peak_memory(small, tmp_path / "a")
    assert growth < 0.2 * (large.stat().st_size - small.stat().st_size)
