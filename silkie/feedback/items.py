"""The values that travel through silkie.feedback: an item to judge, a verdict, usage, and the errors of an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

AnswerProblem = Literal[
    "empty",
    "refused",
    "truncated",
    "invalid_json",
    "missing_aspect",
    "wrong_count",
    "bad_rating",
    "malformed",
    "bad_response",
]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one or more calls used: answered calls, tokens in and out, cost in the currency of the prices (0 without
    prices)."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cost + other.cost,
        )

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def to_json(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost": round(self.cost, 9),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Usage:
        data = data or {}
        return cls(
            int(data.get("calls", 0)),
            int(data.get("prompt_tokens", 0)),
            int(data.get("completion_tokens", 0)),
            float(data.get("cost", 0)),
        )


class AnswerError(Exception):
    """An answer that arrived (and may have been paid for) but cannot be used. `raw` is its text, `kind` says what is
    wrong with it."""

    def __init__(self, kind: AnswerProblem, message: str, raw: str = "", usage: Usage | None = None) -> None:
        super().__init__(message)
        self.kind: AnswerProblem = kind
        self.raw = raw
        self.usage = usage or Usage()


class ItemError(Exception):
    """An item that cannot be judged at all, whoever is asked: a missing image, a request the endpoint refuses. Never
    retried. `earlier` holds the unusable answers that came before it."""

    def __init__(self, kind: str, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.raw = raw
        self.earlier: list[AnswerError] = []

    @property
    def usage(self) -> Usage:
        return sum((answer.usage for answer in self.earlier), Usage())


class StopRun(Exception):
    """A condition under which no further call makes sense (key rejected, endpoint gone, budget spent): the run stops
    cleanly."""


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


def whole_text(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs. Models emit them, JSON can write them, and UTF-8, requests and
    parquet cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The instruction as plain text. Of a conversation with several turns, every turn after its role; images are left
    out."""
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
    usage: Usage = Usage()
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
