"""The one rule by which a record's columns decide how it is read. Every detector asks it, so that no two agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from silkie.data.turns import as_list

PAIR = frozenset({"chosen", "rejected"})


class Reading(NamedTuple):
    """How a record is read, and the columns that decided it.

    Attributes:
        kind: "pair" (prompt, chosen, rejected), "conversation", "instruction" or "question" (the prompt is in that
            column, beside chosen and rejected), "group", "completions", "label" (prompt, completion, label),
            "comparison" or "text"; "" where nothing is known.
    """

    kind: str
    columns: frozenset[str]


def reading(record: Mapping[str, Any]) -> Reading:
    """The first of these that the columns allow: prompt, chosen and rejected win over everything else, as TRL ignores
    the other columns then; so do chosen and rejected as conversations, whose shared beginning is the prompt."""
    keys = record.keys()
    if keys >= PAIR:
        if "prompt" in keys:
            return Reading("pair", PAIR | {"prompt"})
        if all(_is_conversation(record[column]) for column in PAIR):
            return Reading("pair", PAIR)
        for kind, columns in _PROMPTS:
            if found := keys & columns:
                return Reading(kind, PAIR | found)
        return Reading("pair", PAIR)
    for kind, columns in _OTHERS:
        if keys >= columns:
            return Reading(kind, columns)
    if "text" in keys and (images := keys & {"image", "image_path"}):
        return Reading("text", frozenset({"text", *images}))
    return Reading("", frozenset())


# Columns that hold the prompt of chosen and rejected where there is no prompt column; earlier ones win.
_PROMPTS = (
    ("conversation", frozenset({"conversations", "messages"})),
    ("instruction", frozenset({"instruction"})),
    ("question", frozenset({"question"})),
)
_OTHERS = (
    ("label", frozenset({"prompt", "completion", "label"})),
    ("group", frozenset({"prompt", "responses"})),
    ("completions", frozenset({"prompt", "completions"})),
    ("comparison", frozenset({"conversations", "output_1", "output_2", "preference"})),
)


def _is_conversation(value: Any) -> bool:
    """Whether a value has several turns {"role", "content"}, so that it can begin with a prompt."""
    turns = as_list(value)
    return (
        isinstance(turns, (list, tuple))
        and len(turns) > 1
        and all(isinstance(t, Mapping) and "role" in t for t in turns)
    )
