"""Preference-train a vision-language model: `silkie train` as a script, for a launcher of your own.

    # The embedded demo: minutes on a CPU
    python recipes/dpo_silkie.py
    # Silkie's hyper-parameters on VLFeedback
    accelerate launch recipes/dpo_silkie.py --config recipes/silkie_qwen2_5_vl_7b.yaml
    # Your own model and data
    accelerate launch recipes/dpo_silkie.py --model_name_or_path DIR_OR_NAME --dataset_name DIR_OR_NAME --use_peft \\
        --output_dir OUT

`--dry_run` loads everything, runs one optimizer step, prints the plan and stops. `--help` lists the options.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

from silkie.demo import __main__ as demo
from silkie.io.console import say

NAME = "dpo_silkie.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, or runs the demo where nothing but the demo's own options are named."""
    words = list(sys.argv[1:] if argv is None else argv)
    say("silkie: loading torch and transformers ...")
    if is_demo(words):
        return demo.main([word for word in words if word != "--demo"], NAME)
    from silkie.run.command import train  # takes seconds

    return train(words, NAME)


def is_demo(words: Sequence[str]) -> bool:
    """Whether the demo's parser takes all words. `--demo` stands for the demo on the command line."""
    if {"-h", "--help", "--help-all", "--config"} & set(words):
        return False
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            demo.make_parser(NAME).parse_args([word for word in words if word != "--demo"])
        except SystemExit:
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
