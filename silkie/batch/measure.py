"""One group before training: is it whole, how many tokens has it, and why can it not be trained on?

Legend: L prompt tokens, K responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from jinja2 import TemplateError

from silkie.batch.encoding import GroupEncoder, GroupLengths, row_name
from silkie.batch.labels import Labels
from silkie.batch.template import TemplateMismatch, plain_prompt
from silkie.data.check import check_distinct, check_group, check_no_video
from silkie.data.images import image_digest, open_image
from silkie.data.resolver import ImageResolver
from silkie.data.row import Found, Row
from silkie.data.schema import DataError, RowError, user_turn

StringRows = Literal["auto", "plain", "template"]


class GroupError(DataError):
    """A group cannot be trained on."""


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


def measure_row(
    row: Mapping[str, Any],
    index: int,
    encoder: GroupEncoder,
    raise_errors: bool,
    string_rows: StringRows,
    labels: Labels | None,
) -> dict[str, Any]:
    """What preparation finds of a row, as columns; `problem` says why it cannot be trained on and is empty where it
    can.

    Args:
        index: number of the row in the dataset.
        raise_errors: a broken row raises; False: it has a problem.
        string_rows: "plain" or "template", see `silkie.batch.preparation.settle_string_rows`.
        labels: for losses that take labelled responses and no pairs.

    Raises:
        GroupError: the row is broken.
    """
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
    if own_tokens and not encoder.text_tokens.places_images(row):
        found = Found(f"{len(row['images'])} image(s) and another number of image tokens")
        raise checked.error("prompt", found, "one image token of the model per image", "Or string_rows='template'.")
    for column, text in _texts(row):
        if own_tokens and column.startswith("prompt"):
            continue
        token = encoder.text_tokens.media(text) if plain else encoder.text_tokens.control(text)
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
