"""Models without weights: their structure can be asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.integrations import deepspeed


@contextmanager
def weightless() -> Iterator[None]:
    """Within the context, models are built on the meta device: no memory, no time.

    Under ZeRO-3 transformers would initialise the weights while a model is built, and there are none. It knows of
    ZeRO-3 by one module-level reference (private: `tests/integration/test_distributed.py` builds under ZeRO-3).
    """
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        with torch.device("meta"):
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
