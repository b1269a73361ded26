"""The benchmarks by name: the one place where a name becomes code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silkie.evaluation.benchmarks import amber, chair, mme, mmhal, mmvet, pope, redteam
from silkie.evaluation.records import Question
from silkie.evaluation.scoring import Score

__all__ = ["BENCHMARKS", "Benchmark", "get_benchmark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark: where its questions come from, how answers are asked for, how a results file is scored.

    `prompt_suffix` is put behind every question unless it is already there, or the
    question's category is in `no_suffix_for`. `judge_prompt` (a record of `run` -> text) exists where a
    judge must rate answers before they can be scored.
    """

    name: str
    title: str
    load_questions: Callable[[str | Path], list[Question]]
    score_results: Callable[..., Score]
    export_results: Callable[[Sequence[dict], str | Path], Path]
    max_new_tokens: int = 256
    prompt_suffix: str = ""
    no_suffix_for: frozenset[str] = frozenset()
    judge_prompt: Callable[[dict[str, Any]], str] | None = None
    judge_sees_image: bool = False


BENCHMARKS: dict[str, Benchmark] = {
    b.name: b
    for b in (
        Benchmark(
            name="mme",
            title="MME",
            load_questions=mme.load_questions,
            score_results=mme.score_results,
            export_results=mme.export_results,
            max_new_tokens=16,
            prompt_suffix=mme.PROMPT_SUFFIX,
        ),
        Benchmark(
            name="pope",
            title="POPE",
            load_questions=pope.load_questions,
            score_results=pope.score_results,
            export_results=pope.export_results,
            max_new_tokens=16,
            prompt_suffix=" Please answer yes or no.",
        ),
        Benchmark(
            name="amber",
            title="AMBER",
            load_questions=amber.load_questions,
            score_results=amber.score_results,
            export_results=amber.export_results,
            prompt_suffix=" Please answer yes or no.",
            no_suffix_for=frozenset({"generative"}),
        ),
        Benchmark(
            name="chair",
            title="CHAIR",
            load_questions=chair.load_questions,
            score_results=chair.score_results,
            export_results=chair.export_results,
        ),
        Benchmark(
            name="mmhal",
            title="MMHal-Bench",
            load_questions=mmhal.load_questions,
            score_results=mmhal.score_results,
            export_results=mmhal.export_results,
            judge_prompt=mmhal.judge_prompt,
        ),
        Benchmark(
            name="mmvet",
            title="MM-Vet",
            load_questions=mmvet.load_questions,
            score_results=mmvet.score_results,
            export_results=mmvet.export_results,
            max_new_tokens=512,
            judge_prompt=mmvet.judge_prompt,
        ),
        Benchmark(
            name="redteam",
            title="Red team",
            load_questions=redteam.load_questions,
            score_results=redteam.score_results,
            export_results=redteam.export_results,
        ),
    )
}


def get_benchmark(name: str) -> Benchmark:
    """A benchmark by name (any case), or a person's own: the path of its YAML definition.

    Raises:
        ValueError: neither; the message lists what there is.
    """
    if name.endswith((".yaml", ".yml")):
        from silkie.evaluation.benchmarks.generic import load_definition

        return load_definition(name)
    known = BENCHMARKS.get(name.lower().replace("-", "").replace("_", "").replace("bench", ""))
    if known is None:
        raise ValueError(
            f"Unknown benchmark {name!r}. Expected one of {', '.join(BENCHMARKS)}, or the path of a YAML definition."
        )
    return known
