"""`python -m silkie.feedback build`: responses and their journal become a preference dataset.

OUT/data/train-*.parquet   VLFeedback's schema with embedded images: load it with `silkie.data.load_preferences(OUT)`
OUT/pairs.csv              the preference pairs: id, chosen, rejected (indices of responses), weight, margin
OUT/quality.md, .json      what the ratings are worth (silkie.feedback.quality)
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie.data import PairOptions, build_pairs
from silkie.feedback.inputs import RecordError, read_items, with_images
from silkie.feedback.items import JudgeItem, instruction_text
from silkie.feedback.journal import JournalError, Record, record_offsets
from silkie.feedback.quality import Judged, Row, quality_markdown, quality_report
from silkie.feedback.vlfeedback import SCALE, write_vlfeedback
from silkie.io.files import open_file
from silkie.io.jsonl import json_lines


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    """`skipped`: why (a kind of failure, "not rated yet", or what a record cannot hold) -> items; `pairless`: items in
    the dataset without a single pair."""

    items: int
    skipped: dict[str, int]
    pairs: int
    pairless: int
    quality: dict[str, Any]
    files: list[Path]

    def text(self) -> str:
        return (
            f"{self.items} items, {self.pairs} pairs ({self.pairless} items without one); skipped:"
            f" {_listed(self.skipped) or 'none'}\n{len(self.files)} parquet file(s) in"
            f" {self.files[0].parent if self.files else '-'}"
        )


def _listed(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(skipped.items()))


class _JournalReader:
    """Ratings by item id, read from the journal one at a time: rationales of a large journal do not fit in memory."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise JournalError(f"{path} does not exist; run `rate` first")
        self.offsets = record_offsets(path)
        self._file = open_file(path)

    def get(self, item_id: str) -> Record | None:
        offset = self.offsets.get(item_id)
        if offset is None:
            return None
        self._file.seek(offset)
        record = json.loads(self._file.readline())
        if "status" not in record:
            raise JournalError(f"item {item_id!r}: its line is no rating: not the journal of `rate`; pass another file")
        return record

    def close(self) -> None:
        self._file.close()


def read_reference(path: str | Path) -> dict[str, list[Row]]:
    """Ratings to compare a judge with: JSONL of {"id", "ratings": [{aspect: number}, ...]}, one mapping per response in
    the order of the responses file. A journal (of an oracle, of a stronger judge) is such a file. Raises
    RecordError."""
    reference: dict[str, list[Row]] = {}
    with open_file(path) as file:
        for line in json_lines(file):
            try:
                if line.error is not None:
                    raise line.error
                record = line.value
                if record.get("status") == "failed":
                    continue
                rows: list[Row] = [
                    {str(k): None if v is None else float(v) for k, v in row.items()} for row in record["ratings"]
                ]
                reference[str(record["id"])] = rows
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise RecordError(
                    f'{path}, line {line.number}: expected {{"id", "ratings": [{{aspect: number}}, ...]}}: {error!r}'
                ) from error
    return reference


def build_dataset(
    responses: str | Path,
    journal: str | Path,
    out: str | Path,
    *,
    image_root: str | None = None,
    pairs: PairOptions | str = "all",
    reference: Mapping[str, Sequence[Row]] | None = None,
    shard_bytes: int = 500_000_000,
) -> BuildSummary:
    """Join responses with their ratings and write the dataset, the pairs and the quality report below `out`.

    Items that are not rated, and those that a VLFeedback record cannot hold, are skipped and counted. Raises
    FileExistsError where `out` already holds a dataset, JournalError where the journal belongs to other texts,
    ItemError for an image that cannot be read, ValueError where no item is left.
    """
    out, options = Path(out), PairOptions.parse(pairs)
    reader = _JournalReader(Path(journal))
    partial = out / "pairs.csv.partial"
    out.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            joined = _Joined(Path(responses), reader, image_root, options, csv.writer(file))
            aspects, scale = _aspects_and_scale(reader)
            files = write_vlfeedback(joined.records(), out, aspects=aspects, scale=scale, shard_bytes=shard_bytes)
        if not joined.judged:
            raise ValueError(f"nothing to build from {responses}: every item was skipped ({_listed(joined.skipped)})")
        partial.replace(out / "pairs.csv")
    finally:
        reader.close()
        partial.unlink(missing_ok=True)
    quality = quality_report(joined.judged, reference)
    (out / "quality.json").write_text(json.dumps(quality, indent=1), encoding="utf-8")
    (out / "quality.md").write_text(quality_markdown(quality), encoding="utf-8")
    return BuildSummary(
        items=len(joined.judged),
        skipped=dict(joined.skipped),
        pairs=joined.pairs,
        pairless=joined.pairless,
        quality=quality,
        files=files,
    )


