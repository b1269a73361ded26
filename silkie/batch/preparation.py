"""Before training starts: measure every group in tokens, decode its images once, and drop, count and list the groups
that cannot be trained on.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from silkie.batch.encoding import GroupEncoder, row_name
from silkie.batch.labels import Labels
from silkie.batch.measure import GroupError, StringRows, measure_row
from silkie.batch.preparation_report import PreparationReport
from silkie.batch.workers import preparation_processes
from silkie.data.registry import code_digest
from silkie.data.schema import NoGroupLeft
from silkie.data.stamps import image_fingerprint

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
# Columns that only the report reads
_COUNTED = (
    "problem",
    "cut",
    "n_pairs",
    "n_equal",
    "n_images",
    "open_header",
    "n_header",
    "n_desirable",
    "n_undesirable",
)


class NothingToTrainOn(GroupError, NoGroupLeft):
    """None of the groups of a dataset can be trained on."""


def prepare_groups(
    dataset: Dataset,
    encoder: GroupEncoder,
    *,
    on_bad_row: OnBadRow = "raise",
    num_proc: int | None = None,
    name: str = "train",
    string_rows: StringRows = "auto",
    labels: Labels | None = None,
) -> tuple[Dataset, PreparationReport]:
    """Measure the groups of a dataset and drop those that cannot be trained on.

    Dropped and counted: groups without pairs, and groups whose prompt leaves no room for a response. A broken row (an
    image that cannot be decoded, an empty response, a pair that names a missing response, image parts that do not match
    the images) raises, or is dropped too with `on_bad_row="skip"`.

    Args:
        dataset: preference groups.
        encoder: decides the token counts.
        num_proc: worker processes; None: by the cores and the groups.
        name: of the dataset in messages.
        string_rows: how rows of strings are written, see `settle_string_rows`.
        labels: for losses that take labelled responses and no pairs; groups without a label are dropped then.

    Returns:
        The dataset with the columns `row` (number in the input), `prompt_length`, `response_lengths` and
        `image_digests` (hashes of the encoded images, so that nothing needs to read them for that again), and the
        report.

    Raises:
        GroupError: a broken row, or no group remains.
    """
    if labels is not None and labels.threshold is not None and "ratings" not in dataset.column_names:
        raise GroupError(
            f"`label_threshold` reads ratings, and the {name} data has none. Leave it out for data with labels or"
            " pairs."
        )
    measured = _measured(
        dataset,
        encoder,
        on_bad_row=on_bad_row,
        string_rows=settle_string_rows(dataset, encoder, string_rows, name),
        labels=labels,
        processes=preparation_processes(len(dataset), num_proc),
        name=name,
    )
    report, keep = _counted(measured)
    summary, *losses = report.lines(name)
    logger.info(summary)
    for line in losses:  # warnings, because Python shows them even if no log is configured
        logger.warning(line)
    if not keep:
        reasons = {reason: len(rows) for reason, rows in report.dropped.items()}
        raise NothingToTrainOn(f"No group of the {name} data can be trained on: {reasons or 'the dataset is empty'}.")
    measured = measured.remove_columns(list(_COUNTED))
    return (measured if len(keep) == len(measured) else measured.select(keep)), report


def _measured(
    dataset: Dataset,
    encoder: GroupEncoder,
    *,
    on_bad_row: OnBadRow,
    string_rows: StringRows,
    labels: Labels | None,
    processes: int,
    name: str,
) -> Dataset:
    """The dataset with what `measure_row` finds of its rows."""
    return dataset.map(
        measure_row,
        with_indices=True,
        fn_kwargs={
            "encoder": encoder,
            "raise_errors": on_bad_row == "raise",
            "string_rows": string_rows,
            "labels": labels,
        },
        num_proc=processes if processes > 1 else None,
        desc=f"Measuring {name} groups",
        # Not datasets' default: it pickles the tokenizer, which is not stable. The image files are part of the key, so
        # a file that broke since the last run is found.
        new_fingerprint=image_fingerprint(
            dataset,
            "images" if "images" in dataset.column_names else None,
            "prepare",
            encoder.fingerprint(),
            code_digest(folders=[Path(__file__).parent]),
            on_bad_row,
            string_rows,
            repr(labels),
        ),
    )


def _counted(measured: Dataset) -> tuple[PreparationReport, list[int]]:
    """The report of a measured dataset, and the indices of the groups that remain."""
    report, keep = PreparationReport(), []
    dropped: dict[str, list[str]] = defaultdict(list)
    for index, row in enumerate(_facts(measured)):
        if row["problem"]:
            dropped[row["problem"]].append(row_name(row))
            continue
        keep.append(index)
        report.count(row)
    report.dropped = dict(dropped)
    return report, keep


def _facts(measured: Dataset) -> Iterator[dict[str, Any]]:
    """What `measure_row` found of each group; a thousand at a time, as `datasets` takes a tenth of a millisecond to
    hand out one."""
    names = ("row", "id", "prompt_length", "response_lengths", *_COUNTED)
    kept = measured.select_columns([name for name in names if name in measured.column_names])
    for batch in kept.iter(1000):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def settle_string_rows(dataset: Dataset, encoder: GroupEncoder, wanted: StringRows, name: str) -> StringRows:
    """How the rows of strings of a dataset are written, and a log line that says so.

    "auto" is plain text with the end token, as in TRL, unless they have images and no image tokens that place them: TRL
    cannot train those, and here the chat template places the images.

    Returns:
        "plain" or "template".
    """
    if "form" not in dataset.column_names:
        return "template"
    settled: StringRows = wanted
    columns = [name for name in ("form", "images", "prompt") if name in dataset.column_names]
    rows = (row for row in dataset.select_columns(columns) if row["form"] == "plain")
    if wanted == "auto":
        placed = next((encoder.text_tokens.places_images(row) for row in rows if row.get("images")), True)
        settled = "plain" if placed else "template"
    if settled == "plain":
        how = f"plain text that ends with {encoder.tokenizer.eos_token!r}, as in TRL"
        other = "TRL leaves it out where rows have images; string_rows='template' writes them with the chat template"
    else:
        how = "written with the chat template"
        other = "asked for" if wanted == "template" else "they have images, and no image token of the model in the text"
    logger.info("%s: rows of strings are %s (%s)", name, how, other)
    return settled
