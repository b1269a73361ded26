"""The paper's main table in miniature: ways of learning from the same rated responses, on the embedded world, over
several seeds.

    python recipes/studies/ablation.py --out outputs/ablation     # 3 seeds; about ten minutes a seed on two quiet cores
    python recipes/studies/ablation.py --out outputs/ablation --seeds 0 1 2 3 4 --recipes silkie random

Run it again to resume. Writes ablation.json and ablation.md.

The responses come from a pool of four samplers (the base model at four temperatures), as VLFeedback's came from a pool
of models. So there is a strongest member, and the paper's baseline "the strongest model's answer is the best" can be
asked. Everything else is the demo's: prompts, oracle, trainer, held-out questions.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from silkie.data import load_preferences
from silkie.data.pairs import PairOptions
from silkie.demo.data import DemoItem, preference_items
from silkie.demo.loop import (
    answer_items,
    evaluate_policy,
    held_out,
    load_base,
    make_trainer,
    rate_responses,
    write_records,
)
from silkie.demo.model import BASE_DIR
from silkie.demo.results import Recipe, Sizes, cached
from silkie.demo.scores import METRICS

__all__ = ["COLUMNS", "POOL", "RECIPES", "Cell", "cells", "markdown", "run_ablation", "t_interval"]

logger = logging.getLogger(__name__)

# Samplers of the response pool: name -> temperature.
POOL = {"t0.5": 0.5, "t0.8": 0.8, "t1.0": 1.0, "t1.3": 1.3}

ASPECTS = {"helpfulness": "Helpfulness", "ethics": "Ethical Considerations", "faithfulness": "Visual Faithfulness"}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a demo recipe; the rating aspect that makes its pairs (None: the mean of all); whether the
    pool's strongest member is taken for best; whether a coin decides which side of a pair is chosen."""

    recipe: Recipe
    aspect: str | None = None
    strongest: bool = False
    random: bool = False


RECIPES: dict[str, Row] = {
    row.recipe.name: row
    for row in (
        Row(
            Recipe(
                name="sft-best",
                title="+ SFT on the best response",
                pairs="best_vs_worst",
                losses=("sft",),
                loss_weights=(1.0,),
            )
        ),
        Row(Recipe(name="longest", title="+ DPO, longest-as-best", pairs="longest")),
        Row(Recipe(name="strongest", title="+ DPO, strongest-model-as-best"), strongest=True),
        Row(Recipe(name="random", title="+ DPO, random pairs"), random=True),
        *(
            Row(Recipe(name=f"only-{key}", title=f"+ DPO, {key} only"), aspect=aspect)
            for key, aspect in ASPECTS.items()
        ),
        Row(Recipe(name="silkie", title="**Silkie** (DPO on all three aspects)")),
    )
}

