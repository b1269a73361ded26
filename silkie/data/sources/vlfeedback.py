"""VLFeedback: one instruction, several responses, each rated on several aspects with a rationale.

The JSONL has `completions` as a list of objects, `datasets` turns it into an object of lists; both load. The image is
`img_path` (a file name) or an embedded `image`. Ratings are strings from 1 to 5; those without a number ("N/A") take
their response out of the pairs, and those off the scale are errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from silkie.data.columns import reading
from silkie.data.conversations import question
from silkie.data.registry import register_source
from silkie.data.row import Found, Record, Row
from silkie.data.schema import VLFEEDBACK_ASPECTS, Group


def completions(record: Record) -> list[dict[str, Any]]:
    """The completions of a record as a list of {"annotations", "model", "response"}, whichever way round they are
    stored."""
    value = record.get("completions")
    if isinstance(value, dict):
        lengths = {name: len(column) for name, column in value.items() if isinstance(column, (list, tuple))}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lists of different lengths {lengths}")
        count = next(iter(lengths.values()), 0)
        return [{name: value[name][index] for name in lengths} for index in range(count)]
    return list(value or [])


def aspects(record: Record) -> Iterable[str]:
    annotated = (completion.get("annotations") for completion in completions(record) if isinstance(completion, dict))
    return [aspect for annotations in annotated if isinstance(annotations, dict) for aspect in annotations]


def checked(row: Row) -> list[dict[str, Any]]:
    """The completions of a row, whose annotations are objects of objects or missing."""
    row.require("completions", (dict, list), "a list of completions")
    try:
        answers = completions(row.record)
    except ValueError as error:
        raise row.error("completions", Found(str(error)), "lists of equal length") from error
    for index, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise row.error(f"completions[{index}]", answer, 'a completion {"annotations", "model", "response"}')
        rated = answer.get("annotations")
        if not isinstance(rated, (dict, type(None))):
            raise row.error(f"completions[{index}].annotations", rated, 'an object {aspect: {"Rating", "Rationale"}}')
        for aspect, value in (rated or {}).items():
            if not isinstance(value, (dict, type(None))):
                raise row.error(
                    f"completions[{index}].annotations.{aspect}", value, 'an object {"Rating", "Rationale"}'
                )
    return answers


@register_source(
    "vlfeedback",
    hub_names=("MMInstruction/VLFeedback",),
    detect=lambda record: reading(record).kind == "completions",
    aspects=aspects,
    pair_rows=False,
    scale=(1, 5),
)
def vlfeedback(row: Row) -> Group:
    answers = checked(row)
    images = row.images("image", "images", "img_path")
    if not images:
        raise row.error("image", None, "an image in `image` or a file name in `img_path`")
    # `datasets` gives every row the aspects of all, null where a row was not rated
    rated = (aspect for answer in answers for aspect in answer.get("annotations") or {} if rated_on(answer, aspect))
    names = sorted(set(rated), key=aspect_order)
    prompt = question(row, row.text("prompt"), images, "prompt")
    listed, models = row.get("models"), [answer.get("model") for answer in answers]
    if not isinstance(listed, (list, type(None))):
        raise row.error("models", listed, "a list of model names")
    if listed and all(models) and sorted(map(str, listed)) != sorted(map(str, models)):
        raise row.error(
            "models",
            list(listed),
            f"the models of the completions, {models}",
            "The judge's texts may have been swapped.",
        )
    return Group(
        id=row.get("id"),
        images=images,
        prompt=prompt,
        responses=[
            row.check_text(answer.get("response"), f"completions[{index}].response")
            for index, answer in enumerate(answers)
        ],
        ratings=[{name: rating(row, answer, index, name) for name in names} for index, answer in enumerate(answers)]
        if names
        else None,
        rationales=[{name: annotation(answer, name).get("Rationale") for name in names} for answer in answers]
        if names
        else None,
        models=models if any(models) else None,
    )


def rated_on(answer: dict[str, Any], aspect: str) -> bool:
    return annotation(answer, aspect).get("Rating") is not None


def rating(row: Row, answer: dict[str, Any], index: int, aspect: str) -> float | None:
    value = annotation(answer, aspect).get("Rating")
    return row.rating(value, f"completions[{index}].annotations.{aspect}.Rating")


def annotation(answer: dict[str, Any], aspect: str) -> dict[str, Any]:
    """The judge's {"Rating", "Rationale"} of one aspect; {} where it is missing."""
    return (answer.get("annotations") or {}).get(aspect) or {}


def aspect_order(aspect: str) -> tuple[int, str]:
    """VLFeedback's aspects in its own order, others after them by name."""
    return (VLFEEDBACK_ASPECTS.index(aspect) if aspect in VLFEEDBACK_ASPECTS else len(VLFEEDBACK_ASPECTS), aspect)
