"""Records to stored groups: the generator behind the Arrow cache files, and a report of the rows it dropped."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.fingerprint import Hasher

from silkie.data import raw
from silkie.data.check import check_group, check_no_video, is_aspect
from silkie.data.images import ImageError, is_remote
from silkie.data.pairs import PairOptions
from silkie.data.registry import Source, code_digest
from silkie.data.reports import LoadReport, OnError, Problem, unforeseen
from silkie.data.resolver import ImageResolver
from silkie.data.row import Found, Row
from silkie.data.schema import OPTIONAL, DataError, Group, RowError, SkipRow, group_features
from silkie.data.stored import NoPairs, stored_row

BLOCK_SHARDS = 16  # at most 128 MiB of JSON lines, or 32,768 rows of a dataset
PROBLEM, NOTES = "_problem", "_notes"  # helper columns of the cache file, removed before the dataset is returned
MOST_LOOKED_AT = 2000  # records, broken ones included, from which the aspects are learnt
STARTED = "started"  # a marker file: the block is being converted now and does not come from the cache
REMEDY = "Repair the row, or drop and count such rows with on_error='skip' (in training: on_bad_row='skip')."


class Lookup(NamedTuple):
    """An image named by a record, and where to look for it: below `root`, first in the directory `beside`."""

    root: str | None
    beside: str | None
    image: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `_rows` needs to know; part of the cache key."""

    source: Source
    name: str
    options: PairOptions
    aspects: tuple[str, ...]
    base: str | None
    image_root: str | None
    on_error: OnError
    allow_remote: bool
    need_pairs: bool
    scale: tuple[float, float]

    def resolver(self, root: str | None) -> ImageResolver:
        return ImageResolver(root, self.base, allow_remote=self.allow_remote)

    def empty_row(self) -> dict[str, Any]:
        return dict.fromkeys([*group_features(self.aspects), *OPTIONAL])


def write_groups(
    records: raw.Records, settings: Settings, num_proc: int | None, cache_dir: str | os.PathLike | None
) -> datasets.Dataset:
    """Convert all records into Arrow cache files; every record becomes one row, a dropped one with its problem.

    Each block of shards has its own cache file, so that an interrupted run resumes at the block it was in.
    """
    features = group_features(settings.aspects)
    features.update(OPTIONAL)
    features[PROBLEM] = datasets.Value("string")
    features[NOTES] = datasets.List(datasets.Value("string"))
    version = [
        code_digest(settings.source),
        None if settings.image_root is None else os.stat(settings.image_root).st_mtime_ns,
    ]
    size = BLOCK_SHARDS * math.ceil((num_proc or 1) / BLOCK_SHARDS)
    blocks = [list(records.shards[start : start + size]) for start in range(0, len(records.shards), size)]
    with tempfile.TemporaryDirectory(prefix="silkie-") as outbox:

        def convert(block: list[raw.Shard], now_found: list[Lookup]) -> datasets.Dataset:
            try:
                return datasets.Dataset.from_generator(
                    _rows,
                    features=features,
                    gen_kwargs={"shards": block, "dataset": records.dataset, "settings": settings, "outbox": outbox},
                    num_proc=None if num_proc is None else max(1, min(num_proc, len(block))),
                    cache_dir=None if cache_dir is None else os.fspath(cache_dir),
                    fingerprint=Hasher.hash([version, block, settings, now_found]),
                )
            except Exception as error:
                if (posted := _posted(outbox)) is not None:
                    raise posted from None
                if (cause := _disk_error(error)) is not None:
                    place = datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir
                    raise OSError(
                        f"{records.name}: reading it, or writing its groups to the cache in {os.fspath(place)!r},"
                        f" failed: {cause}. Where the disk is full, free some space and start again (what is complete"
                        " is kept), or pass another cache_dir."
                    ) from error
                raise

        # `datasets` cannot write a file of no rows
        filled = [block for block in blocks if any(True for shard in block for _ in raw.read(shard, records.dataset))]
        written = [_up_to_date(partial(convert, block), settings, Path(outbox, STARTED)) for block in filled]
    if not written:
        raise records.nothing()
    return datasets.concatenate_datasets(written)


