"""Raw records from files, archives and datasets, in shards that are read as streams.

A shard is a plain tuple, so that it can be hashed into the cache key and sent to a worker process. Reading never holds
more than one record (or one parquet batch) in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from silkie.data.registry import SOURCES
from silkie.data.row import short_repr
from silkie.data.schema import DataError
from silkie.data.stamps import fingerprint_of
from silkie.io.archives import is_archive, open_member, read_member, zip_archive
from silkie.io.files import MAX_DOCUMENT_BYTES, MAX_SETTINGS_BYTES, is_below, open_file, read_file
from silkie.io.jsonl import MAX_LINE_BYTES, JsonError, bounded_lines, decode, json_document, json_lines

logger = logging.getLogger(__name__)
SUFFIXES = (".jsonl", ".json", ".parquet")
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "test": "test",
}
SHARD_BYTES = 8 * 2**20
SHARD_ROWS = 2048
PARQUET_BATCH = 64  # rows: images are embedded, so a batch is tens of megabytes at most


class Shard(NamedTuple):
    """A slice of one input: `kind` says how to read `path`.

    kind "jsonl": `start` and `stop` are byte offsets; "parquet": row groups; "json" and "zip": the whole file (`member`
    of the archive); "dataset": row numbers of the loaded dataset. `first` is the number of the first record. `stamp`
    changes when the file does."""

    kind: str
    path: str
    member: str
    start: int
    stop: int
    first: int
    stamp: str
    image_root: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """An opened input: its shards, and what to call it in messages."""

    name: str
    shards: tuple[Shard, ...]
    base: str | None  # where relative image paths start when no image_root is given
    dataset: datasets.Dataset | None = None

    def first(self, count: int) -> Iterator[dict[str, Any]]:
        """The first `count` records that can be parsed, to detect the format from."""
        parsed = (
            record for shard in self.shards for _, record in read(shard, self.dataset) if isinstance(record, dict)
        )
        return itertools.islice(parsed, count)

    def nothing(self) -> DataError:
        """The error for an input without any record; it quotes what the input holds instead."""
        place, found = next((item for shard in self.shards for item in read(shard, self.dataset)), ("", None))
        shown = repr(str(found)[:80]) if isinstance(found, ValueError) else short_repr(found)
        held = f"; {place} is {shown}" if place else ""
        return DataError(f"{self.name}: no record in it (expected JSON objects){held}")


def from_dataset(dataset: datasets.Dataset, name: str) -> Records:
    """The rows of a loaded dataset. Rows are read as Arrow data, so that no image is decoded and no file opened, unless
    `with_transform` or `set_transform` makes them."""
    if dataset.format["type"] == "custom":
        logger.info("%s: its transform is applied once to every row, and what it returns is kept", name)
    else:
        dataset = dataset.with_format("arrow")
    bounds = range(0, len(dataset), SHARD_ROWS)
    fingerprint = fingerprint_of(dataset)
    shards = tuple(
        Shard("dataset", name, "", start, min(start + SHARD_ROWS, len(dataset)), start, fingerprint, None)
        for start in bounds
    )
    return Records(name=name, shards=shards, base=None, dataset=dataset)


def from_path(path: str, split: str) -> Records:
    """Open a file, a directory or a zip archive with JSON, JSONL or parquet files."""
    name = os.path.basename(os.path.normpath(path))
    if os.path.isdir(path):
        return _from_directory(path, name, split)
    with _readable():
        packed = is_archive(path)
    if packed:
        return _from_zip(path, name, split)
    if path.lower().endswith(".zip"):
        raise DataError(f"{path!r} is not a zip archive that can be read; it may be cut off, or still downloading")
    if os.path.basename(path) == "meta.json":
        return _from_meta(path, name)
    if Path(path).suffix.lower() not in SUFFIXES:
        raise DataError(
            f"{path!r}: cannot read a {Path(path).suffix or 'file without suffix'}; expected {', '.join(SUFFIXES)},"
            " .zip or a directory"
        )
    return Records(name=name, shards=tuple(file_shards(path, None)), base=os.path.dirname(os.path.abspath(path)))


def _from_directory(path: str, name: str, split: str) -> Records:
    # Written by save_to_disk
    if any(os.path.exists(os.path.join(path, mark)) for mark in ("state.json", "dataset_dict.json")):
        try:
            saved = datasets.load_from_disk(path)
        except Exception as error:  # `datasets` trusts what it has written: damage ends in any error
            raise DataError(
                f"{path!r} looks like a dataset that was saved to disk, but cannot be read: {error}"
            ) from error
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise DataError(f"{path!r} has no split {split!r}; it has {', '.join(saved)}")
            saved = saved[split]
        return from_dataset(saved, name)
    if os.path.isfile(meta := os.path.join(path, "meta.json")) and _is_index(meta):
        return _from_meta(meta, name)
    found = (file for file in sorted(Path(path).rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file())
    files = [str(file) for file in found if _is_data(file.relative_to(path).parts)]
    files = of_split(_one_format(files, path, SUFFIXES), split, path)
    return Records(
        name=name,
        shards=tuple(shard for file in files for shard in file_shards(file, None)),
        base=os.path.abspath(path),
    )


def _from_zip(path: str, name: str, split: str) -> Records:
    suffixes = (".jsonl", ".json")
    with _readable():
        names = zip_archive(path).namelist()
    members = [name for name in sorted(names) if name.lower().endswith(suffixes) and _is_data(name.split("/"))]
    members = of_split(_one_format(members, path, suffixes), split, path)
    stamp = _stamp(path)
    shards = tuple(
        Shard("zip", os.path.abspath(path), member, 0, 0, 0, stamp, os.path.abspath(path)) for member in members
    )
    return Records(name=name, shards=shards, base=None)


def _from_meta(path: str, name: str) -> Records:
    """MMPR's index: {name: {"root": image directory, "annotation": JSONL}}; paths start at the meta file or at its
    parent directory."""
    folder = Path(path).resolve().parent
    with _readable():
        meta = json_document(read_file(path, limit=MAX_SETTINGS_BYTES), path)
    if not isinstance(meta, dict):
        raise DataError(
            f"{path!r}: found a JSON {type(meta).__name__}, expected an object {{name: {{root, annotation}}}}"
        )
    shards: list[Shard] = []
    for entry, value in meta.items():
        texts = isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("root", "annotation"))
        if not texts:
            raise DataError(
                f"{path!r}, entry {entry!r}: expected an object with the texts 'root' and 'annotation', found"
                f" {short_repr(value)}"
            )
        for key in ("root", "annotation"):
            if not any(is_below(base / value[key], folder.parent) for base in (folder, folder.parent)):
                raise DataError(
                    f"{path!r}, entry {entry!r}: {key} {value[key]!r} lies outside {str(folder.parent)!r}; an index"
                    " names what lies beside it. Load such a file by its own name, with image_root=DIRECTORY"
                )
        annotation = _beside(folder, value["annotation"])
        if annotation is None:
            raise DataError(
                f"{path!r}, entry {entry!r}: annotation file {value['annotation']!r} is neither in {str(folder)!r} nor"
                " in its parent"
            )
        root = _beside(folder, value["root"])
        shards += file_shards(str(annotation), str(root) if root else None)
    return Records(name=name, shards=tuple(shards), base=str(folder))


def _is_index(path: str) -> bool:
    """True for MMPR's meta.json; other data may have a file of that name, too."""
    try:
        meta = json_document(read_file(path, limit=MAX_SETTINGS_BYTES), path)
    except (ValueError, OSError):
        return False
    return isinstance(meta, dict) and any(isinstance(value, dict) and "annotation" in value for value in meta.values())