@dataclass(slots=True)
class _Joined:
    """Responses with their ratings, one item at a time: the records of the dataset and, on the way, the table of pairs
    and what is counted."""

    responses: Path
    reader: _JournalReader
    image_root: str | None
    options: PairOptions
    table: Any  # csv's writer
    judged: list[Judged] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    pairless: int = 0

    def records(self) -> Iterator[dict[str, Any]]:
        self.table.writerow(["id", "chosen", "rejected", "weight", "margin"])
        for item in read_items(self.responses):
            record = self.reader.get(item.id)
            reason = _why_skipped(item, record)
            if record is None or reason is not None:
                self.skipped[str(reason)] += 1
                continue
            _check_rating(item, record)
            row = _record(with_images(item, self.image_root, self.responses.parent), item.fingerprint(), record)
            self._pair(item, row)
            self.judged.append(_judged(item, record))
            yield row

    def _pair(self, item: JudgeItem, row: Mapping[str, Any]) -> None:
        found = build_pairs(row["ratings"], self.options, responses=item.responses, models=item.models, key=item.id)
        self.table.writerows(
            [item.id, chosen, rejected, weight, margin]
            for (chosen, rejected), weight, margin in zip(found, found.weights, found.margins, strict=True)
        )
        self.pairs += len(found)
        self.pairless += not found


def _aspects_and_scale(reader: _JournalReader) -> tuple[list[str], tuple[float, float]]:
    """Aspects and scale of the first rated item: a journal has one rubric, so the others have the same. Journals of
    silkie 0.1 name no scale: VLFeedback's is taken."""
    for item_id in reader.offsets:
        record = reader.get(item_id)
        if record is not None and record["status"] == "ok":
            ratings = record.get("ratings")
            if not isinstance(ratings, list) or not ratings or not isinstance(ratings[0], dict):
                raise JournalError(f"item {item_id!r}: its line in the journal has no `ratings`")
            scale = record.get("scale", SCALE)
            if not isinstance(scale, (list, tuple)) or len(scale) != 2 or not all(map(_is_number, scale)):
                raise JournalError(f"item {item_id!r}: its line in the journal has no `scale` [lowest, highest]")
            return list(ratings[0]), (float(scale[0]), float(scale[1]))
    raise JournalError("the journal holds no rated item, so there is nothing to build")


def _why_skipped(item: JudgeItem, record: Record | None) -> str | None:
    """Why an item is not part of the dataset; None where it is."""
    if record is None:
        return "not rated yet"
    if record["status"] != "ok":
        error = record.get("error")
        return str(error.get("kind")) if isinstance(error, dict) else "failed"
    if len(item.images) != 1:
        return "several images" if item.images else "no image"
    return None if all(response.strip() for response in item.responses) else "an empty response"


def _check_rating(item: JudgeItem, record: Record) -> None:
    """Raises JournalError for a line that is no rating of this item's responses: a journal is a file like any other."""
    count = len(item.responses)
    fields = {"ratings": dict, "rationales": dict, "orders": list}
    for name, kind in fields.items():
        values = record.get(name)
        sized = isinstance(values, list) and (name == "orders" or len(values) == count)
        if not sized or not all(isinstance(value, kind) for value in values or []):
            raise JournalError(f"item {item.id!r}: its line in the journal has no `{name}` for {count} responses")
    for rating in record["ratings"]:
        if not all(value is None or _is_number(value) for value in rating.values()):
            raise JournalError(f"item {item.id!r}: its line in the journal has a rating that is no number")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _record(item: JudgeItem, fingerprint: str, record: Record) -> dict[str, Any]:
    """The arguments of `vlfeedback_row`. Raises JournalError."""
    if record["item"] != fingerprint:
        raise JournalError(
            f"item {item.id!r} was rated with another prompt, image or texts than the responses file holds"
        )
    return {
        "id": item.id,
        "prompt": instruction_text(item.prompt),
        "image": item.images[0],
        "models": item.models,
        "responses": item.responses,
        "ratings": record["ratings"],
        "rationales": record["rationales"],
    }


def _judged(item: JudgeItem, record: Record) -> Judged:
    return Judged(
        id=item.id,
        models=item.models,
        lengths=tuple(len(response) for response in item.responses),
        ratings=record["ratings"],
        orders=record["orders"],
        vote_ratings=record.get("vote_ratings") or [record["ratings"]],
        spread=record.get("spread"),
    )
