"""Make the demo's base weights: sight, language, then the declared flaws (see silkie/demo/README.md). About 20 minutes
on two quiet cores.

    python recipes/make_demo_base.py --output_dir outputs/demo_base
    python recipes/make_demo_base.py --resume outputs/demo_base/language.pt   # the flaws only

`--output_dir silkie/demo/base` would replace the weights that the package ships. Checkpoints (`<stage>.pt`) are written
beside the weights every 100 steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from silkie.demo.model import save_base
from silkie.demo.pretrain import STAGES, new_model, probe, train_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_base"))
    parser.add_argument("--resume", type=Path, help="a checkpoint <stage>.pt: go on with the stage after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, packer = new_model(args.seed)
    stages = list(STAGES)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, weights_only=True))
        stages = stages[[stage.what for stage in stages].index(args.resume.stem) + 1 :]
    for k, stage in enumerate(stages):
        train_stage(
            model,
            packer,
            stage,
            seed=args.seed + 1 + k + len(STAGES) - len(stages),
            log=log,
            checkpoint=args.output_dir / f"{stage.what}.pt",
        )
        for family, (accuracy, yes) in probe(model, packer).items():
            log(f"after {stage.what}: {family} accuracy {accuracy:.2f}, yes-rate {yes:.2f}")
    save_base(model, packer.tokenizer, args.output_dir)
    log(f"base weights in {args.output_dir}")


def log(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
