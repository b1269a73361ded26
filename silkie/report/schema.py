"""What a report shows. `report.json` in a run directory holds these fields; everything in it is optional, and paths are
relative to it.

    {
      "title": "...", "summary": "one or two sentences",
      "configuration": {"Section": {"name": value}},
      "data": {"train": {"groups": 600, "pairs": 2210}, ...},
      "trainer_state": "trainer_state.json",
      "evaluations": [
        {"benchmark": "pope", "name": "POPE (held-out scenes)", "annotations": null, "images": "eval/images", "gallery":
         true, "systems": {"base": "eval/base.jsonl", "trained": "eval/trained.jsonl", "SFT on best": "eval/sft.jsonl"},
         "compare_with": "trained"}
      ],
      "benchmarks": [
        {"name": "CHAIR_s, greedy", "metric": "...", "lower_is_better": true,
         "systems": [{"name": "base", "value": 0.69, "low": 0.61, "high": 0.76}, ...]}
      ],
      "gallery": [
        {"id": "...", "image": "images/1.png", "prompt": "...", "category": "...", "reference": "...", "base":
         {"answer": "...", "correct": false, "ratings": {"Helpfulness": 3}, "invented": ["blue star"], "note": "..."},
         "trained": {...}}
      ],
      "notes": ["..."]
    }

`evaluations` are scored here, from results files of `silkie.evaluation run`; `benchmarks` and `gallery` are shown as
given. The gallery of an evaluation sets the first system's answers beside those of `compare_with` (default: the
second). Configuration, data and curves that are not given are those that the trainer saved in the directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from silkie.io.checked import CHECKED, FieldError, check
from silkie.io.files import read_file
from silkie.io.jsonl import json_document

__all__ = [
    "Answer",
    "BenchmarkRow",
    "Card",
    "Curve",
    "Evaluation",
    "Report",
    "RunFile",
    "System",
    "read_run_file",
]

OBJECTS = Field(description="a list of objects")
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]  # strict: `true` is no number
Flip = Literal["fixed", "broken", "right", "wrong", "unjudged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system's value in a benchmark row. `difference` is its value minus the base's, with its interval and p-value,
    where known. `caveats`: what a reader must know before trusting the value, as the scorer says it."""

    name: str
    value: Number | None
    low: Number | None = None
    high: Number | None = None
    difference: Number | None = None
    difference_low: Number | None = None
    difference_high: Number | None = None
    p_value: Number | None = None
    caveats: tuple[str, ...] = ()

    __pydantic_config__ = CHECKED


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """A metric for every system, the base first. `headline` rows also stand in the tiles at the top; rows of one
    `group` share a table; `neutral` metrics have no better direction."""

    name: str
    metric: str = ""
    lower_is_better: bool = False
    neutral: bool = False
    systems: Annotated[tuple[System, ...], Field(description="a list of systems, each with `name` and `value`")]
    headline: bool = False
    questions: int | None = None
    group: str = ""

    __pydantic_config__ = CHECKED


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    answer: str
    correct: bool | None = None
    ratings: dict[str, float] = field(default_factory=dict)
    invented: tuple[str, ...] = ()
    note: str = ""

    __pydantic_config__ = CHECKED


def _answer(value: Any) -> Any:
    return {"answer": value} if isinstance(value, str) else value


# in `report.json` a text is enough
GivenAnswer = Annotated[Answer, BeforeValidator(_answer), Field(description="a text or an object with `answer`")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A question of the gallery. `image` is a path, bytes or PIL image; None for a text-only question."""

    id: Annotated[str, BeforeValidator(str)] = ""
    prompt: str
    base: GivenAnswer
    trained: GivenAnswer
    image: Any = None
    category: str = ""
    benchmark: str = ""
    reference: str = ""

    __pydantic_config__ = CHECKED

    @property
    def flip(self) -> Flip:
        before, after = self.base.correct, self.trained.correct
        if before is None or after is None:
            return "unjudged"
        return ("right" if after else "broken") if before else ("fixed" if after else "wrong")


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A panel of curves: series name -> [(step, value)]."""

    title: str
    series: dict[str, list[tuple[float, float]]]
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Report:
    title: str
    summary: str = ""
    names: tuple[str, str] = ("base", "trained")
    configuration: dict[str, dict[str, Any]] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    benchmarks: list[BenchmarkRow] = field(default_factory=list)
    gallery: list[Card] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    gallery_counts: Mapping[Flip, int] | None = None
    """Questions by what changed, where `gallery` shows only some of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results files of one benchmark, the first system's the base; `compare_with` names the other one of the gallery
    (default: the second)."""

    benchmark: str
    systems: Annotated[dict[str, str], Field(description="name -> results file")]
    name: str | None = None
    annotations: str | None = None
    images: str | None = None
    gallery: bool = True
    compare_with: str | None = None

    __pydantic_config__ = CHECKED

    def __post_init__(self) -> None:
        others = list(self.systems)[1:]
        if not self.systems:
            raise ValueError("`systems` is empty; expected name -> results file")
        if self.compare_with is not None and self.compare_with not in others:
            raise ValueError(
                f"`compare_with` must be one of {', '.join(others) or 'two systems'}, found {self.compare_with!r}"
            )

    @property
    def compared(self) -> tuple[str, str] | None:
        """The two systems whose answers the gallery shows; None where there is one alone."""
        base, *others = self.systems
        return (base, self.compare_with or others[0]) if others else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """`report.json`."""

    title: str = ""
    summary: str = ""
    trainer_state: str = ""
    configuration: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    log_history: Annotated[list[dict[str, Any]], OBJECTS] = field(default_factory=list)
    evaluations: Annotated[list[Evaluation], OBJECTS] = field(default_factory=list)
    benchmarks: Annotated[list[BenchmarkRow], OBJECTS] = field(default_factory=list)
    gallery: Annotated[list[Card], OBJECTS] = field(default_factory=list)
    notes: Annotated[list[str], Field(description="a list of texts")] = field(default_factory=list)

    __pydantic_config__ = CHECKED


def read_run_file(file: Path) -> RunFile:
    """Read and check a `report.json`. Raises ValueError naming file, field and what was found."""
    data = json_document(read_file(file), str(file))
    try:
        return check(RunFile, data)
    except FieldError as error:
        raise ValueError(f"{file}: {error}.") from None