def _beside(folder: Path, path: str) -> Path | None:
    places = (base / path for base in (folder, folder.parent))
    return next((place for place in places if is_below(place, folder.parent) and place.exists()), None)


def _is_data(parts: Sequence[str]) -> bool:
    """False for hidden files, such as notebook checkpoints and what macOS puts beside every file of an archive."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _one_format(files: list[str], path: str, suffixes: Sequence[str]) -> list[str]:
    """The data files of the first suffix that occurs; .json files beside .jsonl or .parquet ones are descriptions, not
    data."""
    for suffix in (".parquet", ".jsonl", ".json"):
        if chosen := [file for file in files if file.lower().endswith(suffix)]:
            ignored = [file for file in files if file.lower().endswith(".jsonl") and file not in chosen]
            if ignored:
                logger.warning(
                    "%s: reading only its %s files; ignoring %s (pass that file to read it)", path, suffix, ignored[0]
                )
            return chosen
    raise DataError(f"{path!r}: no {', '.join(suffixes)} file in it")


def of_split(files: list[str], split: str, where: str) -> list[str]:
    """The files of a split, by the words in their names; files that name no split are training data."""
    splits: dict[str, list[str]] = {}
    for file in files:
        words = os.path.basename(file).lower().replace(".", "-").replace("_", "-").split("-")
        splits.setdefault(next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train"), []).append(file)
    if split not in splits:
        raise DataError(
            f"{where!r} has no split {split!r}; its files are"
            f" {', '.join(f'{name} ({len(items)})' for name, items in splits.items())}"
        )
    return splits[split]


def file_shards(path: str, image_root: str | None) -> list[Shard]:
    """Cut one file into shards at line or row-group boundaries, so that worker processes can share it."""
    path, suffix, stamp = os.path.abspath(path), Path(path).suffix.lower(), _stamp(path)
    with _readable():
        open_file(path, limit=MAX_DOCUMENT_BYTES if suffix == ".json" and not _is_json_lines(path) else None).close()
    if suffix == ".parquet":
        try:
            metadata = pq.ParquetFile(path).metadata
        except (pa.ArrowException, OSError) as error:
            raise _broken_parquet(path, error) from error
        shards, first = [], 0
        for group in range(metadata.num_row_groups):
            shards.append(Shard("parquet", path, "", group, group + 1, first, stamp, image_root))
            first += metadata.row_group(group).num_rows
        return shards
    if suffix == ".json" and not _is_json_lines(path):
        return [Shard("json", path, "", 0, 0, 0, stamp, image_root)]
    return list(_line_shards(path, stamp, image_root))


def _line_shards(path: str, stamp: str, image_root: str | None) -> Iterator[Shard]:
    start = offset = first = lines = 0
    with open_file(path) as file:
        while block := file.read(min(2**20, SHARD_BYTES)):
            position = 0
            if offset + len(block) - start >= SHARD_BYTES and (end := block.rfind(b"\n")) >= 0:
                lines += block.count(b"\n", 0, end + 1)
                yield Shard("jsonl", path, "", start, offset + end + 1, first, stamp, image_root)
                start, first, position = offset + end + 1, lines, end + 1
            lines += block.count(b"\n", position)
            offset += len(block)
    if offset > start:
        yield Shard("jsonl", path, "", start, offset, first, stamp, image_root)


def _is_json_lines(path: str) -> bool:
    """True for a .json file whose first line is a whole object, with more lines after it."""
    with open_file(path) as file:
        first, error = decode(file.readline(2**24))
        return error is None and isinstance(first, dict) and bool(file.read(2**10).strip())


def _stamp(path: str) -> str:
    status = os.stat(path)
    return f"{status.st_size}:{status.st_mtime_ns}"


def read(shard: Shard, dataset: datasets.Dataset | None = None) -> Iterator[tuple[str, Any]]:
    """(location, record) of every record of a shard. A line that is not JSON is yielded as its ValueError."""
    if shard.kind == "dataset":
        assert dataset is not None
        if dataset.format["type"] == "custom":
            yield from ((f"row {index}", dataset[index]) for index in range(shard.start, shard.stop))
            return
        for start in range(shard.start, shard.stop, PARQUET_BATCH):
            table = dataset[start : min(start + PARQUET_BATCH, shard.stop)]
            rows = (row for batch in table.to_batches() for row in _rows_of(batch))
            yield from ((f"row {index}", record) for index, record in enumerate(rows, start=start))
    elif shard.kind == "parquet":
        yield from _read_parquet(shard)
    elif shard.kind == "json":
        with _readable():
            text = read_file(shard.path)
        yield from _read_json(text, shard.path)
    elif shard.kind == "zip" and shard.member.lower().endswith(".json"):
        with _readable():
            text = read_member(shard.path, shard.member, limit=MAX_DOCUMENT_BYTES)
        yield from _read_json(text, f"{shard.path}/{shard.member}")
    elif shard.kind == "zip":
        with _readable(), open_member(shard.path, shard.member) as file:
            yield from _read_lines(file, 0)
    else:
        with _readable(), open_file(shard.path) as file:
            file.seek(shard.start)
            yield from _read_lines(bounded_lines(file, limit=MAX_LINE_BYTES, stop=shard.stop), shard.first)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """What cannot be read, as a DataError: a FIFO, a damaged archive, a text that is not JSON."""
    try:
        yield
    except (OSError, JsonError) as error:
        raise DataError(str(error)) from error


def _read_lines(lines: Any, first: int) -> Iterator[tuple[str, Any]]:
    for line in json_lines(lines, first=first + 1):
        yield f"line {line.number}", line.value if line.error is None else line.error


def _read_parquet(shard: Shard) -> Iterator[tuple[str, Any]]:
    # without pre-buffering, or a row group of images, often hundreds of megabytes, would be in memory at once
    file, index = pq.ParquetFile(shard.path, memory_map=True, pre_buffer=False, buffer_size=2**16), shard.first
    batches = file.iter_batches(
        batch_size=PARQUET_BATCH, row_groups=list(range(shard.start, shard.stop)), use_threads=False
    )
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _broken_parquet(shard.path, error, f" after row {index - 1}") from error
        if batch is None:
            return
        for record in _rows_of(batch):
            yield f"row {index}", record
            index += 1


def _rows_of(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows of a batch as Python values. A row that cannot be one (text that is not UTF-8, a date beyond Python's)
    comes as a ValueError."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException):
        for index in range(len(batch)):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield ValueError(f"a row that cannot be read: {error}")


def _broken_parquet(path: str, error: Exception, where: str = "") -> DataError:
    return DataError(
        f"{path!r} is not a parquet file that can be read{where}; it may be cut off, or still downloading: {error}"
    )


def _read_json(text: bytes, path: str) -> Iterator[tuple[str, Any]]:
    with _readable():
        records = json_document(text, path)
    if isinstance(records, dict) and any(source.detect(records) for source in SOURCES.values()):
        records = [records]
    elif isinstance(records, dict):  # {"data": [...]}
        records = next((value for value in records.values() if isinstance(value, list)), records)
    if not isinstance(records, list):
        raise DataError(f"{path!r}: found a JSON {type(records).__name__}, expected a list of records")
    for index, record in enumerate(records):
        yield f"row {index}", record
