"""Preference-train a vision-language model.

    accelerate launch recipes/dpo_silkie.py                                            # the embedded demo: the whole loop in minutes on
    a CPU
    accelerate launch recipes/dpo_silkie.py --config recipes/silkie_qwen2_5_vl_7b.yaml  # Silkie's hyper-parameters on VLFeedback
    accelerate launch recipes/dpo_silkie.py --model_name_or_path DIR_OR_NAME --dataset_name DIR_OR_NAME --use_peft --output_dir OUT

`--dry_run` loads everything, runs one optimizer step, prints the plan and stops. `--help` lists all options.
"""

from __future__ import annotations

import logging
import sys

from trl import ModelConfig, TrlParser

from silkie import SilkieDPOConfig
from silkie.recipe import DemoArguments, RunArguments, run, run_demo


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    if wants_demo(sys.argv[1:]):
        (demo_args,) = TrlParser((DemoArguments,)).parse_args_and_config()
        run_demo(demo_args)
        return
    run_args, training_args, model_args = TrlParser((RunArguments, SilkieDPOConfig, ModelConfig)).parse_args_and_config()
    run(run_args, training_args, model_args)


def wants_demo(argv: list[str]) -> bool:
    """The demo runs where neither a model, nor data, nor a config file is named."""
    named = {arg.split("=")[0].replace("-", "_").strip("_") for arg in argv if arg.startswith("--")}
    return not named & {"model_name_or_path", "dataset_name", "config", "help"} and "-h" not in argv


if __name__ == "__main__":
    main()
