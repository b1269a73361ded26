"""The demo as a report page: its table, its curves, and the answers of base and trained model on the held-out
scenes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from silkie.demo import oracle
from silkie.demo.data import DemoItem
from silkie.demo.results import Summary
from silkie.demo.scenes import draw_scene
from silkie.demo.scores import METRICS
from silkie.report.collect import curves_of, pick_cards
from silkie.report.schema import Answer, BenchmarkRow, Card, Report, System
from silkie.stats import Estimate

__all__ = ["benchmark_rows", "demo_report", "gallery"]

HEADLINES = ("exact", "chair_s", "pope_accuracy", "refusal")
CARDS = 160
NAMES = {"mme": "MME", "pope": "POPE", "chair": "descriptions", "redteam": "red team"}


def demo_report(
    summary: Summary,
    test: Sequence[DemoItem],
    answers: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    log_history: Sequence[Mapping[str, Any]] = (),
    configuration: Mapping[str, Mapping[str, Any]] | None = None,
    waiting: Sequence[str] = (),
) -> Report:
    """The page of a demo run.

    Args:
        answers: policy -> decoding -> an answer per item of `test`; the policies "base" and "dpo" are shown side by
            side.
        log_history: of the DPO trainer's state.
        waiting: recipes that are still to be trained.
    """
    rows = [
        row
        for mode in next(iter(summary.scores.values()))
        for row in benchmark_rows(summary.scores, summary.titles, mode)
    ]
    cards = gallery(test, answers["base"]["greedy"], answers["dpo"]["greedy"])
    return Report(
        title="silkie: what preference training changed",
        summary=(
            f"The embedded demo, seed {summary.seed}: {summary.pairs:,} pairs from {summary.groups} prompts, rated by"
            " an exact oracle."
        ),
        names=(summary.titles["base"], summary.titles["dpo"]),
        configuration=dict(configuration or {}),  # type: ignore[arg-type]
        data={
            "Preferences": {
                "groups": summary.groups,
                "pairs": summary.pairs,
                "responses per prompt": 4,
                "seed": summary.seed,
            },
            "Held-out questions": {NAMES[name]: sum(item.benchmark == name for item in test) for name in NAMES},
            "Seconds": dict(summary.seconds),
        },
        curves=curves_of(log_history),
        benchmarks=rows,
        gallery=pick_cards(cards, CARDS),
        gallery_counts=Counter(card.flip for card in cards),
        notes=[
            *([f"Still to be trained, and then added here: {', '.join(waiting)}. Reload the page."] if waiting else []),
            (
                "The base model's flaws are planted (silkie/demo/README.md says which). Training removes behaviour, it"
                " adds no sight."
            ),
            (
                "An answer is right where the oracle finds no fault in it (every rating at least 4 of 5). Gallery"
                " answers are greedy."
            ),
            (
                "The subtasks carry MME's and POPE's names; they are questions of this world, scored by those"
                " benchmarks' rules."
            ),
        ],
    )


def benchmark_rows(
    scores: Mapping[str, Mapping[str, Mapping[str, Estimate]]], titles: Mapping[str, str], mode: str
) -> list[BenchmarkRow]:
    """A row per metric of one decoding, a system per policy."""
    first = next(iter(scores))
    rows = []
    for metric in METRICS:
        systems = []
        for policy, modes in scores.items():
            value = modes[mode][metric.key]
            change = None if policy == first else value.mean - scores[first][mode][metric.key].mean
            systems.append(
                System(name=titles[policy], value=value.mean, low=value.low, high=value.high, difference=change)
            )
        rows.append(
            BenchmarkRow(
                name=metric.title.split(" (")[0],
                group=f"Held-out scenes, {mode}",
                neutral=metric.better == 0,
                lower_is_better=metric.better < 0,
                systems=tuple(systems),
                headline=mode == "greedy" and metric.key in HEADLINES,
            )
        )
    return rows


def gallery(test: Sequence[DemoItem], base: Sequence[str], trained: Sequence[str]) -> list[Card]:
    """A card per held-out question, with the oracle's ratings of both answers."""
    return [
        Card(
            id=item.id,
            prompt=item.prompt,
            base=_answer(item, before),
            trained=_answer(item, after),
            image=draw_scene(item.scene),
            category=item.category,
            benchmark=NAMES[item.benchmark],
            reference=item.question.answer,
        )
        for item, before, after in zip(test, base, trained, strict=True)
    ]


def _answer(item: DemoItem, text: str) -> Answer:
    rating = oracle.rate(item.scene, item.question, text)
    ratings = {aspect: float(entry["Rating"]) for aspect, entry in rating.items()}
    true = {thing.name for thing in item.scene.items}
    invented = (
        [name for name in oracle.read_answer(text).objects if name not in true] if item.benchmark == "chair" else []
    )
    return Answer(
        answer=text, correct=min(ratings.values()) >= 4, ratings=ratings, invented=tuple(dict.fromkeys(invented))
    )
