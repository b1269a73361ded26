"""The options of `python -m silkie.evaluation`, one dataclass per command: flags, types, ranges and help together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.benchmarks import BENCHMARKS
from silkie.io.options import argument, option

__all__ = ["NAMES", "AnswerOptions", "CompareOptions", "JudgeOptions", "RunOptions", "ScoreOptions", "layouts"]

NAMES = ", ".join(BENCHMARKS)
WHICH = f"{NAMES}; or the path of a YAML definition (also as --benchmark NAME)"

VARIANT = "another way to score: " + "; ".join(
    f"{', '.join(benchmark.variants)} ({name})" for name, benchmark in BENCHMARKS.items() if benchmark.variants
)

OWN_LAYOUT = "JSONL with `answer` (yesno, exact) or `rating` / `judge` (judge), and `label` or an `id` of the questions"


def layouts() -> str:
    """What `score` reads, benchmark by benchmark: the end of its help."""
    rows = {**{benchmark.name: benchmark.layout for benchmark in BENCHMARKS.values()}, ".yaml": OWN_LAYOUT}
    width = 2 + max(map(len, rows))
    lines = [f"  {name:<{width}}" + layout.replace("\n", "\n" + " " * (width + 2)) for name, layout in rows.items()]
    return "\n".join(
        [
            "results that are read:",
            *lines,
            "",
            "A line that cannot be scored ends the command with status 2 and `error: FILE:LINE: what is wrong`.",
        ]
    )


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Who answers and how: shared by `run` and `judge`."""

    model: str = option(help="model directory or hub name; with --base-url the name that the endpoint knows it by")
    base_url: str | None = option(
        None, "answer through an OpenAI-compatible endpoint, for example http://localhost:8000/v1"
    )
    key_variable: str | None = option(
        None, "environment variable with the endpoint's key (default: SILKIE_API_KEY, then OPENAI_API_KEY)"
    )
    batch_size: Annotated[int, Ge(1)] = option(8, "questions at a time; calls in flight with --base-url")
    workers: Annotated[int, Ge(0)] = option(2, "processes that decode images ahead")
    max_new_tokens: Annotated[int, Ge(1)] | None = option(None, "default: the benchmark's own")
    temperature: Annotated[float, Ge(0), Le(100)] = option(0.0, "0 decodes greedily (default: 0)")
    top_p: Annotated[float, Ge(1e-6), Le(1)] = option(1.0, "only with a temperature (default: 1)")
    seed: int = option(0, "seed of the sampling")
    system: str | None = option(None, "system prompt")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "dtype of the weights (default: the checkpoint's)"
    )
    device: str | None = option(None, "default: the GPU where there is one")
    overwrite: bool = option(False, "start over instead of continuing OUT")
    quiet: bool = option(False, "no progress line")

    def generation(self, benchmark: Benchmark) -> dict[str, Any]:
        """Generation settings, for a local model and for an endpoint alike."""
        return {
            "max_new_tokens": self.max_new_tokens or benchmark.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "system": self.system,
        }

    def settings(self, benchmark: Benchmark) -> dict[str, Any]:
        """What determines the answers, besides the questions: a results file is continued only with equal settings."""
        who = {"model": self.model, "base_url": self.base_url, "adapter": None, "dtype": self.dtype}
        return {**who, **self.generation(benchmark)}

    def loop(self) -> dict[str, Any]:
        """The arguments of `answer_tasks`."""
        names = ("batch_size", "workers", "seed", "overwrite")
        return {name: getattr(self, name) for name in names} | {"progress": not self.quiet}


@dataclass(frozen=True, kw_only=True)
class RunOptions(AnswerOptions):
    benchmark: str = argument(WHICH)
    data: str | None = option(None, "folder of the benchmark's release (for a YAML definition: default its own folder)")
    out: str = option(help="results file (JSONL)")
    adapter: str | None = option(None, "LoRA adapter directory (--model is then its base model)")
    base_out: str | None = option(
        None, "also answer with the adapter switched off (same weights, one load), into this file"
    )
    export: str | None = option(
        None, "also write the answers in the benchmark's official layout to this file or folder"
    )
    limit: Annotated[int, Ge(1)] | None = option(None, "only the first N questions", metavar="N")

    def settings(self, benchmark: Benchmark) -> dict[str, Any]:
        return super().settings(benchmark) | {"adapter": self.adapter}


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(AnswerOptions):
    benchmark: str = argument(WHICH)
    results: str = argument("results file of `run`")
    out: str = option(help="results file with the judge's replies (JSONL)")
    images: str | None = option(None, "folder of the images (default: the data folder noted beside RESULTS)")


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    benchmark: str = argument(WHICH)
    results: str = argument(
        "results file, or folder of results files, in the benchmark's official layout or as `run` wrote it (also as"
        " --results PATH)"
    )
    annotations: str | None = option(
        None,
        "questions or annotations of the benchmark (default: in the results, or searched beside them)",
        aliases=("--questions",),
    )
    variant: str | None = option(None, VARIANT)
    json: bool = option(False, "print JSON")
    items: str | None = option(None, "write every question with how it was read and scored (JSONL)", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    a: str = argument("results of the reference (the base model)")
    b: str = argument("results of the other (the trained model)")
    benchmark: str | None = option(
        None, f"{NAMES}; or the path of a YAML definition (default: the one noted in the results)"
    )
    annotations: str | None = option(None, "as for score", aliases=("--questions",))
    variant: str | None = option(None, "as for score")
    only_common: bool = option(False, "compare the questions that both have")
    json: bool = option(False, "print JSON")
    html: str | None = option(None, "write a page with the flipped questions and their images", metavar="FILE")
    images: str | None = option(None, "folder of the images (default: the data folder noted beside B)")
