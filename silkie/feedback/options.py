"""The options of the commands: one declaration for the functions and for the command line.

`RateOptions` and `SampleOptions` are what `rate_file` and `sample_file` take; the commands add where the files are and
who answers. Nothing here imports more than the parser, so that `--help` is there at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import AllowInfNan

from silkie.io.options import argument, option

__all__ = [
    "BuildCommand",
    "EndpointOptions",
    "InjectionsCommand",
    "JournalOptions",
    "JudgingOptions",
    "RateCommand",
    "RateOptions",
    "SampleCommand",
    "SampleOptions",
]

Count = Annotated[int, Ge(1)]
Positive = Annotated[float, AllowInfNan(False), Gt(0)]
NotNegative = Annotated[float, AllowInfNan(False), Ge(0)]


@dataclass(frozen=True, kw_only=True)
class JournalOptions:
    """What `rate` and `sample` share. max_tokens, max_cost: budget over the whole journal, earlier runs included."""

    image_root: str | None = option(None, "directory or zip of the images (default: beside the input file)")
    concurrency: Count = option(16, "calls in flight at most")
    seed: int = option(0, "of every random choice: order of the texts, members and draws")
    max_tokens: Count | None = option(
        None,
        "stop cleanly once this many tokens are spent, earlier runs included",
        flag="--max-budget-tokens",
        metavar="N",
    )
    max_cost: Positive | None = option(None, "stop cleanly once this much is spent (needs prices)")
    progress: bool = option(True, "no progress line", flag="--quiet")


@dataclass(frozen=True, kw_only=True)
class RateOptions(JournalOptions):
    """How a run of `rate` works.

    votes: answers per item; more than half of them must be usable.
    attempts: answers per vote until one is usable.
    retry_failed: retry items that an earlier run recorded as failed (their new line follows the old one)."""

    votes: Count = option(1, "answers per item; ratings are their mean")
    attempts: Count = option(3, "answers per vote until one is usable")
    retry_failed: bool = option(False, "retry items that an earlier run recorded as failed")


@dataclass(frozen=True, kw_only=True)
class SampleOptions(JournalOptions):
    """How a run of `sample` works.

    k: responses per prompt.
    minimum: items with fewer distinct responses are not written.
    redraws: how often a failed or repeated draw is tried again."""

    k: Count = option(4, "responses per prompt")
    minimum: Count = option(2, "do not write items with fewer distinct responses")
    redraws: Annotated[int, Ge(0)] = option(3, "tries for a draw that failed or repeats another")
    timeout: Positive = option(120.0, "seconds for one call")
    max_image_side: Count | None = option(None, "scale larger images down to this many pixels")


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Options shared by the commands that call an endpoint."""

    base_url: str | None = option(None, "OpenAI-compatible endpoint, for example http://localhost:8000/v1")
    model: str | None = option(None, "name of the model at the endpoint")
    key_variable: str | None = option(
        None, "environment variable with the API key (default: SILKIE_API_KEY, then OPENAI_API_KEY)"
    )
    timeout: Positive = option(60.0, "seconds for one call")
    price_prompt: NotNegative = option(0.0, "price per million prompt tokens")
    price_completion: NotNegative = option(0.0, "price per million completion tokens")


@dataclass(frozen=True, kw_only=True)
class JudgingOptions:
    """What a judge is shown, and the form in which it answers."""

    responses: str = argument('JSONL of {"id", "image", "prompt", "responses": [{"model", "response"}, ...]}')
    rubric: str | None = option(None, "YAML file with aspects, scale and texts (default: VLFeedback's three aspects)")
    structured: Literal["auto", "json", "markdown"] = option("auto", "form that is asked for")
    max_answer_tokens: Count = option(2048, "room for one answer")
    max_image_side: Count | None = option(None, "scale larger images down to this many pixels")


# The endpoint's fields come first among the bases: both have a timeout, and the command line's default is 60 s.
@dataclass(frozen=True, kw_only=True)
class RateCommand(EndpointOptions, JudgingOptions, RateOptions):
    journal: str = option(help="append-only journal: one JSON line per finished or failed item")
    local: str | None = option(None, "judge with a model in this process instead: a model or adapter directory")
    temperature: NotNegative | None = option(None, "default: 0 for one vote, 0.7 for several")


@dataclass(frozen=True, kw_only=True)
class InjectionsCommand(EndpointOptions, JudgingOptions):
    items: Count = option(5, "items to try the suite on, one call per item and injection")
    image_root: str | None = option(None, "directory or zip of the images (default: beside RESPONSES)")
    concurrency: Count = option(8, "calls in flight at most")


@dataclass(frozen=True, kw_only=True)
class SampleCommand(EndpointOptions, SampleOptions):
    prompts: str = argument('JSONL of {"image", "prompt"}, `id` optional')
    out: str = option(help="responses file, as `rate` reads it (its journal: OUT.journal)")
    pool: str | None = option(None, "YAML file with the members of the pool (see silkie/feedback/pool.py)")
    local: str | None = option(None, "instead of --pool: one model or adapter directory in this process")
    temperatures: tuple[NotNegative, ...] | None = option(
        None, "with --base-url or --local: temperatures of the draws (default 1)"
    )
    max_answer_tokens: Count | None = option(None, "with --base-url or --local: length of a response (default 512)")


@dataclass(frozen=True, kw_only=True)
class BuildCommand:
    responses: str = argument("the file that was rated")
    journal: str = option(help="the journal of `rate`")
    out: str = option(help="directory of the dataset")
    image_root: str | None = option(None, "directory or zip of the images (default: beside RESPONSES)")
    pairs: str = option("all", "all, best_vs_worst, best_vs_rest, random, longest or model:NAME")
    min_margin: float = option(0.0, "smallest gap of mean ratings that makes a pair")
    reference: str | None = option(
        None, 'held-out ratings by people or an oracle: JSONL of {"id", "ratings": [{aspect: number}, ...]}'
    )
