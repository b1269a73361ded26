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
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Literal

__all__ = ["Answer", "BenchmarkRow", "Card", "Curve", "Report", "System", "card_of", "row_of"]

Flip = Literal["fixed", "broken", "right", "wrong", "unjudged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system's value in a benchmark row. `difference` is its value minus the base's, with its interval and p-value,
    where known."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """A metric for every system, the base first. `headline` rows also stand in the tiles at the top; rows of one
    `group` share a table; `neutral` metrics have no better direction."""

    name: str
    metric: str = ""
    lower_is_better: bool = False
    neutral: bool = False
    systems: tuple[System, ...] = ()
    headline: bool = False
    questions: int | None = None
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    answer: str
    correct: bool | None = None
    ratings: dict[str, float] = field(default_factory=dict)
    invented: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A question of the gallery. `image` is a path, bytes or PIL image; None for a text-only question."""

    id: str
    prompt: str
    base: Answer
    trained: Answer
    image: Any = None
    category: str = ""
    benchmark: str = ""
    reference: str = ""

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


def row_of(data: Mapping[str, Any]) -> BenchmarkRow:
    """A benchmark row of `report.json`. Raises ValueError where a field is missing or unknown."""
    systems = data.get("systems")
    if not isinstance(systems, list) or "name" not in data:
        raise ValueError(f"a benchmark needs `name` and a list of `systems`, found {dict(data)!r:.160}.")
    rows = tuple(System(**system) for system in systems)
    for field_name in (f.name for f in fields(System) if f.name != "name"):
        for system in rows:
            value = getattr(system, field_name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value)
            ):
                raise ValueError(
                    f"benchmark {data['name']!r}: `{field_name}` of {system.name!r} must be a number, found {value!r}."
                )
    return BenchmarkRow(**{**data, "systems": rows})


def card_of(data: Mapping[str, Any]) -> Card:
    """A gallery card of `report.json`; `base` and `trained` may be plain texts."""

    def answer(value: Any) -> Answer:
        if isinstance(value, str):
            return Answer(answer=value)
        if not isinstance(value, Mapping) or "answer" not in value:
            raise ValueError(
                f"gallery card {data.get('id')!r}: `base` and `trained` are texts or objects with `answer`, found"
                f" {value!r:.120}."
            )
        return Answer(**{**value, "invented": tuple(value.get("invented", ()))})

    return Card(
        **{
            **data,
            "id": str(data.get("id", "")),
            "base": answer(data.get("base")),
            "trained": answer(data.get("trained")),
        }
    )
