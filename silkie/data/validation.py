"""`validate`: every rule that a training run relies on, checked on stored groups, images included."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import datasets

from silkie.data.check import check_distinct, check_group
from silkie.data.images import ImageError, open_image
from silkie.data.judge_checks import judge_flags
from silkie.data.registry import code_digest
from silkie.data.reports import OnError, Problem, ValidationReport
from silkie.data.resolver import ImageResolver
from silkie.data.row import Found, Row
from silkie.data.schema import DataError, RowError, aspects_of
from silkie.data.stamps import image_fingerprint

REQUIRED = ("images", "prompt", "responses", "pairs")


def validate(
    dataset: datasets.Dataset,
    *,
    on_error: OnError = "raise",
    decode_images: bool = True,
    num_proc: int | None = None,
    return_report: bool = False,
) -> datasets.Dataset:
    """Check preference groups before a long run: images that decode, texts, finite ratings, possible pairs.

    Args:
        on_error: "raise" stops at the first broken group with a RowError, "skip" returns the sound groups and reports
            the others.
        decode_images: decode every image in full; without it images are not opened.

    Signs of a judge that swapped or repeated texts are reported as flags, never dropped (see
    `silkie.data.judge_checks`). With `return_report` the result is that of `validate_with_report`."""
    kept, report = validate_with_report(dataset, on_error=on_error, decode_images=decode_images, num_proc=num_proc)
    return cast(Any, (kept, report)) if return_report else kept


def validate_with_report(
    dataset: datasets.Dataset,
    *,
    on_error: OnError = "raise",
    decode_images: bool = True,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, ValidationReport]:
    """`validate`, and what it found."""
    missing = [column for column in REQUIRED if column not in dataset.column_names]
    if missing:
        columns = ", ".join(map(repr, dataset.column_names))
        raise DataError(
            f"not preference groups: no column {', '.join(map(repr, missing))} (there are: {columns}). "
            "Load them with silkie.data.load_preferences."
        )
    found = dataset.map(
        _examine,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=datasets.Features(
            {"problem": datasets.Value("string"), "flags": datasets.List(datasets.Value("string"))}
        ),
        fn_kwargs={"aspects": aspects_of(dataset.features), "decode_images": decode_images},
        num_proc=num_proc,
        new_fingerprint=image_fingerprint(
            dataset, "images" if decode_images else None, "validate", decode_images, code_digest()
        ),
        desc="validating groups",
    )
    report, sound = ValidationReport(rows=len(dataset)), []
    for index, row in enumerate(found):
        for flag in row["flags"]:
            report.flags.setdefault(flag, []).append(f"row {index}")
        if row["problem"] is None:
            sound.append(index)
            continue
        error = RowError(*json.loads(row["problem"]))
        if on_error == "raise":
            raise error
        report.problems.append(Problem(kind="error", row=error.row, reason=error.reason, message=str(error)))
    kept = dataset if len(sound) == len(dataset) else dataset.select(sound)
    return kept, report


def _examine(group: dict[str, Any], index: int, aspects: tuple[str, ...], decode_images: bool) -> dict[str, Any]:
    row = Row(group, "groups", f"row {index}", ImageResolver(None, None))
    try:
        _check(group, row, aspects, decode_images)
    except RowError as error:
        return {"problem": json.dumps(error.__reduce__()[1]), "flags": []}
    return {"problem": None, "flags": list(judge_flags(group))}


def _check(group: dict[str, Any], row: Row, aspects: tuple[str, ...], decode_images: bool) -> None:
    for column in REQUIRED:
        row.require(column, list, "a list")
    check_group(group, row, aspects=aspects)
    for index, rating in enumerate(group.get("ratings") or []):
        for aspect, value in rating.items():
            if value is not None and not math.isfinite(value):
                raise row.error(f"ratings[{index}].{aspect}", value, "a finite number, or null for no rating")
    if not group["pairs"]:
        raise row.error("pairs", [], "at least one pair")
    check_distinct(group, row)
    if decode_images:
        for index, image in enumerate(group["images"]):
            try:
                open_image(image, where=f"image {index}")
            except ImageError as error:
                raise row.error(f"images[{index}]", Found(str(error)), "an image that decodes") from error
