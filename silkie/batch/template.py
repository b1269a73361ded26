"""The texts of a preference group, as the model's chat template writes them.

A response is what the template writes for `prompt + [answer]` after what that text shares with the prompt. Templates
add a space, close an empty thinking block or trim the answer: an answer put after the prompt by hand is another text
than the one that TRL trains and that the model was trained on.
Legend: K responses of a group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

_MARKS = {"system": "silkiesystem", "user": "silkiequestion", "assistant": "silkieresponse"}

# Arguments of `apply_chat_template` that silkie sets itself.
_OWN_ARGUMENTS = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
}


class TemplateMismatch(ValueError):
    """The chat template and a row do not go together. `reason` is the same for all rows that fail in this way."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}. {remedy}")
        self.reason, self.remedy = reason, remedy


@dataclass(slots=True, frozen=True, kw_only=True)
class GroupTexts:
    """What the template writes for one group.

    Attributes:
        prompt: the prompt with the generation prompt (the header of the answer) at its end.
        conversations: K texts, prompt and one answer each.
        shared: number of leading characters that the prompt and all conversations have in common.
        plain: no template wrote them.
    """

    prompt: str
    conversations: list[str]
    shared: int
    plain: bool = False


def plain_texts(row: Mapping[str, Any], end: str) -> GroupTexts:
    """The texts of a row of strings, as TRL has them: prompt and response one after the other, then the end token
    where the response does not end with it.

    Args:
        end: the tokenizer's end-of-sequence token.
    """
    prompt = plain_prompt(row)
    answers = [text if text.endswith(end) else text + end for text in row["responses"]]
    return GroupTexts(prompt=prompt, conversations=[prompt + a for a in answers], shared=len(prompt), plain=True)


def plain_prompt(row: Mapping[str, Any]) -> str:
    """The prompt of a row of strings."""
    return "".join(part["text"] for turn in row["prompt"] for part in turn["content"] if part["type"] == "text")


