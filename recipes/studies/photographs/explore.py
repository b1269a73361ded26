"""What makes preference training work here: one change at a time, on development boards only."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from photographs.settings import ARMS, DPO, Arm

logger = logging.getLogger(__name__)

SEED = 100  # of prompts and training; no seed of the main runs
DEVELOPMENT_SEED = 7

# What is changed -> the arm. Every one differs from DPO in the thing that its title names.
VARIANTS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        replace(DPO, name="x-dpo", title="DPO as in the main runs"),
        replace(ARMS["sft"], name="x-sft", title="SFT on the best"),
        replace(ARMS["shuffled"], name="x-shuffled", title="shuffled preferences"),
        replace(ARMS["longest"], name="x-longest", title="longest-as-best"),
        replace(ARMS["helpfulness"], name="x-helpfulness", title="helpfulness only"),
        replace(ARMS["faithfulness"], name="x-faithfulness", title="faithfulness only"),
        replace(DPO, name="x-group0", title="the oracle pays nothing for a group's name", group=0.0),
        replace(DPO, name="x-group75", title="the oracle pays .75 for a group's name", group=0.75),
        replace(DPO, name="x-group75-high", title="the same, learning rate 2e-3", group=0.75, learning_rate=2e-3),
        replace(DPO, name="x-group25", title="the oracle pays .25 for a group's name", group=0.25),
        replace(DPO, name="x-sft1-long", title="SFT term of weight 1, 4 epochs", loss_weights=(1.0, 1.0), epochs=4.0),
        replace(
            DPO, name="x-sft1-high", title="SFT term of weight 1, lr 2e-3", loss_weights=(1.0, 1.0), learning_rate=2e-3
        ),
        replace(DPO, name="x-lr-low", title="learning rate 2e-4", learning_rate=2e-4),
        replace(DPO, name="x-lr-half", title="learning rate 5e-4", learning_rate=5e-4),
        replace(DPO, name="x-lr-high", title="learning rate 2e-3", learning_rate=2e-3),
        replace(DPO, name="x-one-epoch", title="one epoch", epochs=1.0),
        replace(DPO, name="x-long", title="4 epochs", epochs=4.0),
        replace(DPO, name="x-batch4", title="4 prompts per step, twice the steps", batch=4),
        replace(DPO, name="x-plain", title="no SFT term", losses=("sigmoid",), loss_weights=(1.0,)),
        replace(DPO, name="x-sft1", title="SFT term of weight 1", loss_weights=(1.0, 1.0)),
        replace(DPO, name="x-beta-low", title="beta .03", beta=0.03),
        replace(DPO, name="x-beta-high", title="beta .3", beta=0.3),
        replace(DPO, name="x-margin", title="pairs of a rating gap of 2/3 or more", min_margin=0.66),
        replace(DPO, name="x-best-worst", title="best against worst only", pairs="best_vs_worst"),
        replace(DPO, name="x-cool", title="sampling at T .7, top-p .9", temperature=0.7, top_p=0.9),
        replace(DPO, name="x-k8", title="8 responses from half the prompts", responses=8),
        replace(DPO, name="x-length", title="length control (LD-DPO, alpha .5)", options={"ld_alpha": 0.5}),
        replace(DPO, name="x-rounds", title="2 on-policy rounds of half the prompts", rounds=2),
        replace(
            DPO,
            name="x-mdpo",
            title="mDPO (image term and anchor)",
            losses=("sigmoid", "mdpo_image", "mdpo_anchor", "sft"),
            loss_weights=(1.0, 1.0, 1.0, 0.2),
        ),
    )
}


INTERVALS = ("chair/invented", "chair_sampled/invented", "chair_sampled/recall")


def explore(place: Any, names: Sequence[str] = ()) -> str:
    """Train variants (default: all) and answer development boards; returns the table of these and of those that an
    earlier call has trained.

    Raises:
        ValueError: an unknown variant.
    """
    from photographs.loop import draw_boards, evaluate, run_arm, write_benchmarks
    from photographs.results import summarise

    if unknown := sorted(set(names) - set(VARIANTS)):
        raise ValueError(f"unknown variants {', '.join(unknown)}; known are {', '.join(VARIANTS)}.")
    folder = place.root / "explore"
    count = place.sizes.development
    place = replace(place, sizes=replace(place.sizes, held_out=count, sampled=count))
    benchmarks = write_benchmarks(place, "development", DEVELOPMENT_SEED, folder / "development")
    which = ("chair", "chair_sampled")
    base = evaluate(place, benchmarks, folder / "answers" / "base", None, which)
    scores: dict[str, dict[int, Any]] = {"base": {SEED: base}}
    own = draw_boards(place, "preference", place.sizes.boards, SEED, folder / "images")
    done: dict[str, Any] = {}
    for name, arm in VARIANTS.items():
        if names and name not in names and not (folder / "answers" / name / "chair_sampled.done").exists():
            continue  # those that are there already are shown with the others
        logger.info("%s: %s", name, arm.title)
        prompts = own[: len(own) // 2] if arm.responses == 8 else own
        adapter, facts = run_arm(place, arm, SEED, folder, folder / "images", prompts)
        scores[name] = {SEED: evaluate(place, benchmarks, folder / "answers" / name, adapter, which)}
        done[name] = {k: facts[k] for k in ("groups", "pairs", "cpu_seconds")}
        rows = summarise(scores)
        text = _table(rows, done)
        (folder / "explore.json").write_text(json.dumps({"training": done, "summary": rows}, indent=1) + "\n")
        (folder / "explore.md").write_text(text, encoding="utf-8")
    return text


def _table(rows: dict[str, Any], done: dict[str, Any]) -> str:
    columns = {
        "chair/invented": "invented ↓",
        "chair/recall": "recall ↑",
        "chair/covered": "covered ↑",
        "chair/groups": "groups",
        "chair_sampled/invented": "sampled: invented ↓",
        "chair_sampled/recall": "sampled: recall ↑",
        "chair_sampled/covered": "sampled: covered ↑",
    }
    lines = ["| changed | pairs | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, row in rows.items():
        title = "Base" if name == "base" else VARIANTS[name].title
        cells = []
        for key in columns:
            cell = f"{row[key]['mean']:.2f}"
            if "difference" in row[key] and key in INTERVALS:
                cell += f" <sub>[{row[key]['low']:+.2f}, {row[key]['high']:+.2f}]</sub>"
            cells.append(cell)
        lines.append(f"| {title} | {done.get(name, {}).get('pairs', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
