"""The values that travel through silkie.feedback: an item to judge, a verdict, a rated item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from silkie.endpoint.errors import Usage


@dataclass(frozen=True, slots=True)
class AspectRating:
    """One rating and why. `rating` is None where the judge said "N/A"."""

    rating: float | None
    rationale: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeItem:
    """An instruction with K responses.

    prompt: a text, or a conversation (list of {"role", "content"}). images: paths, bytes or PIL images, in prompt
        order.
    models: which model wrote each response. meta: anything else about the item, for oracles; never sent to an endpoint.
    given_id: the id as the input has it (some files number their items); what is written carries this one, so that the
    two can be joined."""

    id: str
    prompt: str | Sequence[Mapping[str, Any]]
    responses: tuple[str, ...]
    images: tuple[Any, ...] = ()
    models: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    given_id: str | int | None = None

    @property
    def written_id(self) -> str | int:
        return self.id if self.given_id is None else self.given_id

    def reordered(self, order: Sequence[int]) -> JudgeItem:
        """The same item with response order[p] at position p."""
        return JudgeItem(
            id=self.id,
            prompt=self.prompt,
            images=self.images,
            meta=self.meta,
            responses=tuple(self.responses[i] for i in order),
            models=tuple(self.models[i] for i in order) if self.models else (),
        )

    def fingerprint(self) -> str:
        """12 hex digits over prompt, responses and image names: tells whether a journal's rating belongs to these
        texts."""
        names = [str(image) if isinstance(image, (str, Path)) else type(image).__name__ for image in self.images]
        content = json.dumps([self.prompt, list(self.responses), names], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def instruction_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The instruction as plain text. Of a conversation with several turns, every turn after its role; images are
    omitted."""
    if isinstance(prompt, str):
        return prompt.replace("<image>", "").strip()

    def content_text(content: Any) -> str:
        if isinstance(content, str):
            return content
        return "\n".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")

    turns = [(str(turn["role"]), content_text(turn["content"]).strip()) for turn in prompt]
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One answer of a judge: for each response, in the order shown, {aspect: AspectRating}. `form` is how it was
    written."""

    ratings: tuple[Mapping[str, AspectRating], ...]
    usage: Usage = field(default_factory=Usage)
    form: Literal["json", "markdown", "direct"] = "direct"


@dataclass(frozen=True, slots=True, kw_only=True)
class RatedItem:
    """The finished rating of an item, in the item's own order. With several votes `ratings` are means over votes and
    `spread` their standard deviations (population). `orders[v][p]` is the response that vote v saw at position p;
    `vote_ratings[v][i]` its ratings."""

    id: str
    ratings: list[dict[str, float | None]]
    rationales: list[dict[str, str]]
    spread: list[dict[str, float | None]]
    orders: list[list[int]]
    vote_ratings: list[list[dict[str, float | None]]]
    usage: Usage
    form: str
