"""One page and one table over the rounds: benchmarks side by side, a curve per round, what each round made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from silkie.feedback.journal import read_journal
from silkie.io.table import table
from silkie.report import build_report
from silkie.report.collect import collect
from silkie.report.schema import BenchmarkRow
from silkie.run.rounds.settings import LoopFile, benchmark_name
from silkie.run.rounds.stages import Policy, Stages

__all__ = ["write_overview"]


def write_overview(loop: LoopFile, stages: Stages, rounds: int, seconds: Mapping[str, float]) -> tuple[str, Path]:
    """Write `report.json` and `report.html` of the first `rounds` rounds to the output directory.

    Args:
        seconds: of every finished stage.

    Returns:
        The table for the terminal, and the page.
    """
    policies = stages.policies()[: rounds + 1]
    made = {policy.title: _made(loop, before, policy, seconds) for before, policy in pairwise(policies)}
    described = {
        "title": f"On-policy rounds of {loop.model}",
        "summary": f"{rounds} of {loop.rounds} rounds. Each samples from the policy before it, has the answers rated by"
        f" {loop.rate.get('model') or loop.rate.get('local')}, and trains on with that policy as the reference.",
        "configuration": {
            "Loop": {"model": loop.model, "prompts": loop.prompts, "seed": loop.seed, "served": bool(loop.serve)},
            **{name.title(): dict(section) for name, section in (("sample", loop.sample), ("train", loop.train))},
        },
        "data": made,
        "log_history": _history(policies[1:]),
        "evaluations": [
            {
                "benchmark": entry["benchmark"],
                "name": benchmark_name(entry),
                "systems": {p.title: str(stages.results(entry, p).relative_to(stages.out)) for p in policies},
                "compare_with": policies[-1].title,
            }
            for entry in loop.evaluate
        ],
    }
    (stages.out / "report.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    report = collect(stages.out)
    rows = [["", *(policy.title for policy in policies)]]
    rows += [[name, "", *(str(own.get(name, "")) for own in made.values())] for name in next(iter(made.values()))]
    return table([*rows, *_scores(report.benchmarks)]), build_report(report, stages.out / "report.html")


def _scores(benchmarks: list[BenchmarkRow]) -> list[list[str]]:
    """The primary metric of every benchmark."""
    return [
        [f"{row.name} {row.metric}", *("" if s.value is None else f"{s.value:.3g}" for s in row.systems)]
        for row in benchmarks
        if row.headline
    ]


def _made(loop: LoopFile, before: Policy, policy: Policy, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What a round did, from its files."""
    ratings = [
        value
        for record in read_journal(policy.folder / "ratings.jsonl")
        if record.get("status") == "ok"
        for response in record["ratings"]
        for value in response.values()
        if value is not None
    ]
    own = {key.partition("/")[2]: spent for key, spent in seconds.items() if key.startswith(f"{policy.folder.name}/")}
    return {
        "sampled from": before.title,
        "prompts": _lines(policy.folder / "prompts.jsonl"),
        "mean rating of the responses": round(sum(ratings) / len(ratings), 2) if ratings else None,
        "pairs": _lines(policy.folder / "dataset" / "pairs.csv") - 1,
        "seconds": round(sum(own.values()), 1),
    }


def _history(policies: list[Policy]) -> list[dict[str, Any]]:
    """The logs of all rounds as one: the steps of a round follow those of the round before."""
    history: list[dict[str, Any]] = []
    for policy in policies:
        first = max((entry["step"] for entry in history), default=0)
        state = Path(str(policy.adapter)) / "trainer_state.json"
        for entry in json.loads(state.read_text(encoding="utf-8"))["log_history"]:
            history.append({**entry, "step": first + entry["step"], "round": policy.title})
    return history


def _lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)
