"""The paper's main table in miniature: SFT on the best response, longest-as-best, strongest-model-as-best, random
pairs, single aspects and Silkie, on the embedded demo, over several seeds.

    python recipes/ablation.py --out outputs/ablation           # 3 seeds; about ten minutes a seed on two quiet cores
    python recipes/ablation.py --out outputs/ablation --seeds 0 1 2 3 4 --recipes silkie random

A stopped run goes on where it was. Writes ablation.json and ablation.md.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from silkie.demo.ablation import RECIPES, markdown, run_ablation


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
