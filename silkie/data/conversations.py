"""Prompts and answers in the shapes that datasets use, turned into silkie's conversations."""

from __future__ import annotations

import json
from typing import Any

from silkie.data.row import Found, Row
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
from silkie.data.turns import as_list

PROMPT_ENDS = ("user", "tool")  # roles that an answer follows
ROLE_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
}


def question(row: Row, text: str, images: list[ImageValue], column: str) -> Conversation:
    """A single user turn; `<image>` marks in the text say where the images go."""
    row.check_text(text, column)
    try:
        return [user_turn(text, len(images))]
    except ValueError as error:
        raise row.error(column, Found(str(error)), f"as many {IMAGE_PLACEHOLDER} marks as images") from error


def turn_list(row: Row, column: str) -> list[Any]:
    """A column that holds a conversation, as a list of turns that are not checked yet."""
    value = as_list(row.require(column, (list, dict), "a list of turns"))
    if not isinstance(value, list):
        raise row.error(column, value, "a list of turns")
    return list(value)


def parse_conversation(row: Row, turns: Any, images: list[ImageValue], column: str) -> Conversation:
    """A list of turns, as {"role", "content"} or ShareGPT's {"from", "value"}, ending with a user or tool turn.

    Images that the turns do not place go in front of the first user turn. Images embedded in the content parts are
    appended to `images`."""
    turns = as_list(turns)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise row.error(column, turns, "a list of turns")
    prompt = [_turn(row, turn, images, f"{column}[{index}]") for index, turn in enumerate(turns)]
    if prompt[-1]["role"] not in PROMPT_ENDS:
        raise row.error(
            column,
            Found(f"a last turn of role {prompt[-1]['role']!r}"),
            "a conversation that ends with a user turn",
            "Move the last turn of the assistant into chosen and rejected."
            if prompt[-1]["role"] == "assistant"
            else "",
        )
    placed = count_images(prompt)
    if placed == 0 and images:
        first_user = next((turn for turn in prompt if turn["role"] == "user"), None)
        if first_user is None:
            raise row.error(column, Found("no user turn"), "a user turn, in front of which the images go")
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
    if content is None and turn.get("tool_calls"):
        return text_turn(role, "")
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


def is_text_turn(turn: Any) -> bool:
    """Whether a turn holds nothing but text and images, so that nothing is lost in `parse_conversation` and
    `answer_text`."""
    if not isinstance(turn, dict):
        return True  # a text, or an error to be reported
    filled = {key for key, value in turn.items() if value is not None}
    return filled <= {"role", "content", "from", "value"} and turn.get("role") != "tool"


def verbatim(turns: list[Any], conversation: Conversation) -> list[dict[str, Any]]:
    """The turns of a prompt with all their fields, and with the content of the checked conversation, in which every
    image has its part."""
    return [
        {
            **turn,
            "role": checked["role"],
            **({"content": checked["content"]} if turn.get("content") is not None else {}),
        }
        for turn, checked in zip(turns, conversation, strict=True)
    ]


def same_question(turn: Any, text: str) -> bool:
    """Whether a turn is a user's and says `text`."""
    if not isinstance(turn, dict) or turn.get("role") != "user":
        return False
    content = as_list(turn.get("content"))
    if isinstance(content, (list, tuple)):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return isinstance(content, str) and content.strip() == text.strip()


def turns_text(row: Row, value: Any, column: str) -> str:
    """JSON text of turns, tools or template variables."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise row.error(column, Found(str(error)), "values that JSON can hold") from error


def json_column(row: Row, column: str) -> str | None:
    """A column of turns, tools or template variables as JSON text; None where the row has none."""
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise row.error(column, value, "JSON text") from error
    # `datasets` fills a struct's absent fields with None
    if not value or (isinstance(value, dict) and all(option is None for option in value.values())):
        return None
    return turns_text(row, value, column)


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
