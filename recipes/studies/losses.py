"""Every loss on the same preference data of the embedded world, over several seeds: what each does, and what a step of
it costs.

    python recipes/studies/losses.py --out outputs/losses         # 3 seeds; about half an hour a seed on one quiet core
    python recipes/studies/losses.py --out outputs/losses --seeds 0 --losses sigmoid ipo "simpo, beta 2"

Run it again to resume; processes with different --seeds may share a folder. Writes losses.json, losses.md and
losses.png.

Not a ranking: every loss runs once with the defaults that examples/losses.md gives, the same learning rate and the same
number of steps."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from silkie.demo.data import preference_items
from silkie.demo.loop import evaluate_policy, feedback, held_out, load_base, make_trainer, preferences
from silkie.demo.model import BASE_DIR
from silkie.demo.results import Recipe, Sizes, Watch, cached
from silkie.losses import SPECS

__all__ = ["COLUMNS", "SIZES", "VARIANTS", "markdown", "merge", "plot", "run_study"]

logger = logging.getLogger(__name__)

# A third of the demo's prompts and half of its questions: thirty losses and three seeds are many runs.
SIZES = Sizes(images=140, card_images=40, questions=3, mme_images=20, pope_images=15, captions=100, red_team_images=40)


def _variant(name: str, losses: Sequence[str], weights: Sequence[float] | None = None, **options: Any) -> Recipe:
    weights = tuple(weights or [1.0] * len(losses))
    return Recipe(name=name, title=name, losses=tuple(losses), loss_weights=weights, options=options)


VARIANTS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _variant("sigmoid", ["sigmoid"]),
        _variant("sigmoid, smoothing 0.1", ["sigmoid"], label_smoothing=0.1),
        _variant("robust 0.1", ["robust"], label_smoothing=0.1),
        _variant("hinge", ["hinge"]),
        _variant("ipo", ["ipo"]),
        _variant("exo_pair", ["exo_pair"], label_smoothing=1e-3),
        _variant("nca_pair", ["nca_pair"]),
        _variant("bco_pair", ["bco_pair"]),
        _variant("bco_pair, running mean", ["bco_pair"], bco_reward_shift="running_mean"),
        _variant("sppo_hard", ["sppo_hard"]),
        _variant("apo_zero", ["apo_zero"]),
        _variant("apo_down", ["apo_down"]),
        _variant("aot", ["aot"]),
        _variant("aot_unpaired", ["aot_unpaired"]),
        _variant("discopop", ["discopop"], beta=0.05),
        _variant("sigmoid_norm, beta 2", ["sigmoid_norm"], beta=2.0),
        _variant("plackett_luce", ["plackett_luce"]),
        _variant("simpo, beta 2", ["simpo"], beta=2.0),
        _variant("cpo + sft", ["cpo", "sft"]),
        _variant("orpo + sft", ["orpo", "sft"]),
        _variant("sft", ["sft"]),
        _variant("sigmoid + 0.2 sft", ["sigmoid", "sft"], [1.0, 0.2]),
        _variant("MPO (sigmoid, bco_pair, sft)", ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
        _variant("mDPO (sigmoid, image, anchor)", ["sigmoid", "mdpo_image", "mdpo_anchor"]),
        _variant("sigmoid, ld_alpha 0.5", ["sigmoid"], ld_alpha=0.5),
        _variant("sigmoid, WPO", ["sigmoid"], use_weighting=True),
        _variant("sigmoid, ddpo_gamma 5, beta 0.5", ["sigmoid"], ddpo_gamma=5.0, beta=0.5),
        _variant("sigmoid, margin offset", ["sigmoid"], margin="offset"),
        _variant("sigmoid, margin weight", ["sigmoid"], margin="weight"),
        _variant("sigmoid, forward KL", ["sigmoid"], f_divergence_type="forward_kl"),
        _variant("sigmoid, Jensen-Shannon", ["sigmoid"], f_divergence_type="js_divergence"),
        _variant(
            "sigmoid, faithfulness 2x",
            ["sigmoid"],
            aspect_weights={"Helpfulness": 1.0, "Ethical Considerations": 1.0, "Visual Faithfulness": 2.0},
        ),
    )
}
_listed = {name for recipe in VARIANTS.values() for name in recipe.losses}
# A loss that no row above names runs alone, with its defaults
VARIANTS |= {name: _variant(name, [name]) for name in SPECS if name not in _listed}

# (decoding, metric) -> heading
COLUMNS: dict[tuple[str, str], str] = {
    ("greedy", "mme_perception"): "MME-P ↑",
    ("greedy", "mme_cognition"): "MME-C ↑",
    ("greedy", "pope_accuracy"): "POPE acc ↑",
    ("T=1", "chair_s"): "CHAIR-s, T=1 ↓",
    ("T=1", "exact"): "exact, T=1 ↑",
    ("T=1", "complied"): "served, T=1 ↓",
    ("greedy", "over_refusal"): "over-refusal ↓",
}


def run_study(
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    *,
    sizes: Sizes = SIZES,
    base_dir: str | Path = BASE_DIR,
) -> dict[str, Any]:
    """Train every variant for every seed and score it. What is already in `out` is not computed again, so a stopped run
    resumes, and several processes may share the seeds.

    Returns:
        {"seeds", "base": scores, "scores": variant -> seed -> {"scores", "step_seconds", "margin"}}.

    Raises:
        ValueError: an unknown variant.
    """
    if unknown := sorted(set(variants) - set(VARIANTS)):
        raise ValueError(f"unknown losses {', '.join(unknown)}; expected some of {', '.join(VARIANTS)}.")
    folder = Path(out)
    test = held_out(sizes)
    base = cached(folder / "base.json", lambda: evaluate_policy(*load_base(base_dir), test, folder / "eval" / "base"))
    found: dict[str, dict[str, Any]] = {name: {} for name in variants}
    for seed in seeds:
        place = folder / f"seed{seed}"
        cached(place / "data.json", partial(_sample, seed, place, sizes, base_dir))
        for n, name in enumerate(variants):
            logger.info("seed %d, loss %d of %d: %s", seed, n + 1, len(variants), name)
            found[name][str(seed)] = cached(
                place / f"{_file(name)}.json", partial(_train, VARIANTS[name], seed, place, test, base_dir)
            )
    return {"seeds": list(seeds), "base": base, "scores": found}


def merge(result: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """variant -> heading -> (mean, smallest, largest) over the seeds; "cost" is a step's processor time over that of
    `sigmoid`, seed by seed: of the same study, or of the run that a row names (`sigmoid_step_seconds`) which was made
    later, on a machine of another speed."""
    table: dict[str, dict[str, tuple[float, float, float]]] = {
        "base": {title: _spread([result["base"][mode][key][0]]) for (mode, key), title in COLUMNS.items()}
    }
    for name, by_seed in result["scores"].items():
        runs = list(by_seed.values())
        table[name] = {
            title: _spread([run["scores"][mode][key][0] for run in runs]) for (mode, key), title in COLUMNS.items()
        }
        if "sigmoid" in result["scores"]:
            plain = result["scores"]["sigmoid"]
            table[name]["cost"] = _spread(
                [
                    run["step_seconds"] / run.get("sigmoid_step_seconds", plain[seed]["step_seconds"])
                    for seed, run in by_seed.items()
                ]
            )
    return table


def markdown(result: Mapping[str, Any]) -> str:
    """The table: mean over the seeds, smallest and largest in small type."""
    heads = [*COLUMNS.values(), "cost"]
    lines = ["| loss | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for name, row in merge(result).items():
        cells = []
        for head in heads:
            digits = 0 if head.startswith("MME") else 2
            mean, low, high = row.get(head, (float("nan"),) * 3)
            spread = (
                f" <sub>{low:.{digits}f}–{high:.{digits}f}</sub>" if f"{low:.{digits}f}" != f"{high:.{digits}f}" else ""
            )
            cells.append("" if head not in row else f"{mean:.{digits}f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: Mapping[str, Any], file: str | Path) -> None:
    """A panel per metric, a line per loss: the mean over the seeds and their range; the base is the dashed line."""
    from matplotlib import pyplot as plt

    table = merge(result)
    names = [name for name in table if name != "base"]
    titles = [title for title in COLUMNS.values() if not title.startswith("over")]
    figure, grid = plt.subplots(
        2, 3, figsize=(8.6, 2 * (0.21 * len(names) + 0.8)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, title in zip(grid.flat, titles, strict=True):
        axis.axvline(table["base"][title][0], color="#999999", linestyle="--", linewidth=1)
        for n, name in enumerate(names):
            mean, low, high = table[name][title]
            axis.plot([low, high], [n, n], color="#1f6f8b", linewidth=2, alpha=0.5)
            axis.plot([mean], [n], "o", color="#1f6f8b", markersize=5)
        axis.set_title(title, fontsize=11)
        axis.tick_params(labelsize=10)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_yticks(range(len(names)), names, fontsize=10)
    grid[0][0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(
        f"All losses on the embedded demo: mean and range over seeds {', '.join(map(str, result['seeds']))};\ndashed:"
        " the base",
        fontsize=11,
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _sample(seed: int, place: Path, sizes: Sizes, base_dir: str | Path) -> dict[str, str]:
    items = preference_items(1000 + seed, images=sizes.images, card_images=sizes.card_images, questions=sizes.questions)
    records = feedback(items, place / "data", base_dir, seed, Watch())
    return {
        "source": str(records.relative_to(place)),
        "image_root": str((records.parent / "images").relative_to(place)),
    }


def _train(recipe: Recipe, seed: int, place: Path, test: list[Any], base_dir: str | Path) -> dict[str, Any]:
    source = {key: str(place / value) for key, value in json.loads((place / "data.json").read_text()).items()}
    trainer = make_trainer(
        recipe, preferences(recipe, source, seed), base_dir, place / "runs" / _file(recipe.name), seed
    )
    start = time.process_time()
    trainer.train()
    seconds = (time.process_time() - start) / trainer.state.global_step
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    scores = evaluate_policy(trainer.model, trainer.processing_class, test, place / "eval" / _file(recipe.name))
    return {"scores": scores, "step_seconds": seconds, "margin": float(margins[-1]) if margins else None}


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.fmean(values), min(values), max(values)


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logger.setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/losses"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="LOSS",
        help=f"of: {'; '.join(VARIANTS)}",
    )
    arguments = parser.parse_args()
    result = run_study(arguments.out, arguments.seeds, arguments.losses)
    (arguments.out / "losses.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result) + "\n"
    (arguments.out / "losses.md").write_text(text, encoding="utf-8")
    plot(result, arguments.out / "losses.png")
    print(text)


if __name__ == "__main__":
    main()
