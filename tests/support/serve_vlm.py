"""`transformers serve` as it is: `python -m tests.support.serve_vlm DIR --port N`.

Where torchvision is missing, transformers cannot build a Qwen-VL processor; then silkie's loader stands in for
`AutoProcessor`, and nothing else changes."""

from __future__ import annotations

import sys

import transformers

from silkie.model.processor import load_processor, torchvision_works

if __name__ == "__main__":
    if not torchvision_works():
        transformers.AutoProcessor.from_pretrained = lambda path, **_: load_processor(path)  # type: ignore[method-assign]
    from transformers.cli.transformers import main

    sys.argv = ["transformers", "serve", *sys.argv[1:], "--device", "cpu", "--host", "127.0.0.1"]
    main()
