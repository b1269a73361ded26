"""Ask a trained policy about an image; the same as `silkie infer`, whose code is in silkie/inference.py.

    python examples/infer.py ADAPTER_OR_MODEL_DIR IMAGE "What is on the table?" [--base-model DIR_OR_NAME] [--compare]

`--compare` also prints the base model's answer: the same weights with the adapter switched off.
"""

import sys

from silkie.inference import infer

if __name__ == "__main__":
    sys.exit(infer(prog="infer.py"))
