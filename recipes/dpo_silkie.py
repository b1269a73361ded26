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

from trl import ModelConfig, TrlParser

from silkie import SilkieDPOConfig
from silkie.run import DemoArguments, RunArguments, run, run_demo

DESCRIPTION = (
    "Preference-train a vision-language model on --dataset_name, from --model_name_or_path. Where neither is named the"
    " embedded demo runs; its options are --output_dir, --seed, --no_controls and --dry_run. --config FILE.yaml takes"
    " any option below."
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


if __name__ == "__main__":
    main()
