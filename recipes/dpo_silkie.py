"""Preference-train a vision-language model.

    # The embedded demo: minutes on a CPU
    accelerate launch recipes/dpo_silkie.py
    # Silkie's hyper-parameters on VLFeedback
    accelerate launch recipes/dpo_silkie.py --config recipes/silkie_qwen2_5_vl_7b.yaml
    # Your own model and data
    accelerate launch recipes/dpo_silkie.py --model_name_or_path DIR_OR_NAME --dataset_name DIR_OR_NAME --use_peft \\
        --output_dir OUT

`--dry_run` loads everything, runs one optimizer step, prints the plan and stops. `--help` lists all options.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field

from trl import ModelConfig, TrlParser

from silkie import SilkieDPOConfig
from silkie.run import RunArguments, run

DESCRIPTION = (
    "Preference-train a vision-language model on --dataset_name, from --model_name_or_path. Where neither is named the"
    " embedded demo runs; its options are --output_dir, --seed, --no_controls and --dry_run. --config FILE.yaml takes"
    " any option below."
)


@dataclass
class DemoArguments:
    """The embedded demo."""

    output_dir: str = field(
        default="outputs/demo", metadata={"help": "Where data, adapter, tables, pictures and the report go."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of sampling and training."})
    controls: bool = field(
        default=True,
        metadata={"help": "Also train the controls (SFT on the best response, shuffled preferences, longest-as-best)."},
    )
    demo: bool = field(
        default=True,
        metadata={"help": "Stands for the demo on the command line; it runs where no model and no data are named."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Sample and rate a few prompts, run one optimizer step, print the plan and stop."},
    )


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    argv = [
        part for arg in sys.argv[1:] for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])
    ]  # TRL wants two words
    if demo_args := demo_arguments(argv):
        run_demo(demo_args)
        return
    parser = TrlParser((RunArguments, SilkieDPOConfig, ModelConfig), description=DESCRIPTION)
    run_args, training_args, model_args = parser.parse_args_and_config(argv)
    run(run_args, training_args, model_args)


def demo_arguments(argv: list[str]) -> DemoArguments | None:
    """The demo runs where the demo's own options are named and no others."""
    if {"-h", "--help", "--config"} & set(argv):
        return None
    args, others = TrlParser((DemoArguments,)).parse_args_and_config(argv, return_remaining_strings=True)
    return None if others else args


def run_demo(args: DemoArguments) -> None:
    """The embedded demo; see silkie/demo/README.md."""
    from silkie.demo.loop import run_demo as loop  # only here: training on own data loads nothing of the demo

    print(loop(args.output_dir, seed=args.seed, controls=args.controls, dry_run=args.dry_run))


if __name__ == "__main__":
    main()
