"""What a benchmark is made of. Each is a module of `silkie.evaluation.benchmarks`, or a YAML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie.evaluation.records import Question
from silkie.evaluation.scoring import Score

__all__ = ["Benchmark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Where a benchmark's questions come from, how answers are asked for, how a results file is scored.

    layout: what results files hold, for `score --help`; one or more lines.
    prompt_suffix: appended to every question that does not end with it already, except in the categories
        `no_suffix_for`.
    judge_prompt: record of `run` -> text. Set where a judge must rate the answers before they can be scored.
    annotations_in_data: the annotations that scoring needs lie in the folder of the questions.
    variants: other ways to score, by name; `score_results` then takes the name as `variant`.
    results_folder: a glob; a folder that holds such files is a results folder of this benchmark, with no other file to
        name it.
    """

    name: str
    title: str
    load_questions: Callable[[str | Path], list[Question]]
    score_results: Callable[..., Score]
    export_results: Callable[[Sequence[dict], str | Path], Path]
    layout: str = ""
    max_new_tokens: int = 256
    prompt_suffix: str = ""
    no_suffix_for: frozenset[str] = frozenset()
    judge_prompt: Callable[[dict[str, Any]], str] | None = None
    judge_sees_image: bool = False
    annotations_in_data: bool = False
    variants: tuple[str, ...] = ()
    results_folder: str = ""

    def score(self, results: str | Path, annotations: str | Path | None = None, *, variant: str | None = None) -> Score:
        """Score a results file with the benchmark's rule, or with a variant of it.

        Raises:
            ValueError: a variant that the benchmark does not have, or an unusable file (ResultError).
        """
        if variant is None:
            return self.score_results(results, annotations)
        if variant not in self.variants:
            known = f"one of {', '.join(self.variants)}" if self.variants else "none: it is scored in one way"
            raise ValueError(f"{self.name} has no variant {variant!r}. Expected {known}.")
        return self.score_results(results, annotations, variant=variant)

    def annotations(self, data: str | Path | None) -> str | Path | None:
        """What to score with where nobody named annotations: the folder of the questions, if they lie there."""
        return data if self.annotations_in_data else None