def sound_aspects(records: raw.Records, settings: Settings, count: int) -> set[str]:
    """The rating aspects of the first `count` records that can be groups. A record that will be dropped names none: one
    whose `annotations` are the text "N/A" would add the aspects "N", "/" and "A" to every row."""
    names: set[str] = set()
    assert settings.source.aspects is not None
    sound = 0
    rows = _records(records.shards, records.dataset, settings, _Lookout)
    for row, record in itertools.islice(rows, MOST_LOOKED_AT):
        if sound == count:
            break
        with contextlib.suppress(Exception):  # a broken row: reported with its place when the rows are read
            check_group(_columns(settings.source.adapt(row)), row)
            found = set(settings.source.aspects(record))
            if all(map(is_aspect, found)):
                names |= found
                sound += 1
    return names


class _Lookout(ImageResolver):
    """Looks for images, but fetches none."""

    def resolve(self, value: Any) -> dict[str, Any]:
        remote = isinstance(value, str) and is_remote(value) and self.allow_remote
        return {"bytes": b"", "path": value} if remote else super().resolve(value)


def _columns(group: Group) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in fields(group)}


def _up_to_date(
    convert: Callable[[list[Lookup]], datasets.Dataset], settings: Settings, started: Path
) -> datasets.Dataset:
    """A converted block. A cached block is converted again if a previously missing image is now available."""
    now_found: list[Lookup] = []
    while True:
        started.unlink(missing_ok=True)
        part = convert(now_found)
        new = [] if started.exists() else _found(_missing_images(part), settings)
        if not new:
            return part
        now_found = sorted([*now_found, *new], key=repr)  # part of the cache key


def _missing_images(part: datasets.Dataset) -> set[Lookup]:
    """Images that were missing when the block was converted."""
    lookups: set[Lookup] = set()
    for batch in part.select_columns([PROBLEM]).with_format("arrow").iter(batch_size=10_000):
        packed = (json.loads(problem) for problem in batch[PROBLEM].drop_null().to_pylist())
        lookups.update(Lookup(*lookup) for *_, lookup in packed if lookup)
    return lookups


def _found(lookups: set[Lookup], settings: Settings) -> list[Lookup]:
    """The lookups whose image is available now."""
    roots = {lookup.root for lookup in lookups}
    resolvers = {root: settings.resolver(root) for root in roots if root is None or os.path.exists(root)}
    found = []
    for lookup in lookups:
        if (resolver := resolvers.get(lookup.root)) is not None:
            resolver.beside = lookup.beside
            with contextlib.suppress(ImageError):
                resolver.resolve(lookup.image)
                found.append(lookup)
    return found


def _disk_error(error: Exception) -> str | None:
    """The operating system's message behind the general error of `datasets`; a worker process passes it on only as the
    text of a traceback."""
    if isinstance(error.__cause__, OSError):
        return str(error.__cause__)
    told = re.search(r"^OSError: (.+)$", str(error.__cause__), re.MULTILINE)
    return told and told[1]


def _posted(outbox: str) -> DataError | None:
    """The error that a worker process wrote to `outbox`. It cannot be raised through: `datasets` replaces what a
    generator raises, and an exception's cause is lost between processes."""
    found = sorted(Path(outbox).glob("*.error"))
    return pickle.loads(found[0].read_bytes()) if found else None


def _rows(
    shards: list[raw.Shard], dataset: datasets.Dataset | None, settings: Settings, outbox: str
) -> Iterator[dict[str, Any]]:
    """Stored rows of some shards. Runs in the worker processes."""
    Path(outbox, STARTED).touch()
    for shard in shards:
        try:
            for row, record in _records([shard], dataset, settings):
                yield _row(row, record, settings)
        except DataError as error:
            Path(outbox, f"{shard.first:012d}-{os.getpid()}.error").write_bytes(pickle.dumps(error))
            raise


