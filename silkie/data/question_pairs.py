"""The schema that several datasets share: an image, a question, a chosen and a rejected answer."""

from __future__ import annotations

from silkie.data.columns import reading
from silkie.data.conversations import question
from silkie.data.row import Record, Row
from silkie.data.schema import Group


def is_question_pair(record: Record) -> bool:
    return reading(record).kind == "question"


def question_pair(row: Row, *, identifier: str | None = None, text_only: bool = False) -> Group:
    """`image`, `question`, `chosen`, `rejected` -> a group of two. `identifier` names the id column."""
    images = row.images("image", "images", "image_path")
    if not images and not text_only:
        raise row.error("image", None, "an image")
    name = row.get(identifier) if identifier else None
    return Group(
        id=None if name is None else str(name),
        images=images,
        prompt=question(row, row.text("question"), images, "question"),
        responses=[row.text("chosen"), row.text("rejected")],
        pairs=[(0, 1)],
    )
