"""Fold a LoRA adapter into its base model: one plain directory that transformers, vLLM and others serve without peft.
The same as `silkie merge`, whose code is in silkie/inference.py.

python examples/merge_adapter.py ADAPTER_DIR OUT_DIR [--base-model DIR_OR_NAME]
"""

import sys

from silkie.inference import merge

if __name__ == "__main__":
    sys.exit(merge(prog="merge_adapter.py"))
