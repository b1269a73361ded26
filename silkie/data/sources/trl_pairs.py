"""TRL's preference rows: prompt, chosen and rejected as strings or conversations, `image` or `images`.

The prompt may be implicit (the shared beginning of chosen and rejected); TRL's own function extracts it. Rows of
strings are plain text, as in TRL: the chat template is for conversations. Further columns are ignored, as TRL does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from silkie.data.columns import reading
from silkie.data.conversations import (
    answer_text,
    as_list,
    is_text_turn,
    json_column,
    parse_conversation,
    question,
    same_question,
    turns_text,
    verbatim,
)
from silkie.data.registry import register_source
from silkie.data.row import Found, Record, Row
from silkie.data.schema import Group, image_part, text_part
from silkie.data.sources.mm_rlhf import has_marks, skip_tie

ANSWERS = ("chosen", "rejected")


def detect(record: Record) -> bool:
    return reading(record).kind == "pair" and not has_marks(record)


@register_source("trl", hub_names=("HuggingFaceH4/rlaif-v_formatted",), detect=detect)
def trl_pairs(row: Row) -> Group:
    refuse_videos(row)
    skip_tie(row)
    prompt, chosen, rejected = prompt_and_answers(row)
    return Group(**prompt_and_responses(row, prompt, {"chosen": chosen, "rejected": rejected}), pairs=[(0, 1)])


def refuse_videos(row: Row) -> None:
    """Raises RowError for a row with a video."""
    for column in ("videos", "video"):
        if row.get(column):
            raise row.error(
                column,
                row.get(column),
                "no videos",
                "silkie trains on images and text; drop these rows or sample frames into `images`. MM-RLHF:"
                " source_format='mm-rlhf' counts them.",
            )


def prompt_and_responses(row: Row, prompt: Any, answers: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a group but for its pairs: id, images, prompt, responses, and in which form they are.

    Args:
        prompt: a string or a list of turns.
        answers: column -> a string or a list of turns.
    """
    images = row.images("images", "image")
    extra: dict[str, Any] = {name: json_column(row, name) for name in ("tools", "chat_template_kwargs")}
    if all(isinstance(text, str) for text in (prompt, *answers.values())):
        question(row, prompt, images, "prompt")  # as many marks as images, or none
        parts = [*(image_part() for _ in images), text_part(prompt)]  # marks in the text are the processor's affair
        turns: Any = [{"role": "user", "content": parts}]
        responses = [row.check_text(text, name) for name, text in answers.items()]
        extra["form"] = "plain"
    else:
        turns = (
            question(row, prompt, images, "prompt")
            if isinstance(prompt, str)
            else parse_conversation(row, prompt, images, "prompt")
        )
        if not isinstance(prompt, str) and not all(map(is_text_turn, prompt)):
            extra["prompt_turns"] = turns_text(row, verbatim(prompt, turns), "prompt")
        if all(map(_is_text_answer, answers.values())):
            responses = [answer_text(row, answer, name) for name, answer in answers.items()]
        else:
            extra["form"] = "turns"
            responses = [_turns(row, answer, name) for name, answer in answers.items()]
    return {"id": _identifier(row), "images": images, "prompt": turns, "responses": responses, **extra}


def prompt_and_answers(row: Row) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected, each a string or a list of turns."""
    kinds = (str, list, dict)
    expected = "a non-empty response: a string or a conversation"
    chosen, rejected = (as_list(row.require(name, kinds, expected)) for name in ANSWERS)
    if "prompt" not in row.record:
        return implicit_prompt(row, chosen, rejected)
    prompt = as_list(row.require("prompt", kinds, "a string or a conversation"))
    if not isinstance(prompt, str):
        return prompt, chosen, rejected
    if not any(isinstance(a, list) and a and same_question(a[0], prompt) for a in (chosen, rejected)):
        return prompt, chosen, rejected
    # UltraFeedback: whole conversations beside the text of their question
    whole, *answers = implicit_prompt(row, chosen, rejected)
    if not same_question(whole[-1], prompt):
        raise row.error("prompt", prompt, "the question that chosen and rejected begin with, or answers alone")
    return whole, *answers


def implicit_prompt(row: Row, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split chosen and rejected, two strings or two conversations, into their shared beginning and the two answers."""
    from trl.data_utils import extract_prompt  # imported here: it takes seconds, and few datasets need it

    expected = "two strings or two conversations that begin with the same prompt, as there is no prompt column"
    for name, value in zip(ANSWERS, (chosen, rejected), strict=True):
        if not value or not isinstance(value, type(chosen)) or not isinstance(value, (str, list)):
            raise row.error(name, value, expected)
    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not parts["prompt"]:
        raise row.error("chosen", Found("no shared beginning with rejected"), expected)
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _is_text_answer(value: Any) -> bool:
    turns = value if isinstance(value, list) else [value]
    return len(turns) == 1 and is_text_turn(turns[0])


def _turns(row: Row, value: Any, column: str) -> str:
    """An answer of several turns, or with tool calls, as JSON text; it starts and ends with the assistant or a tool."""
    turns = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    turns = turns if isinstance(turns, list) else [turns]
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise row.error(f"{column}[{index}]", turn, 'a turn {"role", "content"}')
        parts = as_list(turn.get("content"))
        if isinstance(parts, list) and any(isinstance(p, dict) and p.get("type") != "text" for p in parts):
            raise row.error(f"{column}[{index}]", turn, "text only in an answer")
    if not turns or turns[0]["role"] != "assistant":
        raise row.error(column, Found(f"first turn {turns[:1]!r}"), "an answer that starts with an assistant turn")
    return turns_text(row, turns, column)


def _identifier(row: Row) -> str | None:
    found = row.get("id")
    return None if found is None else str(found)
