"""LLaVA-RLHF's human comparisons: a conversation, two outputs, and which of them (1 or 2) was preferred."""

from silkie.data.conversations import answer, conversation
from silkie.data.registry import Row, register_source
from silkie.data.schema import Group


@register_source(
    "llava-rlhf",
    hub_names=("zhiqings/LLaVA-Human-Preference-10K",),
    detect=lambda record: {"conversations", "output_1", "output_2", "preference"} <= record.keys(),
)
def llava_rlhf(row: Row) -> Group:
    preference = str(row.require("preference", (int, str), "1 or 2")).strip()
    if preference not in ("1", "2"):
        raise row.error("preference", row.get("preference"), "1 or 2")
    images = (
        [row.image("image" if "image" in row.record else "images")] if not isinstance(row.get("images"), list) else row.images("images")
    )
    return Group(
        id=None if row.get("id") is None else str(row.get("id")),
        images=images,
        prompt=conversation(row, row.get("conversations"), images, "conversations"),
        responses=[answer(row, "output_1"), answer(row, "output_2")],
        pairs=[(0, 1) if preference == "1" else (1, 0)],
    )
