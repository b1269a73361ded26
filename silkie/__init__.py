"""silkie: preference training (DPO) of vision-language models. One image, one forward, every pair.

    from silkie import SilkieDPOConfig, SilkieDPOTrainer    # train
    from silkie.data import load_preferences                # any preference data
    from silkie.inference import generate, load_policy      # use what was trained

Config and trainer are imported when first used, so that `silkie.logprob`, `silkie.losses` or `silkie.data` can be used
alone without loading the trainer stack.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["SilkieDPOConfig", "SilkieDPOTrainer", "__version__"]

if TYPE_CHECKING:
    from silkie.config import SilkieDPOConfig
    from silkie.trainer import SilkieDPOTrainer


def __getattr__(name: str):
    if name == "SilkieDPOConfig":
        from silkie.config import SilkieDPOConfig

        return SilkieDPOConfig
    if name == "SilkieDPOTrainer":
        from silkie.trainer import SilkieDPOTrainer

        return SilkieDPOTrainer
    raise AttributeError(f"module 'silkie' has no attribute {name!r}")
