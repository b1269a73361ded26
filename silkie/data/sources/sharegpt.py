"""LLaMA-Factory's ranking formats: ShareGPT conversations (also Zhihui/VLFeedback's flattened copy) and Alpaca
instructions."""

from __future__ import annotations

from silkie.data.columns import reading
from silkie.data.conversations import answer, parse_conversation, turn_list
from silkie.data.registry import register_source
from silkie.data.row import Row
from silkie.data.schema import Group


@register_source(
    "sharegpt", hub_names=("Zhihui/VLFeedback",), detect=lambda record: reading(record).kind == "conversation"
)
def sharegpt(row: Row) -> Group:
    column = "messages" if "messages" in row.record else "conversations"
    turns = turn_list(row, column)
    if isinstance(row.get("system"), str) and row.get("system"):
        turns.insert(0, {"role": "system", "content": row.get("system")})
    images = row.images("images", "image")
    return Group(
        id=row.get("id"),
        images=images,
        prompt=parse_conversation(row, turns, images, column),
        responses=[answer(row, "chosen"), answer(row, "rejected")],
        pairs=[(0, 1)],
    )


@register_source("alpaca", detect=lambda record: reading(record).kind == "instruction")
def alpaca(row: Row) -> Group:
    images = row.images("images", "image")
    turns = [{"role": "system", "content": row.get("system")}] if row.get("system") else []
    for index, exchange in enumerate(row.get("history") or []):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise row.error(f"history[{index}]", exchange, "[instruction, response]")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    extra = row.get("input")
    instruction = "\n".join([row.text("instruction"), *([row.check_text(extra, "input")] if extra else [])])
    turns.append({"role": "user", "content": instruction})
    return Group(
        images=images,
        prompt=parse_conversation(row, turns, images, "instruction"),
        responses=[answer(row, "chosen"), answer(row, "rejected")],
        pairs=[(0, 1)],
    )
