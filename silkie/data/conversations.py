"""Prompts and answers in the shapes that datasets use, turned into silkie's conversations."""

from __future__ import annotations

from typing import Any

from silkie.data.registry import Found, Row
from silkie.data.schema import (
    IMAGE_PLACEHOLDER,
    Conversation,
    ImageValue,
    count_images,
    image_part,
    text_part,
    text_turn,
    user_turn,
)

ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
}


def question(row: Row, text: str, images: list[ImageValue], column: str) -> Conversation:
    """A single user turn; `<image>` marks in the text say where the images go."""
    row.check_text(text, column)
    try:
        return [user_turn(text, len(images))]
    except ValueError as error:
        raise row.error(column, Found(str(error)), f"as many {IMAGE_PLACEHOLDER} marks as images") from error


def as_list(value: Any) -> Any:
    """Turns or content parts as a list: `datasets` stores a sequence of objects as one object of lists, {"role": [...],
    ...}."""
    lists = (
        isinstance(value, dict)
        and value.keys() & {"role", "from", "type"}
        and all(isinstance(items, list) for items in value.values())
    )
    if lists and len(set(map(len, value.values()))) == 1:
        return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    return value


def turn_list(row: Row, column: str) -> list[Any]:
    """A column that holds a conversation, as a list of turns that are not checked yet."""
    value = as_list(row.require(column, (list, dict), "a list of turns"))
    if not isinstance(value, list):
        raise row.error(column, value, "a list of turns")
    return list(value)


def conversation(row: Row, turns: Any, images: list[ImageValue], column: str) -> Conversation:
    """A list of turns, as {"role", "content"} or ShareGPT's {"from", "value"}, ending with a user turn.

    Images that the turns do not place go in front of the first user turn. Images embedded in the content parts are
    appended to `images`."""
    turns = as_list(turns)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise row.error(column, turns, "a list of turns")
    prompt = [_turn(row, turn, images, f"{column}[{index}]") for index, turn in enumerate(turns)]
    if prompt[-1]["role"] != "user":
        raise row.error(
            column, Found(f"a last turn of role {prompt[-1]['role']!r}"), "a conversation that ends with a user turn"
        )
    placed = count_images(prompt)
    if placed == 0 and images:
        first_user = next(turn for turn in prompt if turn["role"] == "user")
        first_user["content"] = [image_part() for _ in images] + first_user["content"]
    elif placed != len(images):
        raise row.error(column, Found(f"{placed} image mark(s) for {len(images)} image(s)"), "one mark per image")
    return prompt


def _turn(row: Row, turn: Any, images: list[ImageValue], column: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise row.error(column, turn, 'a turn {"role", "content"} or {"from", "value"}')
    name, content = turn.get("role", turn.get("from")), as_list(turn.get("content", turn.get("value")))
    role = ROLE_NAMES.get(str(name).lower())
    if role is None:
        raise row.error(column, Found(f"role {name!r}"), f"one of {', '.join(ROLE_NAMES)}")
    if isinstance(content, str):
        if role != "user":
            return text_turn(role, content)
        return user_turn(row.check_text(content, column), content.count(IMAGE_PLACEHOLDER))
    if not isinstance(content, (list, tuple)) or not content:
        raise row.error(column, content, "a string or a list of content parts")
    return {"role": role, "content": [_part(row, part, images, column) for part in content]}


def _part(row: Row, part: Any, images: list[ImageValue], column: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return text_part(part["text"])
    if kind == "image":
        embedded = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        if embedded is not None:
            images.append(row.resolve(embedded, column))
        return image_part()
    hint = "Videos are not supported." if kind == "video" else ""
    raise row.error(column, part, 'a part {"type": "text", "text": ...} or {"type": "image"}', hint)


def answer(row: Row, column: str) -> str:
    """A response: a string, one turn, or a conversation of one assistant turn."""
    row.require(column, (str, dict, list, tuple), "a non-empty response")
    return answer_text(row, row.get(column), column)


def answer_text(row: Row, value: Any, column: str) -> str:
    """The text of a response in any of the shapes of `answer`."""
    value = as_list(value)
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise row.error(
                column, Found(f"{len(value)} turns"), "one assistant turn", "Put the earlier turns into the prompt."
            )
        value = value[0]
    if isinstance(value, dict):
        role = ROLE_NAMES.get(str(value.get("role", value.get("from", "assistant"))).lower())
        if role != "assistant":
            raise row.error(
                column, Found(f"a turn of role {value.get('role', value.get('from'))!r}"), "an assistant turn"
            )
        value = as_list(value.get("content", value.get("value")))
        if isinstance(value, (list, tuple)):
            for part in value:
                if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                    raise row.error(column, part, 'a text part {"type": "text", "text": ...}')
            value = "".join(part["text"] for part in value)
    return row.check_text(value, column)
