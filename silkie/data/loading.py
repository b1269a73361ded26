"""`load_preferences`: any supported source -> a `datasets.Dataset` of preference groups in Arrow cache files."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import datasets

from silkie.data import raw
from silkie.data import sources as _sources  # noqa: F401  (registers the built-in formats)
from silkie.data.check import is_aspect
from silkie.data.columns import reading
from silkie.data.convert import Settings, sound_aspects, sound_rows, write_groups
from silkie.data.pairs import ANY_SCALE, PairFunction, PairOptions
from silkie.data.rebuild import rebuild_with_report
from silkie.data.registry import SOURCES, Source, detect_source, get_source, source_for_hub_name
from silkie.data.regroup import regroup_with_report
from silkie.data.reports import LoadReport, OnError, Problem
from silkie.data.resolver import ImageResolver
from silkie.data.row import Row
from silkie.data.schema import IMAGE_PLACEHOLDER, DataError, NoGroupLeft, is_group_features
from silkie.data.sources.vlfeedback import aspect_order

logger = logging.getLogger(__name__)
ASPECT_SAMPLE = 200  # number of records read to learn the names of the rating aspects
HINTS = {  # type passed by mistake -> what to do
    "IterableDataset": "preference groups are read more than once, so load it with streaming=False",
    "IterableDatasetDict": "preference groups are read more than once, so load one split with streaming=False",
    "list": "datasets.Dataset.from_list(rows) makes one",
    "DataFrame": "datasets.Dataset.from_pandas(frame) makes one",
}


def load_preferences(
    source: str | os.PathLike | datasets.Dataset,
    *,
    image_root: str | os.PathLike | None = None,
    split: str = "train",
    pairs: str | PairOptions | PairFunction = "all",
    on_error: OnError = "raise",
    allow_remote_images: bool = False,
    source_format: str | None = None,
    format: str | None = None,
    aspects: Sequence[str] | None = None,
    rating_scale: tuple[float, float] | None = None,
    regroup_pairs: bool = True,
    keep_unpaired: bool = False,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
    return_report: bool = False,
) -> datasets.Dataset:
    """Load preference groups from any supported source.

    Args:
        source: a file (.jsonl, .json, .parquet), a directory of them, a zip archive of .jsonl or .json files, a
            directory written by `save_to_disk`, a dataset name on the hub, or a loaded `datasets.Dataset`. A path that
            exists is never looked up on the hub.
        image_root: directory or zip archive with the images that the records name. Default: the directory (or archive)
            of the data.
        split: a split of the hub dataset, or of local files that carry it in their names.
        pairs: "all", "best_vs_worst", "best_vs_rest", "random", "longest", "model:NAME", `PairOptions`, or a function
            of a group that returns (chosen, rejected[, weight]) tuples. Pairs that the source brings are kept with
            "all".
        on_error: "raise" stops at the first broken row, "skip" drops broken rows, counts and lists them.
        allow_remote_images: fetch images that are http(s) addresses, once, into the cache; refused otherwise. With
            "skip", those that could not be fetched are tried again by the next call, as missing files are looked for
            again.
        source_format: a name from `silkie.data.SOURCES`; default: by hub name, else by the columns of the first record
            (the log says which). `format` is its short name.
        aspects: names of the rating aspects; default: those of the first 200 records.
        rating_scale: lowest and highest rating; one outside is an error of its row. Default: the scale of the format
            (1 to 5 for VLFeedback's, any for others); a row's own column `rating_scale` wins.
        regroup_pairs: join pair rows of the same image and prompt into one group.
        keep_unpaired: keep groups without any pair (for sampling or inspection; they cannot be trained on).
        num_proc: worker processes.
        cache_dir: where the Arrow files go; default: the cache of `datasets`.
        return_report: return what `load_with_report` does, (dataset, LoadReport).

    Returns a dataset with the columns of `silkie.data.group_features`. Images are `Image(decode=False)` values, which
    `silkie.data.open_image` decodes. The result is cached: the same call on unchanged files reads nothing again. Raises
    DataError, and RowError for a broken row.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', found {on_error!r}")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, or None for this process, found {num_proc}")
    options = PairOptions.parse(pairs)
    format = source_format if source_format is not None else format
    records, hub_name = _open(source, split, cache_dir)
    if (
        records.dataset is not None
        and is_group_features(records.dataset.features)
        and options == PairOptions()
        and all(option is None for option in (format, image_root, aspects, rating_scale))
        and not allow_remote_images
        and records.dataset.format["type"] != "custom"
    ):
        dataset, report = _as_it_is(records, keep_unpaired)
        return _finished(dataset, report, return_report)
    adapter = _choose(records, hub_name, format)
    _log_columns(records, adapter)
    root = None if image_root is None else os.path.abspath(os.fspath(image_root))
    if root is not None:
        ImageResolver(root, None)  # a wrong image_root is one clear error, not one per row
    regrouping = adapter.pair_rows and regroup_pairs
    settings = Settings(
        source=adapter,
        name=f"{records.name} ({adapter.name})",
        options=PairOptions() if regrouping else options,
        aspects=(),
        base=records.base,
        image_root=root,
        on_error=on_error,
        allow_remote=allow_remote_images,
        need_pairs=not keep_unpaired,
        scale=adapter.scale if rating_scale is None else _scale(rating_scale),
    )
    settings = replace(settings, aspects=_aspects(records, settings, aspects))
    written = write_groups(records, settings, num_proc, cache_dir)
    report = LoadReport(source=records.name, format=adapter.name, rows=len(written))
    dataset = sound_rows(written, report)
    if regrouping and len(dataset):
        dataset = _joined(dataset, report, options, settings, num_proc, cache_dir)
    return _finished(dataset, report, return_report)


def _joined(
    dataset: datasets.Dataset,
    report: LoadReport,
    options: PairOptions,
    settings: Settings,
    num_proc: int | None,
    cache_dir: str | os.PathLike | None,
) -> datasets.Dataset:
    """Pair rows joined by prompt and images, with the pairs that `options` ask for; `report` learns what that took."""
    dataset, report.regrouped = regroup_with_report(
        dataset, cache_dir=None if cache_dir is None else os.fspath(cache_dir)
    )
    if options == PairOptions():
        return dataset
    dataset, problems = rebuild_with_report(
        dataset,
        options,
        source=settings.name,
        need_pairs=settings.need_pairs,
        num_proc=num_proc,
        on_error=settings.on_error,
    )
    report.problems += problems
    return dataset


def load_with_report(
    source: str | os.PathLike | datasets.Dataset, **options: Any
) -> tuple[datasets.Dataset, LoadReport]:
    """`load_preferences` with the same options, and what it read and dropped."""
    return cast(Any, load_preferences(source, **options, return_report=True))


def _finished(dataset: datasets.Dataset, report: LoadReport, return_report: bool) -> Any:
    """The return value of `load_preferences`. Raises DataError if every row was dropped."""
    report.groups, report.pairs = len(dataset), count_pairs(dataset)
    _log(report)
    if not len(dataset):
        first = f"\nThe first: {report.problems[0].message}" if report.problems else ""
        raise NoGroupLeft(f"{report.source}: no group is left of {report.rows:,} rows.\n{report.summary()}{first}")
    return (dataset, report) if return_report else dataset


def count_pairs(dataset: datasets.Dataset) -> int:
    """Number of pairs in all groups, read off the Arrow list lengths."""
    return sum(_pair_counts(dataset))


def _pair_counts(dataset: datasets.Dataset) -> Iterator[int]:
    import pyarrow.compute as pc

    for batch in dataset.with_format("arrow").select_columns(["pairs"]).iter(batch_size=10_000):
        yield from (length or 0 for length in pc.list_value_length(batch["pairs"]).to_pylist())


def _open(
    source: str | os.PathLike | datasets.Dataset, split: str, cache_dir: str | os.PathLike | None
) -> tuple[raw.Records, str | None]:
    """The raw records, and the hub name where the source is one."""
    if isinstance(source, datasets.DatasetDict):
        raise DataError(
            f"found a DatasetDict with splits {', '.join(map(str, source))}; pass one of them, for example"
            " source['train']"
        )
    if isinstance(source, datasets.Dataset):
        return raw.from_dataset(source, "dataset"), None
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        hint = HINTS.get(kind)
        raise DataError(
            f"found {'an' if kind[0] in 'AEIOU' else 'a'} {kind}; expected a path, a dataset name or a datasets.Dataset"
            + (f": {hint}" if hint else "")
        )
    path = os.path.expanduser(os.fspath(source))
    if os.path.exists(path):
        return raw.from_path(path, split), None
    if source_for_hub_name(path) is None and (
        path.count("/") != 1 or path.startswith((".", "/", "~")) or path.endswith(raw.SUFFIXES)
    ):
        raise DataError(
            f"{path!r} is neither an existing file or directory nor a dataset name of the form 'owner/name'"
        )
    loaded = datasets.load_dataset(path, split=split, cache_dir=None if cache_dir is None else os.fspath(cache_dir))
    return raw.from_dataset(loaded, path), path


def _choose(records: raw.Records, hub_name: str | None, format: str | None) -> Source:
    if format is not None:
        return get_source(format)
    known = source_for_hub_name(hub_name) if hub_name else None
    if known is not None:
        return known
    first = next(records.first(1), None)
    if first is None:
        raise records.nothing()
    found = detect_source(first, records.name)
    decided = sorted(reading(first).columns) or sorted(first)
    logger.info(
        "%s: read as %s because of its columns %s; source_format=NAME forces another of %s",
        records.name,
        found.name,
        ", ".join(decided),
        ", ".join(SOURCES),
    )
    return found


def _log_columns(records: raw.Records, source: Source) -> None:
    """Say which columns the source does not read, found by letting it adapt the first record."""
    first = next(records.first(1), None) or {}
    row = Row(first, source.name, "the first record", cast(ImageResolver, _AnyImage()))
    if (
        source.name.startswith("trl")
        and row.images("images", "image")
        and IMAGE_PLACEHOLDER in str(first.get("prompt"))
    ):
        logger.info(
            "%s: the mark %s in a prompt is the place of an image; TRL reads it as text and puts the images in front",
            records.name,
            IMAGE_PLACEHOLDER,
        )
    row.read.clear()
    try:
        source.adapt(row)
    except Exception:  # a broken row: reported with its place when the rows are read
        return
    ignored = [column for column in first if column not in row.read]
    if ignored and row.read:  # a source of the user's own may read `row.record` directly
        logger.info(
            "%s: ignoring the columns %s, which %s does not read", records.name, ", ".join(ignored), source.name
        )


class _AnyImage:
    """Stands for an image resolver where no image is looked at."""

    def resolve(self, value: Any) -> dict[str, Any]:
        return {"bytes": None, "path": "any"}


def _aspects(records: raw.Records, settings: Settings, given: Sequence[str] | None) -> tuple[str, ...]:
    if given is not None:
        if strange := next((name for name in given if not is_aspect(name)), None):
            raise DataError(f"aspects: {strange!r} cannot be the name of an aspect: expected printable text")
        return tuple(given)
    if settings.source.aspects is None:
        return ()
    return tuple(sorted(sound_aspects(records, settings, ASPECT_SAMPLE), key=aspect_order))


def _scale(given: Any) -> tuple[float, float]:
    low, high = map(float, given)
    if not ANY_SCALE[0] <= low < high <= ANY_SCALE[1]:
        raise ValueError(
            f"rating_scale={given!r}: expected (lowest, highest), from {ANY_SCALE[0]:g} to {ANY_SCALE[1]:g}"
        )
    return low, high


def _as_it_is(records: raw.Records, keep_unpaired: bool) -> tuple[datasets.Dataset, LoadReport]:
    """A dataset that already has the group schema, unchanged except that groups without a pair are dropped."""
    assert records.dataset is not None
    dataset = records.dataset.with_format(None)
    report = LoadReport(source=records.name, format="groups", rows=len(dataset))
    labels = dataset["labels"] if "labels" in dataset.column_names else itertools.repeat(None)
    paired = [i for i, (count, own) in enumerate(zip(_pair_counts(dataset), labels, strict=False)) if count or own]
    if not keep_unpaired and len(paired) < len(dataset):
        for index in sorted(set(range(len(dataset))).difference(paired)):
            report.problems.append(
                Problem(kind="no pairs", row=f"row {index}", reason="no pairs", message=f"row {index}: no pairs")
            )
        dataset = dataset.select(paired)
    return dataset, report


def _log(report: LoadReport) -> None:
    broken: Iterable[Problem] = [problem for problem in report.problems if problem.kind == "error"]
    logger.info("%s", report.summary())
    for problem in list(broken)[:10]:
        logger.warning("dropped: %s", problem.message)
