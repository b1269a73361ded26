"""LLaVA-RLHF's human comparisons: a conversation, two outputs, and which of them (1 or 2) was preferred.

The conversation ends with an assistant turn that the outputs stand in for.
"""

from silkie.data.columns import reading
from silkie.data.conversations import ROLE_NAMES, answer_text, parse_conversation, turn_list
from silkie.data.registry import register_source
from silkie.data.row import Row
from silkie.data.schema import Group


@register_source(
    "llava-rlhf",
    hub_names=("zhiqings/LLaVA-Human-Preference-10K",),
    detect=lambda record: reading(record).kind == "comparison",
)
def llava_rlhf(row: Row) -> Group:
    preference = str(row.require("preference", (int, str), "1 or 2")).strip()
    if preference not in ("1", "2"):
        raise row.error("preference", row.get("preference"), "1 or 2")
    images = row.images("image", "images")
    if not images:
        raise row.error("image", row.get("image"), "an image")
    turns = turn_list(row, "conversations")
    if turns and isinstance(turns[-1], dict) and ROLE_NAMES.get(str(turns[-1].get("from")).lower()) == "assistant":
        turns = turns[:-1]
    return Group(
        id=None if row.get("id") is None else str(row.get("id")),
        images=images,
        prompt=parse_conversation(row, turns, images, "conversations"),
        responses=[output(row, "output_1"), output(row, "output_2")],
        pairs=[(0, 1) if preference == "1" else (1, 0)],
    )


def output(row: Row, column: str) -> str:
    """The text of an output. Its `from` names the model that wrote it."""
    value = row.require(column, (dict, str), 'an output {"value": text}')
    return answer_text(row, value.get("value") if isinstance(value, dict) else value, column)
