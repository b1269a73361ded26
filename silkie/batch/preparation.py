"""Before training starts: measure every group in tokens, decode its images once, and drop, count and list the groups
that cannot be trained on.

Legend: L prompt tokens, K responses.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from jinja2 import TemplateError

from silkie.batch.encoding import GroupEncoder, GroupLengths, row_name
from silkie.batch.labels import Labels
from silkie.batch.template import TemplateMismatch, plain_prompt
from silkie.batch.workers import preparation_processes
from silkie.data.check import check_distinct, check_group, check_no_video
from silkie.data.images import image_digest, open_image
from silkie.data.registry import code_digest
from silkie.data.resolver import ImageResolver
from silkie.data.row import Found, Row
from silkie.data.schema import DataError, NoGroupLeft, RowError, user_turn
from silkie.data.stamps import image_fingerprint

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]
StringRows = Literal["auto", "plain", "template"]
_LISTED = 5  # rows listed per reason
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


class GroupError(DataError):
    """A group cannot be trained on."""


class NothingToTrainOn(GroupError, NoGroupLeft):
    """None of the groups of a dataset can be trained on."""


@dataclass(slots=True, kw_only=True)
class PreparationReport:
    """Result of preparation.

    Attributes:
        groups, pairs, responses: numbers that remain.
        prompt_tokens, response_tokens: their sums.
        longest_prompt, longest_response: in tokens.
        cut_responses: responses truncated at the end to meet the length limits.
        equal_pairs: pairs whose responses have the same tokens after truncation; they contribute no gradient.
        open_headers: groups whose generation prompt ends in tokens that no answer follows (the open thinking block of a
            template that closes it where an answer has none); the responses start before these, as in TRL.
        header_pairs: pairs that share more of the generation prompt than their group does: both responses score those
            tokens, which TRL counts to the prompt of such a pair.
        desirable, undesirable: labelled responses, for losses that take no pairs.
        dropped: reason -> descriptions of the groups that were dropped for it.
    """

    groups: int = 0
    pairs: int = 0
    responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest_prompt: int = 0
    longest_response: int = 0
    cut_responses: int = 0
    equal_pairs: int = 0
    open_headers: int = 0
    header_pairs: int = 0
    desirable: int = 0
    undesirable: int = 0
    images: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def count(self, row: Mapping[str, Any]) -> None:
        """Adds a group that remains, from what `_measure` found."""
        self.groups += 1
        self.pairs += row["n_pairs"]
        self.equal_pairs += row["n_equal"]
        self.images += row["n_images"]
        self.open_headers += row["open_header"]
        self.header_pairs += row["n_header"]
        self.desirable += row["n_desirable"]
        self.undesirable += row["n_undesirable"]
        self.responses += len(row["response_lengths"])
        self.prompt_tokens += row["prompt_length"]
        self.response_tokens += sum(row["response_lengths"])
        self.longest_prompt = max(self.longest_prompt, row["prompt_length"])
        self.longest_response = max(self.longest_response, *row["response_lengths"])
        self.cut_responses += row["cut"]

    def numbers(self) -> dict[str, int]:
        """Counts by readable name. Counts that are normally zero (cut or dropped) appear only if they are not."""
        always = (
            "groups",
            "pairs",
            "responses",
            "images",
            "prompt_tokens",
            "longest_prompt",
            "response_tokens",
            "longest_response",
        )
        counts = {name.replace("_", " "): getattr(self, name) for name in always}
        rare = {
            "responses cut at the tail": self.cut_responses,
            "pairs with equal responses": self.equal_pairs,
            "groups whose answers rewrite the generation prompt": self.open_headers,
            "pairs that score a part of the generation prompt": self.header_pairs,
            "desirable responses": self.desirable,
            "undesirable responses": self.undesirable,
        }
        dropped = {f"dropped groups: {reason}": len(rows) for reason, rows in self.dropped.items()}
        return counts | {name: number for name, number in rare.items() if number} | dropped

    def lines(self, name: str) -> list[str]:
        """Human-readable summary."""
        out = [
            f"{name}: {self.groups} groups, {self.responses} responses, {self.pairs} pairs, {self.images} images;"
            f" prompt tokens {self.prompt_tokens} (longest {self.longest_prompt}), response tokens"
            f" {self.response_tokens} (longest {self.longest_response})"
        ]
        if self.desirable or self.undesirable:
            out[0] += f"; {self.desirable} desirable and {self.undesirable} undesirable responses"
        if self.cut_responses:
            out.append(f"{name}: {self.cut_responses} responses were truncated at the end to meet the length limits")
        if self.equal_pairs:
            out.append(
                f"{name}: {self.equal_pairs} pairs have identical responses after truncation and contribute no"
                " gradient; raise the length limits"
            )
        if self.open_headers:
            out.append(
                f"{name}: in {self.open_headers} groups the chat template ends the prompt differently once an answer"
                " follows (an open thinking block that it closes, or tokens that merge); the responses start where the"
                " two part"
            )
        if self.header_pairs:
            out.append(
                f"{name}: {self.header_pairs} pairs share more of the generation prompt than all responses of their"
                " group do; both responses score these tokens, which cancel in the margin of a pair"
            )
        for reason, rows in self.dropped.items():
            more = f", and {len(rows) - _LISTED} more" if len(rows) > _LISTED else ""
            out.append(f"{name}: dropped {len(rows)} groups: {reason} ({'; '.join(rows[:_LISTED])}{more})")
        return out


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
    string_rows = settle_string_rows(dataset, encoder, string_rows, name)
    processes = preparation_processes(len(dataset), num_proc)
    measured = dataset.map(
        _measure,
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
    report = PreparationReport()
    dropped: dict[str, list[str]] = defaultdict(list)
    keep = []
    for index, row in enumerate(_facts(measured)):
        if row["problem"]:
            dropped[row["problem"]].append(row_name(row))
            continue
        keep.append(index)
        report.count(row)
    report.dropped = dict(dropped)
    summary, *losses = report.lines(name)
    logger.info(summary)
    for line in losses:  # warnings, because Python shows them even if no log is configured
        logger.warning(line)
    if not keep:
        reasons = Counter({reason: len(rows) for reason, rows in dropped.items()})
        raise NothingToTrainOn(
            f"No group of the {name} data can be trained on: {dict(reasons) or 'the dataset is empty'}."
        )
    measured = measured.remove_columns(list(_COUNTED))
    return (measured if len(keep) == len(measured) else measured.select(keep)), report


def _facts(measured: Dataset) -> Iterator[dict[str, Any]]:
    """What `_measure` found of each group; a thousand at a time, as `datasets` takes a tenth of a millisecond to hand
    out one."""
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
        placed = next((encoder.places_images(row) for row in rows if row.get("images")), True)
        settled = "plain" if placed else "template"
    if settled == "plain":
        how = f"plain text that ends with {encoder.tokenizer.eos_token!r}, as in TRL"
        other = "TRL leaves it out where rows have images; string_rows='template' writes them with the chat template"
    else:
        how = "written with the chat template"
        other = "asked for" if wanted == "template" else "they have images, and no image token of the model in the text"
    logger.info("%s: rows of strings are %s (%s)", name, how, other)
    return settled


def _in_form(row: Mapping[str, Any], string_rows: StringRows) -> Mapping[str, Any]:
    """A row of strings as the conversation that the chat template writes, where that is how they are written."""
    if row.get("form") != "plain" or string_rows == "plain":
        return row
    try:
        turn = user_turn(plain_prompt(row), len(row.get("images") or []))
    except ValueError as error:
        raise _EncodingError(row_name(row), str(error), "Write one mark per image, or none.") from error
    turn = {**turn, "content": [{"type": part["type"], "text": part.get("text")} for part in turn["content"]]}
    return {**row, "form": None, "prompt": [turn]}


def _measure(
    row: Mapping[str, Any],
    index: int,
    encoder: GroupEncoder,
    raise_errors: bool,
    string_rows: StringRows,
    labels: Labels | None,
) -> dict[str, Any]:
    named: Mapping[str, Any] = {"row": index, **row}  # a row that was prepared before keeps its number
    pairs = row["pairs"] or []
    examples = labels.examples({**row, "pairs": pairs}) if labels is not None else []
    facts = {
        "row": named["row"],
        "problem": "",
        "prompt_length": 0,
        "response_lengths": [0] * len(row["responses"] or []),
        "cut": 0,
        "n_pairs": len(pairs),
        "n_equal": 0,
        "open_header": 0,
        "n_header": 0,
        "n_desirable": sum(e.desirable for e in examples),
        "n_undesirable": sum(not e.desirable for e in examples),
        "n_images": len(row.get("images") or []),
        "image_digests": [],
    }
    try:
        named = _in_form(named, string_rows)
        if "form" in row:
            facts.update(form=named["form"], prompt=named["prompt"])
        _check_row(named, encoder)
        images = [(image, f"{row_name(named)}, image {i}") for i, image in enumerate(row.get("images") or [])]
        sizes = [_size(image, where) for image, where in images]
        facts["image_digests"] = [image_digest(image, where=where) for image, where in images]
        lengths = _lengths(named, sizes, encoder)
    except DataError as error:
        if raise_errors:
            raise GroupError(
                f"{error} Fix or remove the row, or set on_bad_row='skip' to drop and count such rows."
            ) from error
        return {**facts, "problem": _reason(error)}
    if labels is not None and not examples:
        return {**facts, "problem": "no response that is desirable or undesirable"}
    if labels is None and not pairs:
        hint = ", but labels: a loss for them is loss_type=['kto']" if row.get("labels") else ""
        return {**facts, "problem": f"no preference pairs (ties, one response, or no ratings){hint}"}
    if not lengths.fits:
        more = ", at which TRL cuts a prompt with images" if facts["n_images"] else ""
        return {**facts, "problem": f"the prompt alone does not fit max_length={encoder.max_length}{more}"}
    equal = sum(lengths.equal_to[chosen] == lengths.equal_to[rejected] for chosen, rejected in pairs)
    return {
        **facts,
        "prompt_length": lengths.prompt,
        "response_lengths": list(lengths.responses),
        "cut": lengths.cut,
        "n_equal": equal,
        "open_header": int(lengths.unlike > 0),
        "n_header": sum(min(lengths.header[chosen], lengths.header[rejected]) > 0 for chosen, rejected in pairs),
    }


class _EncodingError(DataError):
    """The processor or its chat template cannot encode a row. `reason`: equal for rows that fail in the same way."""

    def __init__(self, where: str, reason: str, remedy: str = "") -> None:
        self.reason = reason
        super().__init__(f"{where}: {reason}. {remedy}".strip())


def _check_row(row: Mapping[str, Any], encoder: GroupEncoder) -> None:
    checked = Row(row, "groups", row_name(row), ImageResolver(None, None))
    check_no_video(row, row["prompt"], checked)
    check_group(row, checked)
    if row["pairs"]:
        check_distinct(row, checked)
    plain = row.get("form") == "plain"
    own_tokens = plain and bool(row.get("images"))  # a text that itself says where its images go
    if own_tokens and not encoder.places_images(row):
        found = Found(f"{len(row['images'])} image(s) and another number of image tokens")
        raise checked.error("prompt", found, "one image token of the model per image", "Or string_rows='template'.")
    for column, text in _texts(row):
        if own_tokens and column.startswith("prompt"):
            continue
        token = encoder.media_token(text) if plain else encoder.control_token(text)
        if token is not None:
            raise checked.error(
                column,
                Found(f"the model's special token {token}"),
                "text without it",
                "Write it otherwise, or read such text as control tokens with special_tokens='parse', as TRL does.",
            )


def _texts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(column, text) of everything in a row that the chat template writes."""
    for index, turn in enumerate(row["prompt"]):
        yield from ((f"prompt[{index}]", text) for text in _strings(turn))
    for index, response in enumerate(row["responses"]):
        yield from ((f"responses[{index}]", text) for text in _strings(response))
    for column in ("tools", "chat_template_kwargs"):
        yield from ((column, text) for text in _strings(row.get(column)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for part in value.values() for text in _strings(part))
    elif isinstance(value, (list, tuple)):
        yield from (text for part in value for text in _strings(part))


def _reason(error: DataError) -> str:
    """Why a row is dropped, equal for rows that are broken in the same way."""
    if isinstance(error, RowError):
        return re.sub(r"\[\d+\]", "", error.reason)
    return error.reason if isinstance(error, _EncodingError) else f"{type(error).__name__}: image or row is broken"


def _lengths(row: Mapping[str, Any], sizes: Sequence[tuple[int, int]], encoder: GroupEncoder) -> GroupLengths:
    try:
        return encoder.measure(row, sizes)
    except TemplateMismatch as error:
        raise _EncodingError(row_name(row), error.reason, error.remedy) from error
    except (
        ArithmeticError,
        MemoryError,
        RecursionError,
        ValueError,
        TypeError,
        TemplateError,
    ) as error:  # an image of extreme shape, roles that the chat template refuses
        raise _EncodingError(row_name(row), f"the processor refuses it: {error or type(error).__name__}") from error


def _size(image: Any, where: str) -> tuple[int, int]:
    """(height, width) of an image, decoded in full: a truncated file is found now, not in the middle of the run."""
    width, height = open_image(image, where=where).size
    return height, width
