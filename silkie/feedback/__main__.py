"""The command line: `python -m silkie.feedback sample | rate | build`."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STOPPED_EARLY = 3
OF_MEMBERS = ("model", "key_variable", "price_prompt", "price_completion")
OF_JUDGES = (*OF_MEMBERS, "temperature", "max_image_side", "max_budget_tokens", "max_cost")


def add_endpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of whoever talks to an endpoint."""
    parser.add_argument("--base-url", help="OpenAI-compatible endpoint, for example http://localhost:8000/v1")
    parser.add_argument("--model", help="name of the model at the endpoint")
    parser.add_argument(
        "--key-variable", help="environment variable with the API key (default: SILKIE_API_KEY, then OPENAI_API_KEY)"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one call (default 60)")
    parser.add_argument("--concurrency", type=int, default=16, help="calls in flight at most (default 16)")
    parser.add_argument(
        "--max-budget-tokens", type=int, help="stop cleanly once this many tokens are spent, earlier runs included"
    )
    parser.add_argument("--max-cost", type=float, help="stop cleanly once this much is spent (needs prices)")
    parser.add_argument("--price-prompt", type=float, default=0.0, help="price per million prompt tokens")
    parser.add_argument("--price-completion", type=float, default=0.0, help="price per million completion tokens")
    parser.add_argument(
        "--seed", type=int, default=0, help="of every random choice: order of the texts, members and draws (default 0)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress line")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m silkie.feedback", description="Responses, ratings and a preference dataset without annotators."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    rate = commands.add_parser("rate", help="rate responses with a judge; run again to resume")
    rate.add_argument("responses", help='JSONL of {"id", "image", "prompt", "responses": [{"model", "response"}, ...]}')
    rate.add_argument("--journal", required=True, help="append-only journal: one JSON line per finished or failed item")
    rate.add_argument("--image-root", help="directory or zip of the images (default: beside RESPONSES)")
    rate.add_argument("--local", help="judge with a model in this process instead: a model or adapter directory")
    rate.add_argument("--rubric", help="YAML file with aspects, scale and texts (default: VLFeedback's three aspects)")
    rate.add_argument("--votes", type=int, default=1, help="answers per item; ratings are their mean (default 1)")
    rate.add_argument("--attempts", type=int, default=3, help="answers per vote until one is usable (default 3)")
    rate.add_argument(
        "--structured",
        choices=["auto", "json", "markdown"],
        default="auto",
        help="form that is asked for (default auto)",
    )
    rate.add_argument("--temperature", type=float, help="default: 0 for one vote, 0.7 for several")
    rate.add_argument("--max-answer-tokens", type=int, default=2048, help="room for one answer (default 2048)")
    rate.add_argument("--max-image-side", type=int, help="scale larger images down to this many pixels")
    rate.add_argument(
        "--retry-failed", action="store_true", help="do items again that an earlier run recorded as failed"
    )
    add_endpoint_arguments(rate)
    rate.set_defaults(run=run_rate)

    sample = commands.add_parser("sample", help="draw responses from a pool of models; run again to resume")
    sample.add_argument("prompts", help='JSONL of {"image", "prompt"}, `id` optional')
    sample.add_argument("--out", required=True, help="responses file, as `rate` reads it (its journal: OUT.journal)")
    sample.add_argument("--pool", help="YAML file with the members of the pool (see silkie/feedback/pool.py)")
    sample.add_argument("--local", help="instead of --pool: one model or adapter directory in this process")
    sample.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        help="with --base-url or --local: temperatures of the draws (default 1)",
    )
    sample.add_argument(
        "--max-answer-tokens", type=int, help="with --base-url or --local: length of a response (default 512)"
    )
    sample.add_argument("--k", type=int, default=4, help="responses per prompt (default 4)")
    sample.add_argument(
        "--minimum", type=int, default=2, help="leave out items with fewer distinct responses (default 2)"
    )
    sample.add_argument(
        "--redraws", type=int, default=3, help="tries for a draw that failed or repeats another (default 3)"
    )
    sample.add_argument("--image-root", help="directory or zip of the images (default: beside PROMPTS)")
    sample.add_argument("--max-image-side", type=int, help="scale larger images down to this many pixels")
    add_endpoint_arguments(sample)
    sample.set_defaults(run=run_sample)

    build = commands.add_parser("build", help="responses and journal -> VLFeedback dataset, pairs and a quality report")
    build.add_argument("responses", help="the file that was rated")
    build.add_argument("--journal", required=True, help="the journal of `rate`")
    build.add_argument("--out", required=True, help="directory of the dataset")
    build.add_argument("--image-root", help="directory or zip of the images (default: beside RESPONSES)")
    build.add_argument(
        "--pairs", default="all", help="all, best_vs_worst, best_vs_rest, random, longest or model:NAME (default all)"
    )
    build.add_argument("--min-margin", type=float, default=0.0, help="smallest gap of mean ratings that makes a pair")
    build.add_argument(
        "--reference",
        help='held-out ratings by people or an oracle: JSONL of {"id", "ratings": [{aspect: number}, ...]}',
    )
    build.set_defaults(run=run_build)
    return parser


