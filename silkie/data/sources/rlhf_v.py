"""RLHF-V: `text` is a JSON string (or an object) with question, chosen and rejected; the image is embedded or in
`image_path`."""

from __future__ import annotations

import json

from silkie.data.columns import reading
from silkie.data.conversations import question
from silkie.data.registry import register_source
from silkie.data.row import Row
from silkie.data.schema import Group

KEYS = ("question", "chosen", "rejected")


@register_source(
    "rlhf-v",
    hub_names=("openbmb/RLHF-V-Dataset",),
    detect=lambda record: reading(record).kind == "text",
)
def rlhf_v(row: Row) -> Group:
    text = row.require("text", (str, dict), "a JSON object with question, chosen and rejected")
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except ValueError as error:
            raise row.error("text", text, "a JSON object with question, chosen and rejected") from error
    if not isinstance(text, dict) or not set(KEYS) <= text.keys():
        raise row.error("text", text, "a JSON object with question, chosen and rejected")
    images = [row.image("image" if row.get("image") is not None else "image_path")]
    return Group(
        id=None if row.get("idx") is None else str(row.get("idx")),
        images=images,
        prompt=question(row, text["question"], images, "text.question"),
        responses=[row.check_text(text["chosen"], "text.chosen"), row.check_text(text["rejected"], "text.rejected")],
        pairs=[(0, 1)],
    )
