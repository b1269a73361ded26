"""The demo over several seeds, and one table of them: python recipes/studies/seeds.py OUT_DIR [SEED ...]

Each seed draws its own preference prompts, samples and training order; base weights and held-out questions are the
same. A seed whose `results.json` is there is not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silkie.demo.run import run_demo
from silkie.demo.scores import METRICS

WHOLE_NUMBERS = ("mme_perception", "mme_cognition")


def load_or_run(out: Path, seed: int) -> dict[str, Any]:
    """The results of one seed, run where they are missing."""
    file = out / f"seed{seed}" / "results.json"
    if not file.exists():
        run_demo(file.parent, seed=seed)
    return json.loads(file.read_text())


def table(runs: Sequence[Mapping[str, Any]], mode: str) -> str:
    """A row per metric, a column per policy: the mean over the seeds, and in brackets the smallest and the largest."""
    policies = runs[0]["policies"]
    lines = ["| | " + " | ".join(policies.values()) + " |", "|---" * (1 + len(policies)) + "|"]
    for metric in METRICS:
        digits = 0 if metric.key in WHOLE_NUMBERS else 2
        cells = []
        for policy in policies:
            values = [run["scores"][policy][mode][metric.key][0] for run in runs]
            spread = (
                f" [{min(values):.{digits}f}, {max(values):.{digits}f}]"
                if len(runs) > 1 and max(values) > min(values)
                else ""
            )
            cells.append(f"{sum(values) / len(values):.{digits}f}{spread}")
        arrow = {1: " ↑", -1: " ↓", 0: ""}[metric.better]
        lines.append(f"| {metric.title}{arrow} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """Markdown with the tables of both decodings."""
    seeds = ", ".join(str(run["seed"]) for run in runs)
    pairs = " / ".join(str(run["pairs"]) for run in runs)
    parts = [
        f"Seeds {seeds}; {pairs} pairs. Mean over the seeds, smallest and largest in brackets; the base is the same for"
        " all."
    ]
    parts += [f"### {mode}\n\n{table(runs, mode)}" for mode in ("greedy", "T=1")]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("seeds", type=int, nargs="*", default=[0, 1, 2], metavar="SEED")
    args = parser.parse_args()
    text = report([load_or_run(args.out, seed) for seed in args.seeds])
    (args.out / "seeds.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
