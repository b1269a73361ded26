"""The command line: `python -m silkie.feedback sample | rate | injections | build`."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from silkie.feedback.options import (
    BuildCommand,
    EndpointOptions,
    InjectionsCommand,
    JournalOptions,
    RateCommand,
    SampleCommand,
)
from silkie.io.console import complain, say
from silkie.io.options import Command, command_parser, parse_command

STOPPED_EARLY = 3
OF_MEMBERS = ("model", "key_variable", "price_prompt", "price_completion")
OF_JUDGES = {
    **{name: name for name in (*OF_MEMBERS, "temperature", "max_image_side", "max_cost")},
    "max_tokens": "max_budget_tokens",
}


def make_endpoint(options: RateCommand | InjectionsCommand) -> Any:
    from silkie.endpoint.budget import Prices
    from silkie.endpoint.client import Endpoint

    assert options.base_url is not None and options.model is not None
    return Endpoint(
        options.base_url,
        options.model,
        timeout=options.timeout,
        prices=Prices(prompt=options.price_prompt, completion=options.price_completion),
        key_variable=options.key_variable,
        connections=options.concurrency,
    )


def check_prices(options: JournalOptions, *, priced: bool) -> None:
    """Raises ValueError for a limit on the cost that nothing could measure."""
    if options.max_cost is not None and not priced:
        raise ValueError(
            "--max-cost needs prices (--price-prompt, --price-completion; in a pool: price_prompt, price_completion)"
        )


def _refuse(options: EndpointOptions, belongs_to: str, *names: str, **flags: str) -> None:
    """Raises ValueError for an option that was passed and that nothing would read. `flags`: field -> its flag, where
    the two differ."""
    for name, flag in {**{name: name for name in names}, **flags}.items():
        if getattr(options, name):
            raise ValueError(f"--{flag.replace('_', '-')} is an option of {belongs_to}")


def run_rate(options: RateCommand) -> int:
    from silkie.feedback.judges import Judge, LocalJudge, OpenAIJudge
    from silkie.feedback.rate_run import rate_file
    from silkie.feedback.rubric import load_rubric

    check_prices(options, priced=bool(options.price_prompt or options.price_completion))
    rubric = load_rubric(options.rubric)
    judge: Judge
    if options.local:
        if options.base_url:
            raise ValueError("--local and --base-url name two judges; pass one of them")
        _refuse(options, "an endpoint, and --local is none", **OF_JUDGES)
        say(f"loading {options.local} ...")
        from silkie.inference import load_policy

        judge = LocalJudge(
            *load_policy(options.local), rubric=rubric, name=options.local, max_new_tokens=options.max_answer_tokens
        )
        options = replace(options, concurrency=1)  # one model answers one item at a time
    else:
        if not (options.base_url and options.model):
            raise ValueError("pass --base-url and --model (an endpoint), or --local (a model directory)")
        default_temperature = 0.0 if options.votes == 1 else 0.7
        judge = OpenAIJudge(
            make_endpoint(options),
            rubric=rubric,
            structured=options.structured,
            temperature=default_temperature if options.temperature is None else options.temperature,
            max_tokens=options.max_answer_tokens,
            max_image_side=options.max_image_side,
        )
    summary = rate_file(options.responses, judge, options.journal, options)
    print(summary.text())
    if summary.stopped:
        print("run the same command again to resume")
        return STOPPED_EARLY
    if summary.failures:
        print("--retry-failed retries the failed items")
    return 1 if summary.items and not summary.rated else 0


def run_injections(options: InjectionsCommand) -> int:
    from silkie.feedback.injection import report_of_file
    from silkie.feedback.judges import OpenAIJudge
    from silkie.feedback.rubric import load_rubric

    if not (options.base_url and options.model):
        raise ValueError("pass --base-url and --model")
    judge = OpenAIJudge(
        make_endpoint(options),
        rubric=load_rubric(options.rubric),
        structured=options.structured,
        max_tokens=options.max_answer_tokens,
        max_image_side=options.max_image_side,
    )
    report = report_of_file(
        options.responses,
        judge,
        items=options.items,
        image_root=options.image_root,
        concurrency=options.concurrency,
    )
    print(report.text())
    print(f"\n{report.usage.calls} answers, {report.usage.tokens:,} tokens")
    return 0


def run_sample(options: SampleCommand) -> int:
    from silkie.feedback.pool import Member, Pool, load_pool
    from silkie.feedback.sample import sample_file

    if sum(source is not None for source in (options.pool, options.local, options.base_url)) != 1:
        raise ValueError("pass exactly one of --pool, --local and --base-url (with --model)")
    if options.pool:
        of_one = "one member; with --pool, write it into the pool file"
        _refuse(options, of_one, *OF_MEMBERS, "temperatures", "max_answer_tokens")
        pool = load_pool(options.pool)
    else:
        member = Member(
            name=options.model or options.local or "",
            base_url=options.base_url,
            model=options.model if options.base_url else None,
            key_variable=options.key_variable,
            local=options.local,
            temperatures=options.temperatures or (1.0,),
            max_tokens=options.max_answer_tokens or 512,
            price_prompt=options.price_prompt,
            price_completion=options.price_completion,
        )
        pool = Pool((member,))
    check_prices(options, priced=any(member.price_prompt or member.price_completion for member in pool.members))
    summary = sample_file(options.prompts, pool, options.out, options)
    print(summary.text())
    if summary.stopped:
        print("run the same command again to resume")
        return STOPPED_EARLY
    return 1 if summary.items and not (summary.complete or summary.short) else 0


def run_build(options: BuildCommand) -> int:
    from silkie.data import PairOptions
    from silkie.feedback.build import build_dataset, read_reference

    summary = build_dataset(
        options.responses,
        options.journal,
        options.out,
        image_root=options.image_root,
        pairs=replace(PairOptions.parse(options.pairs), min_margin=options.min_margin),
        reference=read_reference(options.reference) if options.reference else None,
    )
    print(summary.text())
    print((Path(options.out) / "quality.md").read_text(encoding="utf-8"))
    return 0


COMMANDS = (
    Command("rate", "rate responses with a judge; run again to resume", RateCommand, run_rate),
    Command("sample", "draw responses from a pool of models; run again to resume", SampleCommand, run_sample),
    Command(
        "injections",
        "how far responses that rate themselves move a judge's ratings",
        InjectionsCommand,
        run_injections,
    ),
    Command(
        "build", "responses and journal -> VLFeedback dataset, pairs and a quality report", BuildCommand, run_build
    ),
)


ABOUT = "Responses, ratings and a preference dataset without annotators."


def make_parser(prog: str) -> ArgumentParser:
    return command_parser(prog, ABOUT, COMMANDS)


def main(argv: Sequence[str] | None = None, prog: str = "python -m silkie.feedback") -> int:
    """0: every item is accounted for; 1: every item failed; 2: wrong use; 3: stopped early, run again to resume."""
    command, options = parse_command(make_parser(prog), COMMANDS, argv)

    from silkie.endpoint.errors import ItemError, StopRun
    from silkie.feedback.journal import JournalError

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "httpcore", "openai"):  # they log every request, some of them with its content
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return command.run(options)
    # records, rubrics and pools raise ValueErrors
    except (ItemError, StopRun, JournalError, ValueError, OSError) as error:
        return complain(error)


if __name__ == "__main__":
    sys.exit(main())