def _records(
    shards: Iterable[raw.Shard],
    dataset: datasets.Dataset | None,
    settings: Settings,
    resolver: type[ImageResolver] = ImageResolver,
) -> Iterator[tuple[Row, Any]]:
    """Every record of some shards, as a row that knows its place and where its images are, and as it was read."""
    resolvers: dict[str | None, ImageResolver] = {}
    for shard in shards:
        root = settings.image_root or shard.image_root
        if root not in resolvers:
            resolvers[root] = resolver(root, settings.base, allow_remote=settings.allow_remote)
        resolvers[root].beside = None if settings.image_root else _folder(shard)
        place = _place(settings.name, shard)
        for location, record in raw.read(shard, dataset):
            columns = record if isinstance(record, dict) else {}
            yield Row(columns, place, location, resolvers[root], settings.scale), record


def _row(row: Row, record: Any, settings: Settings) -> dict[str, Any]:
    """The stored row of one record; for a dropped record an empty row with the problem."""
    try:
        if not isinstance(record, dict):
            raise row.error(
                "(record)", Found(str(record)) if isinstance(record, ValueError) else record, "a JSON object"
            )
        name = f"{settings.name.rsplit(' (', 1)[0]}:{row.location.replace(' ', '-')}"
        group = settings.source.adapt(row)
        check_no_video(record, group.prompt, row)
        stored, notes = stored_row(
            group, row, settings.options, settings.aspects, fallback_id=name, need_pairs=settings.need_pairs
        )
        return {**stored, PROBLEM: None, NOTES: notes}
    except NoPairs as problem:
        return {
            **settings.empty_row(),
            PROBLEM: _pack("no pairs", row, str(problem), f"{row.location}: {problem}"),
            NOTES: problem.notes,
        }
    except SkipRow as problem:
        return {
            **settings.empty_row(),
            PROBLEM: _pack("skipped", row, str(problem), f"{row.location}: {problem}"),
            NOTES: [],
        }
    except RowError as problem:
        return _broken_row(problem, row, settings)
    except DataError:
        raise
    except Exception as problem:  # a source or a pair function of the user's own may raise anything
        return _broken_row(unforeseen(problem, row, settings.source.name), row, settings)


def _broken_row(error: RowError, row: Row, settings: Settings) -> dict[str, Any]:
    if settings.on_error == "raise":
        raise (
            error
            if error.hint
            else RowError(error.source, error.row, error.column, error.found, error.expected, REMEDY)
        )
    lookup = None if row.lacking is None else Lookup(row.resolver.explicit_root, row.resolver.beside, row.lacking)
    return {**settings.empty_row(), PROBLEM: _pack("error", row, error.reason, str(error), lookup), NOTES: []}


def _folder(shard: raw.Shard) -> str | None:
    """The directory of a data file, where paths start: in the file system, or in the archive that holds it."""
    if shard.kind == "zip":
        return os.path.dirname(shard.member)
    return None if shard.kind == "dataset" or shard.image_root else os.path.dirname(shard.path)


def _place(name: str, shard: raw.Shard) -> str:
    """The source, with the file where it is read from several."""
    file = os.path.basename(shard.member or shard.path) if shard.kind != "dataset" else ""
    return name if not file or name.startswith(file) else f"{name}, {file}"


def _pack(kind: str, row: Row, reason: str, message: str, lookup: Lookup | None = None) -> str:
    return json.dumps([kind, row.location, reason, message, lookup])


def sound_rows(written: datasets.Dataset, report: LoadReport) -> datasets.Dataset:
    """Move the helper columns into the report and return the sound rows."""
    sound: list[int] = []
    helper, offset = written.select_columns([PROBLEM, NOTES, *OPTIONAL]).with_format("arrow"), 0
    unused = set(OPTIONAL)
    for batch in helper.iter(batch_size=10_000):
        for index, packed in enumerate(batch[PROBLEM].to_pylist()):
            if packed is None:
                sound.append(offset + index)
            else:
                kind, row, reason, message, _ = json.loads(packed)
                report.problems.append(Problem(kind=kind, row=row, reason=reason, message=message))
        report.notes.update(note for notes in batch[NOTES].to_pylist() for note in notes or [])
        unused -= {name for name in unused if batch[name].null_count < len(batch)}
        offset += len(batch)
    dataset = written.remove_columns([PROBLEM, NOTES, *sorted(unused)])
    return dataset if len(sound) == len(written) else dataset.select(sound)
