"""silkie: preference training (DPO) of vision-language models. One image, one forward, every pair.

    from silkie import SilkieDPOConfig, SilkieDPOTrainer    # train
    from silkie.data import load_preferences                # any preference data
    from silkie.inference import generate, load_policy      # use what was trained

The rooms, in the order in which data flows through them; each imports only from those above it in this list:

    data/        any source -> preference groups (one prompt with its images, k responses, pairs over them)
    batch/       groups -> the tensors of a micro-batch: prompt and images once, every response after it
    logprob/     hidden states -> log-probs of tokens, without building the logits (torch and triton only)
    model/       what differs between VLMs: families, vision tower, attention masks; and the one forward
    losses/      log-probs -> loss: pure functions with their equations, and their weighted mean (torch only)
    config/      every option of a run, validated once
    training/    what keeps a run right: passes, reference, self-test, guards, checkpoints, metrics, model card
    trainer.py   `SilkieDPOTrainer`, the wiring

Beside the flow:

    __main__.py  the console command `silkie`; each of its commands is a module's `main`
    run/         a training run from options, in one process or several: `silkie train`, `recipes/dpo_silkie.py`
    inference.py load what was trained and generate with it
    feedback/    sample responses and have judges rate them
    evaluation/  answer benchmarks, score as their official scorers do, compare runs
    report/      HTML pages of runs and comparisons
    plan/        memory and layout of a run before it is started
    demo/        the whole loop on a small embedded world; nothing imports it

Shared ground: endpoint/ (OpenAI-compatible servers), io/ (files, command lines, the console), stats.py (intervals and
tests).

Config and trainer are imported when first used, so that `silkie.logprob`, `silkie.losses` or `silkie.data` can be used
alone without loading the trainer stack. `tests/unit/test_import_direction.py` holds the order.
"""

from typing import TYPE_CHECKING

from silkie.io.quiet import quiet

__version__ = "0.1.0"
__all__ = ["SilkieDPOConfig", "SilkieDPOTrainer", "__version__"]

quiet()

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