def make_endpoint(arguments: argparse.Namespace) -> Any:
    from silkie.endpoint.budget import Prices
    from silkie.endpoint.client import Endpoint

    return Endpoint(
        arguments.base_url,
        arguments.model,
        timeout=arguments.timeout,
        prices=Prices(prompt=arguments.price_prompt, completion=arguments.price_completion),
        key_variable=arguments.key_variable,
        connections=arguments.concurrency,
    )


def check_endpoint_arguments(arguments: argparse.Namespace, *, priced: bool) -> None:
    """Raises ValueError for options that are out of range or contradict each other."""
    for name in (
        "concurrency",
        "votes",
        "attempts",
        "k",
        "minimum",
        "max_answer_tokens",
        "max_image_side",
        "max_budget_tokens",
    ):
        if (count := getattr(arguments, name, None)) is not None and count < 1:
            raise ValueError(f"--{name.replace('_', '-')} {count}: expected 1 or more")
    for name in ("temperature", "price_prompt", "price_completion", "redraws"):
        if (value := getattr(arguments, name, None)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected 0 or more")
    for name in ("timeout", "max_cost"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected more than 0")
    if arguments.max_cost is not None and not priced:
        raise ValueError(
            "--max-cost needs prices (--price-prompt, --price-completion; in a pool: price_prompt, price_completion)"
        )


def _refuse(arguments: argparse.Namespace, belongs_to: str, *names: str) -> None:
    """Raises ValueError for an option that was passed and that nothing would read."""
    for name in names:
        if getattr(arguments, name):
            raise ValueError(f"--{name.replace('_', '-')} is an option of {belongs_to}")


def run_rate(arguments: argparse.Namespace) -> int:
    from silkie.feedback.judges import Judge, LocalJudge, OpenAIJudge
    from silkie.feedback.rate_run import RateOptions, rate_file
    from silkie.feedback.rubric import load_rubric

    check_endpoint_arguments(arguments, priced=bool(arguments.price_prompt or arguments.price_completion))
    rubric = load_rubric(arguments.rubric)
    judge: Judge
    if arguments.local:
        if arguments.base_url:
            raise ValueError("--local and --base-url name two judges; pass one of them")
        _refuse(arguments, "an endpoint, and --local is none", *OF_JUDGES)
        from silkie.inference import load_policy

        judge = LocalJudge(
            *load_policy(arguments.local),
            rubric=rubric,
            name=arguments.local,
            max_new_tokens=arguments.max_answer_tokens,
        )
    else:
        if not (arguments.base_url and arguments.model):
            raise ValueError("pass --base-url and --model (an endpoint), or --local (a model directory)")
        default_temperature = 0.0 if arguments.votes == 1 else 0.7
        judge = OpenAIJudge(
            make_endpoint(arguments),
            rubric=rubric,
            structured=arguments.structured,
            temperature=default_temperature if arguments.temperature is None else arguments.temperature,
            max_tokens=arguments.max_answer_tokens,
            max_image_side=arguments.max_image_side,
        )
    options = RateOptions(
        image_root=arguments.image_root,
        concurrency=1 if arguments.local else arguments.concurrency,
        votes=arguments.votes,
        attempts=arguments.attempts,
        seed=arguments.seed,
        max_tokens=arguments.max_budget_tokens,
        max_cost=arguments.max_cost,
        retry_failed=arguments.retry_failed,
        progress=not arguments.quiet,
    )
    summary = rate_file(arguments.responses, judge, arguments.journal, options)
    print(summary.text())
    if summary.stopped:
        print("run the same command again to go on")
        return STOPPED_EARLY
    if summary.failures:
        print("--retry-failed does the failed items again")
    return 1 if summary.items and not summary.rated else 0


def run_sample(arguments: argparse.Namespace) -> int:
    from silkie.feedback.pool import Member, Pool, load_pool
    from silkie.feedback.sample import SampleOptions, sample_file

    if sum(source is not None for source in (arguments.pool, arguments.local, arguments.base_url)) != 1:
        raise ValueError("pass exactly one of --pool, --local and --base-url (with --model)")
    if arguments.pool:
        _refuse(
            arguments,
            "one member; with --pool, write it into the pool file",
            *OF_MEMBERS,
            "temperatures",
            "max_answer_tokens",
        )
        pool = load_pool(arguments.pool)
    else:
        member = Member(
            name=arguments.model or arguments.local or "",
            base_url=arguments.base_url,
            model=arguments.model if arguments.base_url else None,
            key_variable=arguments.key_variable,
            local=arguments.local,
            temperatures=tuple(arguments.temperatures or [1.0]),
            max_tokens=arguments.max_answer_tokens or 512,
            price_prompt=arguments.price_prompt,
            price_completion=arguments.price_completion,
        )
        pool = Pool((member,))
    check_endpoint_arguments(
        arguments, priced=any(member.price_prompt or member.price_completion for member in pool.members)
    )
    summary = sample_file(
        arguments.prompts,
        pool,
        arguments.out,
        SampleOptions(
            k=arguments.k,
            minimum=arguments.minimum,
            redraws=arguments.redraws,
            seed=arguments.seed,
            image_root=arguments.image_root,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            max_image_side=arguments.max_image_side,
            max_tokens=arguments.max_budget_tokens,
            max_cost=arguments.max_cost,
            progress=not arguments.quiet,
        ),
    )
    print(summary.text())
    if summary.stopped:
        print("run the same command again to go on")
        return STOPPED_EARLY
    return 1 if summary.items and not (summary.complete or summary.short) else 0


def run_build(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from silkie.data import PairOptions
    from silkie.feedback.build import build_dataset, read_reference

    summary = build_dataset(
        arguments.responses,
        arguments.journal,
        arguments.out,
        image_root=arguments.image_root,
        pairs=replace(PairOptions.parse(arguments.pairs), min_margin=arguments.min_margin),
        reference=read_reference(arguments.reference) if arguments.reference else None,
    )
    print(summary.text())
    print((Path(arguments.out) / "quality.md").read_text(encoding="utf-8"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """0: every item is accounted for; 1: every item failed; 2: wrong use; 3: stopped early, run again to go on."""
    from silkie.endpoint.errors import ItemError
    from silkie.feedback.journal import JournalError
    from silkie.feedback.records import RecordError
    from silkie.feedback.rubric import RubricError

    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "httpcore", "openai"):  # they log every request, some of them with its content
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return arguments.run(arguments)
    except (ItemError, JournalError, RecordError, RubricError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
