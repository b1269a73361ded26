"""The setting of `bench_step.py --model photographs`: SmolLM2-135M-Instruct and EfficientNet-Lite0 with their published
weights in stock LLaVA (recipes/studies/photographs), its own tokenizer of 49,153 words, one board of photographs."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from step_meter import StepMeter
from step_setting import pair_rows
from trl import DPOConfig, DPOTrainer

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.schema import group_features
from silkie.model.adapters import default_lora_targets
from tests.support.data import group

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "studies"))
from photographs.base import assemble, make_processor
from photographs.boards import DESCRIBE, NAMES, SPLITS, boards, render
from photographs.sources import Sources, default_cache, photographs

PROMPT_TOKENS = 260  # of text before the question: an instruction of a usual length
# What a careful instruction may say; repeated until the prompt has its length.
TEXT = (
    "Look at the whole picture before you answer, from the upper left corner to the lower right one. Name only what you"
    " can see, in plain words, and leave out what you merely suppose to be there. If two things look alike, say which of"
    " them you mean. Do not describe the background, the light or the photographer's intention. "
)


def build(sources: Sources | None = None) -> tuple[Any, Any]:
    """Model (fp32, the projector random) and processor. Raises SourceError where the parts are not there."""
    sources = sources or Sources(default_cache())
    processor = make_processor(sources)
    torch.manual_seed(0)
    return assemble(sources, processor), processor


def build_groups(
    processor: Any, k: int, count: int, prompt_tokens: int = PROMPT_TOKENS, sources: Sources | None = None
) -> list[dict[str, Any]]:
    """`count` groups of k responses of about 35 tokens to a text of `prompt_tokens` and a question; all pairs."""
    pictures, labels = photographs(sources or Sources(default_cache()), SPLITS["preference"][0])
    ids = processor.tokenizer(TEXT * 8, add_special_tokens=False).input_ids[:prompt_tokens]
    prompt = f"{processor.tokenizer.decode(ids)}\n{DESCRIBE}"
    rng = np.random.default_rng(0)
    rows = []
    for board in boards(labels, "preference", count, 0):
        named = [[NAMES[i] for i in rng.choice(len(NAMES), 4, replace=False)] for _ in range(k)]
        texts = [
            f"I see a {a}, a {b}, a {c} and a {d}. They lie on a white table, in good light." for a, b, c, d in named
        ]
        pairs = [[i, j] for i in range(k) for j in range(i + 1, k)]
        rows.append(group([render(board, pictures)], prompt, texts, pairs))
    return rows


def run(
    contender: str,
    *,
    k: int = 4,
    questions: int = 1,
    groups_per_step: int = 1,
    timed: int = 3,
    learning_rate: float = 1e-4,
    prompt_tokens: int = PROMPT_TOKENS,
) -> dict[str, Any]:
    """Trains a warm-up and the timed steps of one contender of `bench_step.py`, in fp32 on the CPU, and returns what was
    measured. `questions` is that of `bench_step.py`: groups per image, here always one.

    Raises:
        ValueError: several questions about one image.
    """
    if questions != 1:
        raise ValueError("one question per board: leave --questions-per-image alone.")
    model, processor = build()
    groups = build_groups(processor, k, groups_per_step, prompt_tokens)
    pairs = k * (k - 1) // 2 * groups_per_step
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=default_lora_targets(model.config))
    meter = StepMeter("cpu")
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = dict(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            max_steps=timed + 1,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            max_length=None,
        )
        common: dict[str, Any] = dict(processing_class=processor, callbacks=[meter], peft_config=lora)
        trainer: Any
        if contender == "TRL":
            args = DPOConfig(per_device_train_batch_size=pairs, **options)
            trainer = DPOTrainer(model, args=args, train_dataset=pair_rows(groups), **common)
        else:
            mine = SilkieDPOConfig(
                per_device_train_batch_size=groups_per_step,
                layout=contender.split()[0],
                precompute_ref_log_probs="precomputed" in contender,
                self_test=False,
                **options,
            )
            data = Dataset.from_list(groups, features=group_features(()))
            trainer = SilkieDPOTrainer(model, args=mine, train_dataset=data, **common)
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
    best = min(meter.seconds)
    return {
        "contender": contender,
        "lengths": "equal",
        "image_tokens": 4,
        "questions": questions,
        "k": k,
        "pairs": pairs,
        "groups_per_step": groups_per_step,
        "seconds": best,
        "all_seconds": meter.seconds,
        "pairs_per_second": pairs / best,
        "flops": meter.flops,
        "extra_bytes": meter.extra_bytes,
        "losses": [entry["loss"] for entry in history],
        "grad_norms": [entry["grad_norm"] for entry in history],
    }
