"""MM-RLHF's dpo_pairs.jsonl: prompt, chosen, rejected, and an image or a video. Video rows and marked ties are dropped
and counted."""

from silkie.data.columns import reading
from silkie.data.conversations import answer, question
from silkie.data.registry import register_source
from silkie.data.row import Record, Row
from silkie.data.schema import Group, SkipRow

MARKS = {"is_tie", "video"}


def detect(record: Record) -> bool:
    return has_marks(record) and reading(record).kind == "pair"


def has_marks(record: Record) -> bool:
    """Whether a pair row has what sets MM-RLHF's apart: a text prompt, an image or a video, and a column of marks."""
    media = record.keys() & {"image", "images", "video"}
    return isinstance(record.get("prompt"), str) and bool(record.keys() & MARKS and media)


@register_source("mm-rlhf", hub_names=("yifanzhang114/MM-RLHF",), detect=detect)
def mm_rlhf(row: Row) -> Group:
    if row.get("video"):
        raise SkipRow("a video row; silkie trains on images and text")
    skip_tie(row)
    images = row.images("image", "images")
    if not images:
        raise row.error("image", row.get("image"), "an image or a video")
    return Group(
        id=None if row.get("id") is None else str(row.get("id")),
        images=images,
        prompt=question(row, row.text("prompt"), images, "prompt"),
        responses=[answer(row, "chosen"), answer(row, "rejected")],
        pairs=[(0, 1)],
    )


def skip_tie(row: Row) -> None:
    """Drop and count a row that the source marks as a tie: it has no preference."""
    if row.get("is_tie") in (True, 1, "true", "True"):
        raise SkipRow("marked as a tie by the source")
