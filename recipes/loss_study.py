"""All losses of silkie on the same preference data of the embedded demo, over several seeds: one table and one plot.

    python recipes/loss_study.py --out outputs/losses             # 3 seeds; about half an hour a seed on one quiet core
    python recipes/loss_study.py --out outputs/losses --seeds 0 --losses sigmoid ipo "simpo, beta 2"

A stopped run goes on where it was; processes with different --seeds may share a folder. Writes losses.json, losses.md
and losses.png."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from silkie.demo.loss_study import VARIANTS, markdown, plot, run_study


def main() -> None:
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("silkie.demo.loss_study").setLevel(logging.INFO)
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
