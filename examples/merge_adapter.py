"""Fold a LoRA adapter into its base model: one plain directory that transformers, vLLM and others serve without peft.

python examples/merge_adapter.py ADAPTER_DIR OUT_DIR [--base-model DIR_OR_NAME]
"""

import argparse
from pathlib import Path

from silkie.inference import load_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("out")
    parser.add_argument("--base-model", help="where the adapter's base model is, if it has moved")
    args = parser.parse_args()
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        parser.error(f"{args.out} exists and is not empty")

    model, processor = load_policy(args.adapter, base_model=args.base_model, merge=True)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"merged model and processor are in {args.out}")


if __name__ == "__main__":
    main()