@dataclass(kw_only=True)
class ChatTemplate:
    """Writes groups with the chat template of a processor (or of a tokenizer, for a text-only model).

    Attributes:
        processor: has `apply_chat_template`.
        kwargs: variables of the template for every row, such as `enable_thinking`. A row's own, in its column
            `chat_template_kwargs`, win over them.

    Raises:
        ValueError: `kwargs` names an argument that silkie sets; when a row is written, the processor has no chat
            template.
    """

    processor: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if taken := sorted(_OWN_ARGUMENTS & set(self.kwargs)):
            raise ValueError(
                f"`chat_template_kwargs` sets {', '.join(taken)}, which silkie sets itself; it is for variables of the"
                " chat template, such as enable_thinking."
            )

    @property
    def exists(self) -> bool:
        """Whether there is a template; rows of strings need none."""
        return bool(getattr(self.processor, "chat_template", None))

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The row's prompt with the generation prompt at its end and one mark per image."""
        return self._render(row, self._turns(_prompt(row)), add_generation_prompt=True)

    def write(self, row: Mapping[str, Any]) -> GroupTexts:
        """The texts of a row: its prompt, and the prompt with each of its responses.

        A response is a string, or a list of turns.

        Raises:
            TemplateMismatch: the template writes the prompt's own turns differently once an answer follows, so that the
                responses do not follow the prompt.
        """
        turns = self._turns(_prompt(row))
        prompt = self._render(row, turns, add_generation_prompt=True)
        conversations = [self._render(row, turns + self._answer(response)) for response in _answers(row)]
        shared = len(common_prefix([prompt, *conversations]))
        # A template may write another header for an answer that is there (an empty thinking block in place of an open
        # one); the turns before it must stay.
        if shared < len(prompt):
            asked = common_prefix([prompt, self._render(row, turns)])
            if shared < len(asked):
                raise TemplateMismatch(
                    "the chat template writes the turns of the prompt differently once an answer follows",
                    f"With an answer, {asked[shared : shared + 40]!r} is no longer what follows"
                    f" {asked[max(0, shared - 40) : shared]!r}, so prompt and responses share no prompt. Use a template"
                    " that keeps earlier turns, such as trl.chat_template_utils.get_training_chat_template(processor),"
                    " or set a variable of the template that keeps them with `chat_template_kwargs`",
                )
        return GroupTexts(prompt=prompt, conversations=conversations, shared=shared)

    def suffix(self) -> str:
        """What the template writes after an answer."""
        answer = _MARKS["assistant"]
        text = self._render({}, [self._turn("user", _MARKS["user"]), self._turn("assistant", answer)])
        return text.rsplit(answer, 1)[-1]

    def _render(self, row: Mapping[str, Any], turns: Sequence[Any], *, add_generation_prompt: bool = False) -> str:
        if not self.exists:
            raise ValueError(
                f"{type(self.processor).__name__} has no chat template. Pass the processor of an instruction-tuned"
                " model, or set `processor.chat_template`."
            )
        tools = row.get("tools") or None
        try:
            return self.processor.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                tools=json.loads(tools) if isinstance(tools, str) else tools,
                **self.variables(row),
            )
        except (MemoryError, OverflowError, RecursionError) as error:
            raise TemplateMismatch(
                f"the chat template ends in {type(error).__name__} instead of a text",
                "It is a program that comes with the model, and this one is broken or hostile: do not use the model",
            ) from error

    def variables(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The variables of the template for a row: those of the run, and the row's own, which win."""
        return {**self.kwargs, **_row_kwargs(row)}

    def _answer(self, response: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._turn("assistant", response)] if isinstance(response, str) else self._turns(response)

    def _turns(self, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [self._turn(turn["role"], turn.get("content"), turn) for turn in turns]

    def _turn(self, role: str, content: Any, turn: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A message in the form that the template reads, without the null fields that Arrow adds."""
        rest = {key: value for key, value in (turn or {}).items() if key not in ("role", "content")}
        message = {"role": role, **{key: value for key, value in rest.items() if value is not None}}
        if content is None:
            return message
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(map(_without_nulls, content))
        if self._reads_parts.get(role, self._reads_parts["user"]):
            return {**message, "content": parts}
        if other := sorted({part["type"] for part in parts} - {"text"}):
            raise TemplateMismatch(
                f"the chat template writes text only, and the row's {role} turn has a part of type {other[0]!r}",
                "Set the chat template of a vision-language model",
            )
        return {**message, "content": "".join(part["text"] for part in parts)}

    @cached_property
    def _reads_parts(self) -> dict[str, bool]:
        """Per role, whether a message's content goes to the template as a list of parts; as a string otherwise.

        Asked of the template: one that knows strings only writes Python's print of a list, nothing, or fails. A
        processor is given parts where both are read, a tokenizer strings, as TRL does.
        """
        first = hasattr(self.processor, "tokenizer")
        forms: dict[str, bool] = {}
        for role in ("user", "assistant", "system"):
            works = [form for form in (first, not first) if self._writes(role, form, forms.get("user", form))]
            if not works and role != "system":  # many templates know no system turn, and say so when they meet one
                raise ValueError(
                    f"The chat template does not write the text of {'an' if role[0] in 'aeiou' else 'a'} {role} turn:"
                    " set `processor.chat_template` to the template of an instruction-tuned model."
                )
            forms[role] = works[0] if works else forms["user"]
        return forms

    def _writes(self, role: str, as_parts: bool, user_as_parts: bool) -> bool:
        def message(name: str, parts: bool) -> dict[str, Any]:
            return {"role": name, "content": [_text(_MARKS[name])] if parts else _MARKS[name]}

        turns = {
            "user": [message("user", as_parts)],
            "assistant": [message("user", user_as_parts), message("assistant", as_parts)],
            "system": [message("system", as_parts), message("user", user_as_parts)],
        }[role]
        try:
            text = self._render({}, turns, add_generation_prompt=role != "assistant")
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError):
            return False
        printed = any(quote + _MARKS[role] + quote in text for quote in "'\"")  # Python's or JSON's print of a list
        return _MARKS[role] in text and not printed


def common_prefix(sequences: Sequence[Any]) -> Any:
    """What texts, or lists of tokens, have in common at their start."""
    return os.path.commonprefix(sequences)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _without_nulls(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value is not None}


def _prompt(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The prompt's turns with all their fields."""
    return json.loads(row["prompt_turns"]) if row.get("prompt_turns") else row["prompt"]


def _answers(row: Mapping[str, Any]) -> Sequence[Any]:
    """Responses: texts, or lists of turns."""
    return [json.loads(text) for text in row["responses"]] if row.get("form") == "turns" else row["responses"]


def _row_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's `chat_template_kwargs`: a struct, whose keys of other rows Arrow fills with null, or JSON text."""
    found = row.get("chat_template_kwargs") or {}
    found = json.loads(found) if isinstance(found, str) else found
    kept = {key: value for key, value in found.items() if value is not None}
    if taken := sorted(_OWN_ARGUMENTS & set(kept)):
        raise TemplateMismatch(
            f"the column chat_template_kwargs sets {', '.join(taken)}, which silkie sets itself",
            "It is for variables of the chat template, such as enable_thinking",
        )
    return kept
