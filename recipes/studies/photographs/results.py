"""From scored answers to what people read: results.json, a table with paired intervals, and a page with photographs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from photographs.boards import check
from photographs.loop import caption_values
from silkie.evaluation import Score, bootstrap_mean
from silkie.report import build_report

Values = dict[str, NDArray[np.float64]]
Scores = Mapping[str, Mapping[int, Mapping[str, Score]]]
"""policy -> seed -> evaluation -> Score; the base has the same Score for every seed"""

SHOWN = "chair_sampled"  # the evaluation of the main figure: its answers are on the page and in the picture


@dataclass(frozen=True, slots=True)
class Metric:
    """A row: its evaluation, its key, its title, and whether less is better."""

    evaluation: str
    key: str
    title: str
    less: bool = False
    digits: int = 2


METRICS = (
    Metric("chair", "invented", "Invented things per caption", less=True),
    Metric("chair", "chair_s", "Captions with an invented thing (CHAIR_s)", less=True),
    Metric("chair", "wrong_names", "Wrong names per caption, groups apart", less=True),
    Metric("chair", "recall", "Things named by their name (recall)"),
    Metric("chair", "covered", "Things covered, by name or group"),
    Metric("chair", "exact", "Captions exactly right"),
    Metric("chair", "groups", "Groups named per caption"),
    Metric("chair_sampled", "invented", "Sampled: invented things per caption", less=True),
    Metric("chair_sampled", "wrong_names", "Sampled: wrong names per caption, groups apart", less=True),
    Metric("chair_sampled", "recall", "Sampled: things named (recall)"),
    Metric("chair_sampled", "covered", "Sampled: things covered, by name or group"),
    Metric("chair_sampled", "exact", "Sampled: captions exactly right"),
    Metric("pope", "right", "POPE accuracy"),
    Metric("pope", "yes", "POPE yes-rate (truth .50)"),
    Metric("mme", "right", "MME-like accuracy (existence, position)"),
)


def values_of(evaluation: str, score: Score) -> Values:
    """Per board (descriptions) or per question (yes/no) the numbers behind an evaluation's metrics."""
    if evaluation.startswith("chair"):
        return caption_values(score)
    right = np.array([float(bool(item.correct)) for item in score.items])
    said_yes = np.array([float(item.answer.strip().lower().startswith("yes")) for item in score.items])
    return {"right": right, "yes": said_yes}


def clusters_of(score: Score) -> list[str]:
    """The board of every item: what is resampled."""
    return [Path(item.image).name for item in score.items]


def summarise(scores: Scores, base: str = "base") -> dict[str, Any]:
    """policy -> metric -> {"mean", "by_seed", "difference", "low", "high"}: differences to the base on the same boards,
    averaged over seeds before boards are resampled."""
    result: dict[str, Any] = {}
    for policy, by_seed in scores.items():
        rows: dict[str, Any] = {}
        for metric in METRICS:
            if any(metric.evaluation not in own for own in by_seed.values()):
                continue
            first = next(iter(by_seed.values()))[metric.evaluation]
            own = np.stack([values_of(metric.evaluation, s[metric.evaluation])[metric.key] for s in by_seed.values()])
            row: dict[str, Any] = {"mean": own.mean(), "by_seed": own.mean(1).tolist()}
            if policy != base:
                row |= paired(own.mean(0), scores[base], metric, clusters_of(first))
            rows[f"{metric.evaluation}/{metric.key}"] = row
        result[policy] = rows
    return result


def paired(
    own: NDArray[np.float64], other: Mapping[int, Mapping[str, Score]], metric: Metric, boards: list[str]
) -> dict[str, float]:
    """The difference of a policy to another one on the same boards, with its 95 % interval over boards."""
    theirs = np.stack([values_of(metric.evaluation, s[metric.evaluation])[metric.key] for s in other.values()])
    estimate = bootstrap_mean(own - theirs.mean(0), clusters=boards)
    return {"difference": estimate.mean, "low": estimate.low, "high": estimate.high}


