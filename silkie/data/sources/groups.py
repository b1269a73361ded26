"""silkie's own groups as JSON lines (or any rows of the same columns).

    {"id": "a", "images": ["a.png"], "prompt": "What is this?", "responses": ["A cat.", "A dog."],
     "ratings": [{"Helpfulness": 5}, {"Helpfulness": 1}]}

`prompt` is a string or a conversation; `responses` are strings or {"model", "response"} objects; `pairs`,
`pair_weights`, `labels` (true for a desirable response), `ratings`, `rationales`, `models` and `id` are optional.
Without `pairs` they are built from the ratings. What loading wrote of a row's form (`silkie.data.schema.ROW_FORM`) is
read again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from silkie.data.columns import reading
from silkie.data.conversations import json_column, parse_conversation, question
from silkie.data.pairs import is_weight, own_aspects
from silkie.data.registry import register_source
from silkie.data.row import Found, Record, Row
from silkie.data.schema import Form, Group


def aspects(record: Record) -> Iterable[str]:
    return [aspect for rating in record.get("ratings") or [] if isinstance(rating, dict) for aspect in rating]


@register_source(
    "groups",
    detect=lambda record: reading(record).kind == "group",
    aspects=aspects,
    pair_rows=False,
)
def groups(row: Row) -> Group:
    images = row.images("images", "image")
    prompt = row.require("prompt", (str, list, dict), "a string or a conversation")
    answers = row.require("responses", list, "a list of responses")
    records = [answer if isinstance(answer, dict) else {"response": answer} for answer in answers]
    models = per_response(row, "models", len(answers)) or [record.get("model") for record in records]
    labels, rated = _labels(row, len(answers)), ratings(row, len(answers))
    pairs = row.get("pairs")
    return Group(
        id=row.get("id"),
        images=images,
        prompt=question(row, prompt, images, "prompt")
        if isinstance(prompt, str)
        else parse_conversation(row, prompt, images, "prompt"),
        responses=[
            row.check_text(record.get("response"), f"responses[{index}]") for index, record in enumerate(records)
        ],
        pairs=[] if pairs is None and rated is None and labels is not None else pairs,
        pair_weights=weights(row),
        labels=labels,
        ratings=rated,
        rationales=rationales(row, len(answers)),
        models=models if any(models) else None,
        form=_form(row),
        prompt_turns=json_column(row, "prompt_turns"),
        tools=json_column(row, "tools"),
        chat_template_kwargs=json_column(row, "chat_template_kwargs"),
    )


def _form(row: Row) -> Form | None:
    form = row.get("form")
    if form is not None and form not in get_args(Form):
        raise row.error("form", form, f"{', '.join(get_args(Form))} or null")
    return form


def ratings(row: Row, count: int) -> list[dict[str, float | None]] | None:
    values = per_response(row, "ratings", count)
    if values is None:
        return None
    if not all(isinstance(rating, dict) for rating in values):
        raise row.error("ratings", values, "one object {aspect: rating} per response")
    return [
        {aspect: row.rating(value, f"ratings[{index}].{aspect}") for aspect, value in rating.items()}
        for index, rating in enumerate(own_aspects(values))
    ]


def _labels(row: Row, count: int) -> list[bool | None] | None:
    values = per_response(row, "labels", count)
    if values is None:
        return None
    if not all(value in (True, False, None) for value in values):
        raise row.error("labels", values, "true (desirable), false or null for each response")
    return [None if value is None else bool(value) for value in values]


def rationales(row: Row, count: int) -> list[dict[str, str | None] | None] | None:
    values = per_response(row, "rationales", count)
    if values is not None and not all(isinstance(texts, (dict, type(None))) for texts in values):
        raise row.error("rationales", values, "one object {aspect: text} per response")
    return values


def per_response(row: Row, column: str, count: int) -> list[Any] | None:
    """An optional column with one entry per response."""
    values = row.get(column)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != count:
        found = Found(f"{len(values)} entries") if isinstance(values, list) else values
        raise row.error(column, found, f"one entry for each of the {count} responses")
    return values


def weights(row: Row) -> list[float] | None:
    values = row.get("pair_weights")
    if values is None:
        return None
    pairs = row.get("pairs")
    if not isinstance(values, list) or not isinstance(pairs, list) or len(values) != len(pairs):
        raise row.error("pair_weights", values, "one weight per pair")
    if not all(map(is_weight, values)):
        raise row.error("pair_weights", values, "finite weights >= 0")
    return [float(value) for value in values]
