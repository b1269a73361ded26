"""Lines of libraries about what the user did not cause and cannot change, each suppressed by its own text.

Loading silkie does it, before the libraries are loaded. Everything else that they say stays.
"""

from __future__ import annotations

import logging
import warnings

__all__ = ["UNCAUSED", "quiet"]

# logger -> (how its line begins, why nobody needs it)
UNCAUSED = {
    "bitsandbytes.backends.cpu.ops": (
        "Failed to load CPU gemm_4bit_forward from kernels-community",
        "4-bit inference on a CPU would be faster with a package that silkie does not use; said at every import",
    ),
    "DeepSpeed": ("Setting accelerator to CPU", "accelerate imports DeepSpeed, also for a run without it"),
    "matplotlib.font_manager": ("Matplotlib is building the font cache", "once per machine, while a picture is drawn"),
}
# peft asks a model whether it checkpoints, by the name that transformers calls deprecated
ALIAS = "`is_gradient_checkpointing` is deprecated"


class _Without(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.name)


def quiet() -> None:
    """Leaves those lines out; more than once changes nothing."""
    for name, (beginning, _) in UNCAUSED.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(beginning))
    warnings.filterwarnings("ignore", message=ALIAS, category=FutureWarning)