def against(scores: Scores, a: str, b: str) -> dict[str, dict[str, float]]:
    """b minus a, per metric that both have, over the seeds that both have."""
    common = scores[a].keys() & scores[b].keys()
    scores = {policy: {seed: scores[policy][seed] for seed in sorted(common)} for policy in (a, b)}
    rows = {}
    for metric in METRICS:
        if any(metric.evaluation not in own for p in (a, b) for own in scores[p].values()):
            continue
        first = next(iter(scores[b].values()))[metric.evaluation]
        own = np.stack([values_of(metric.evaluation, s[metric.evaluation])[metric.key] for s in scores[b].values()])
        rows[f"{metric.evaluation}/{metric.key}"] = paired(own.mean(0), scores[a], metric, clusters_of(first))
    return rows


def table(summary: Mapping[str, Any], titles: Mapping[str, str], seeds: int) -> str:
    """Markdown: metrics x policies; under each trained value its difference to the base with the 95 % interval."""
    policies = list(summary)
    lines = [f"| held-out boards, {seeds} seed{'s' * (seeds > 1)} | " + " | ".join(titles[p] for p in policies) + " |"]
    lines.append("|---" * (len(policies) + 1) + "|")
    for metric in METRICS:
        key = f"{metric.evaluation}/{metric.key}"
        cells = []
        for policy in policies:
            row = summary[policy].get(key)
            if row is None:
                cells.append("-")
                continue
            cell = f"{row['mean']:.{metric.digits}f}"
            if "difference" in row:
                cell += f" <sub>{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]</sub>"
            cells.append(cell)
        if set(cells) != {"-"}:
            arrow = "" if "rate" in metric.title or metric.key == "groups" else " ↓" if metric.less else " ↑"
            lines.append(f"| {metric.title}{arrow} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_page(
    out: Path,
    summary: Mapping[str, Any],
    titles: Mapping[str, str],
    scores: Scores,
    images: Path,
    facts: Mapping[str, Any],
    training: Mapping[str, Any],
    notes: Sequence[str],
    trained: str = "dpo",
    cards: int = 24,
) -> Path:
    """`report.html` in `out`, through `silkie.report`: numbers with intervals, and boards with both answers."""
    report = {
        "title": "Real weights, real photographs: what preference training changed",
        "summary": (
            "SmolLM2-135M-Instruct and EfficientNet-Lite0 in stock LLaVA, boards of four Fashion-MNIST photographs,"
            " natural errors, an exact oracle."
        ),
        "configuration": {"Run": training},
        "data": {"The eye (ridge regression on its features)": {k: v for k, v in facts.items() if k != "confusable"}},
        "benchmarks": [_row(metric, summary, titles) for metric in METRICS if _has(metric, summary)],
        "gallery": _cards(scores["base"], scores[trained], images)[:cards],
        "notes": list(notes),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return build_report(out)


def _has(metric: Metric, summary: Mapping[str, Any]) -> bool:
    return f"{metric.evaluation}/{metric.key}" in summary["base"]


def _row(metric: Metric, summary: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    systems = []
    for policy, rows in summary.items():
        row = rows.get(f"{metric.evaluation}/{metric.key}")
        if row is None:
            continue
        system = {"name": titles[policy], "value": row["mean"]}
        if "difference" in row:
            system |= {"difference": row["difference"]}
            system |= {"difference_low": row["low"], "difference_high": row["high"]}
        systems.append(system)
    neutral = metric.key in ("groups", "yes")
    return {
        "name": metric.title,
        "group": "Held-out boards",
        "lower_is_better": metric.less,
        "neutral": neutral,
        "headline": metric.evaluation == SHOWN and metric.key in ("invented", "recall", "covered"),
        "systems": systems,
    }


def _cards(
    base: Mapping[int, Mapping[str, Score]], trained: Mapping[int, Mapping[str, Score]], images: Path
) -> list[dict[str, Any]]:
    """A card per described board: sampled answers of the base and of the first seed's policy."""
    before, after = (next(iter(by_seed.values()))[SHOWN].items for by_seed in (base, trained))
    cards = []
    for a, b in zip(before, after, strict=True):
        things = [name.strip() for name in str(a.label).split(",")]
        answers = {}
        for side, item in (("base", a), ("trained", b)):
            found = check(item.answer, things)
            answers[side] = {
                "answer": item.answer,
                "correct": not found.invented and found.hits + found.grouped == len(things),
                "invented": list(found.invented),
            }
        image = str((images / Path(a.image).name).resolve())
        cards.append({"id": a.id, "image": image, "prompt": a.prompt, "reference": ", ".join(things), **answers})
    return cards