# The columns of the table: metric of the demo -> short heading.
COLUMNS = {
    "mme_perception": "MME-P ↑",
    "mme_cognition": "MME-C ↑",
    "chair_s": "CHAIR-s ↓",
    "exact": "exact ↑",
    "pope_accuracy": "POPE acc ↑",
    "refusal": "refusal ↑",
    "over_refusal": "over-refusal ↓",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A metric over seeds: mean, and the 95 % interval of that mean."""

    mean: float
    low: float
    high: float


def run_ablation(
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    recipes: Sequence[str] = tuple(RECIPES),
    *,
    sizes: Sizes | None = None,
    base_dir: str | Path = BASE_DIR,
) -> dict[str, Any]:
    """Train every recipe for every seed and score it. A result that is already in `out` is not computed again, so a
    stopped run is continued.

    Returns:
        {"seeds", "pool": mean rating of each sampler by seed, "pairs": recipe -> pairs by seed, "scores": recipe ->
        seed -> Scores}; "base" is among the recipes. The same is written to `out/ablation.json`.

    Raises:
        ValueError: an unknown recipe, or fewer than two seeds (an interval needs them).
    """
    if unknown := sorted(set(recipes) - set(RECIPES)):
        raise ValueError(f"unknown recipes {', '.join(unknown)}; expected some of {', '.join(RECIPES)}.")
    if len(set(seeds)) < 2:
        raise ValueError(f"seeds {list(seeds)}: an interval over seeds needs at least two different ones.")
    folder, sizes = Path(out), sizes or Sizes()
    test = held_out(sizes)
    result: dict[str, Any] = {"seeds": list(seeds), "pool": {}, "pairs": {}, "scores": {"base": {}}}
    base = cached(
        folder / "base.json", lambda: {"scores": evaluate_policy(*load_base(base_dir), test, folder / "eval" / "base")}
    )
    for seed in seeds:
        result["scores"]["base"][str(seed)] = base["scores"]
        place = folder / f"seed{seed}"
        means = cached(place / "pool.json", partial(sample_pool, seed, place / "data", sizes, base_dir))
        result["pool"][str(seed)] = means
        for name in recipes:
            trained = cached(
                place / f"{name}.json",
                partial(_train, RECIPES[name], seed, place, means, test, base_dir),
            )
            result["scores"].setdefault(name, {})[str(seed)] = trained["scores"]
            result["pairs"].setdefault(name, {})[str(seed)] = trained["pairs"]
    (folder / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def sample_pool(seed: int, directory: Path, sizes: Sizes, base_dir: str | Path) -> dict[str, float]:
    """Write VLFeedback records with a response per pool member and prompt, rated by the oracle; each member's mean
    rating."""
    model, processor = load_base(base_dir)
    items = preference_items(1000 + seed, images=sizes.images, card_images=sizes.card_images, questions=sizes.questions)
    by_member = [
        [
            own[0]
            for own in answer_items(
                model, processor, items, temperature=temperature, seed=97 * seed + k, title=f"sampling {name}"
            )
        ]
        for k, (name, temperature) in enumerate(POOL.items())
    ]
    responses = list(zip(*by_member, strict=True))
    rated = rate_responses(items, responses)
    write_records(items, responses, rated, list(POOL), directory)
    ratings = [
        [statistics.fmean(v for v in row.values() if v is not None) for row in result.ratings] for result in rated
    ]
    return {name: statistics.fmean(row[k] for row in ratings) for k, name in enumerate(POOL)}


def markdown(result: Mapping[str, Any], mode: str) -> str:
    """The table of one decoding: the mean over seeds, and the half-width of its 95 % interval."""
    table = cells(result, mode)
    best = {
        key: (min if _lower(key) else max)(row[key].mean for name, row in table.items() if name != "base")
        for key in COLUMNS
        if len(table) > 1
    }
    lines = ["| model | " + " | ".join(COLUMNS.values()) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, row in table.items():
        shown = []
        for key, cell in row.items():
            digits = 0 if key.startswith("mme") else 2
            text = f"{cell.mean:.{digits}f}"
            # stored figures are rounded to four places: a tie must stay one when the table is made of them again
            text = (
                f"**{text}**"
                if name != "base" and math.isclose(cell.mean, best[key], rel_tol=0, abs_tol=1e-4)
                else text
            )
            shown.append(text if name == "base" else f"{text} ± {(cell.high - cell.low) / 2:.{digits}f}")
        title = "base" if name == "base" else RECIPES[name].recipe.title
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def cells(result: Mapping[str, Any], mode: str) -> dict[str, dict[str, Cell]]:
    """recipe -> column -> mean and interval over seeds. The base has one run; its interval is that over images."""
    table: dict[str, dict[str, Cell]] = {}
    for name, by_seed in result["scores"].items():
        runs = [scores[mode] for scores in by_seed.values()]
        one = name == "base"
        table[name] = {
            key: Cell(*runs[0][key]) if one else t_interval([run[key][0] for run in runs]) for key in COLUMNS
        }
    return table


def t_interval(values: Sequence[float]) -> Cell:
    """Mean of independent runs with Student's 95 % interval (two-sided; up to 11 runs exactly, the normal value beyond
    30)."""
    n, mean = len(values), statistics.fmean(values)
    if n < 2:
        raise ValueError(f"{n} run: an interval over runs needs at least two.")
    half = _T975[min(n - 1, len(_T975)) - 1] * statistics.stdev(values) / math.sqrt(n)
    return Cell(mean, mean - half, mean + half)


# Student's t, 97.5 % point, 1 to 10 degrees of freedom; more are treated as 10, which errs towards wide.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def random_directions(data: Dataset, seed: int) -> Dataset:
    """The same pairs, each turned round or not by a coin: as much data, about the same texts, without any preference in
    it."""
    rng = np.random.default_rng(seed)

    def toss(row: dict[str, Any]) -> dict[str, Any]:
        return {"pairs": [pair[::-1] if rng.random() < 0.5 else pair for pair in row["pairs"]]}

    return data.map(toss, features=data.features, load_from_cache_file=False)


def _train(
    row: Row, seed: int, place: Path, means: Mapping[str, float], test: list[DemoItem], base_dir: str | Path
) -> dict[str, Any]:
    """Train one recipe on a seed's records; its number of pairs and its scores."""
    source = {"source": str(place / "data" / "vlfeedback.jsonl"), "image_root": str(place / "data" / "images")}
    pairs: str | PairOptions = row.recipe.pairs
    if row.aspect is not None:
        pairs = PairOptions(aspects=[row.aspect])
    elif row.strongest:
        pairs = f"model:{max(means, key=lambda name: means[name])}"
    # At temperature 1.3 a sampler now and then answers nothing; such a group is skipped, for every recipe.
    data = load_preferences(source["source"], image_root=source["image_root"], pairs=pairs, on_error="skip")
    if row.random:
        data = random_directions(data, seed)
    trainer = make_trainer(row.recipe, data, base_dir, place / "runs" / row.recipe.name, seed)
    trainer.train()
    scores = evaluate_policy(trainer.model, trainer.processing_class, test, place / "eval" / row.recipe.name)
    return {"pairs": sum(len(pairs) for pairs in data["pairs"]), "scores": scores}


def _lower(key: str) -> bool:
    return next(metric.better for metric in METRICS if metric.key == key) < 0


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=list(RECIPES),
        metavar="RECIPE",
        help=f"of {', '.join(RECIPES)} (default: all)",
    )
    arguments = parser.parse_args()
    result = run_ablation(arguments.out, arguments.seeds, arguments.recipes)
    seeds = ", ".join(map(str, result["seeds"]))
    parts = [
        f"Seeds {seeds}; mean over the seeds ± half the width of Student's 95 % interval. The best trained value of a"
        " column is bold."
    ]
    parts += [f"### {mode}\n\n{markdown(result, mode)}" for mode in ("greedy", "T=1")]
    text = "\n\n".join(parts) + "\n"
    (arguments.out / "ablation.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
