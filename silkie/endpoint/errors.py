"""What a call to a model can end in besides an answer, and what it used either way.

Judges, samplers and benchmark runs all ask through `silkie.endpoint`, so they share these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


MOST_KEPT = 200_000  # characters of an unusable answer
MOST_OF_MESSAGE = 2_000  # characters of an error's message, which may quote what a server sent


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
        super().__init__(clipped(message, MOST_OF_MESSAGE))
        self.kind: AnswerProblem = kind
        self.raw = clipped(raw)
        self.usage = usage or Usage()


def clipped(text: str, most: int = MOST_KEPT) -> str:
    """Beginning and end of a long text: enough to see what a model did, however much it sent."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[... {len(text) - most:,} characters not kept ...]\n{text[-(most // 2) :]}"


class ItemError(Exception):
    """An item that no model can answer: a missing image, a request the endpoint refuses. Never
    retried. `earlier` holds the unusable answers that came before it."""

    def __init__(self, kind: str, message: str, raw: str = "") -> None:
        super().__init__(clipped(message, MOST_OF_MESSAGE))
        self.kind = kind
        self.raw = clipped(raw)
        self.earlier: list[AnswerError] = []

    @property
    def usage(self) -> Usage:
        return sum((answer.usage for answer in self.earlier), Usage())


class StopRun(Exception):
    """No further call makes sense (key rejected, endpoint gone, budget spent): the run stops
    cleanly."""


def whole_text(text: str) -> str:
    """`text` with U+FFFD for halves of surrogate pairs. Models emit them, JSON can write them, and UTF-8, requests and
    parquet cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
