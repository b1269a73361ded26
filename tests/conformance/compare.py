"""Runs one case in TRL's trainer and in silkie's, on the same tiny model, data and options, and compares the logs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from tests.support.tiny import image, tiny_model, tiny_processor, tiny_tokenizer

USER = [{"role": "user", "content": "what is in image ?"}]
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


def turn(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def talk(prompt: str = "what is in image ?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


def chats(images: bool = True, **extra: Any) -> list[dict[str, Any]]:
    """Two conversational pair rows of different length."""
    rows = [
        {"prompt": talk(), "chosen": turn("a red cat"), "rejected": turn("no")},
        {"prompt": talk("how many dog are there"), "chosen": turn("two"), "rejected": turn("one and not two dog")},
    ]
    return [{**row, **({"images": [image(i)]} if images else {}), **extra} for i, row in enumerate(rows)]


def language_model(kind: str = "Qwen2", **more: Any) -> Any:
    """A tiny text model whose outputs are far from uniform."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(vocab_size=len(tiny_tokenizer()), bos_token_id=None, eos_token_id=2, pad_token_id=0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **ids, "num_key_value_heads": 2, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model.eval()


@dataclass(kw_only=True)
class Case:
    """One option or kind of data.

    Attributes:
        name: what the table calls it.
        rows: of the data, or a function that makes a dataset.
        options: of the config, for both trainers.
        expected: "same", "different" or "refused".
        why: the reason of a difference, or what silkie's refusal says to do instead (a regular expression).
        own: options of silkie alone.
        peft: train a LoRA adapter; False trains the whole model with a reference model.
        trl_crashes: TRL cannot run the case, so there is nothing to compare with.
        metrics: what is compared.
        adapter: makes another adapter than LoRA on three projections.
        kto: TRL's side is its KTO trainer.
        note: a remark for the table, where both do the same.
        model, processor: make these.
    """

    name: str
    rows: Sequence[dict[str, Any]] | Callable[[], Any] = field(default_factory=chats)
    options: dict[str, Any] = field(default_factory=dict)
    expected: str = "same"
    why: str = ""
    own: dict[str, Any] = field(default_factory=dict)
    peft: bool = True
    trl_crashes: bool = False
    metrics: tuple[str, ...] = METRICS
    note: str = ""
    model: Callable[[], Any] = tiny_model
    processor: Callable[[], Any] = tiny_processor
    kto: bool = False
    adapter: Callable[[], Any] = lambda: LoraConfig(
        r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q|v|up)_proj"
    )

    def dataset(self) -> Any:
        if callable(self.rows):
            return self.rows()
        rows = [{name: value for name, value in row.items() if value is not ...} for row in self.rows]
        return datasets.Dataset.from_list(rows)


def options(tmp: Path, case: Case) -> dict[str, Any]:
    defaults = dict(
        output_dir=str(tmp),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        learning_rate=0.05,
        optim="sgd",
        max_steps=2,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        max_length=None,
        dataloader_pin_memory=False,
    )
    return {**defaults, **case.options}


def build(cls: Any, config: Any, case: Case, tmp: Path, **arguments: Any) -> Any:
    """A trainer of either kind on fresh copies of everything."""
    own = case.own if cls is SilkieDPOTrainer else {}
    if case.kto and cls is SilkieDPOTrainer:
        own = {"loss_type": "kto", **own}
    given = {
        "ref_model": None if case.peft else case.model(),
        "args": config(**{**options(tmp, case), **own}),
        "train_dataset": case.dataset(),
        "processing_class": case.processor(),
        "peft_config": case.adapter() if case.peft else None,
    }
    return cls(case.model(), **{**given, **arguments})


def history(trainer: Any, metrics: Sequence[str]) -> list[list[float]]:
    trainer.train()
    return [[entry[name] for name in metrics] for entry in trainer.state.log_history if "loss" in entry]


def stock(case: Case) -> tuple[Any, Any]:
    """TRL's trainer and config for a case."""
    return (KTOTrainer, KTOConfig) if case.kto else (DPOTrainer, DPOConfig)


def run_both(case: Case, tmp: Path) -> tuple[list[list[float]], list[list[float]]]:
    """The logged metrics of both trainers, by step."""
    trl = history(build(*stock(case), copy.deepcopy(case), tmp / "trl"), case.metrics)
    silkie = history(build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp / "silkie"), case.metrics)
    return trl, silkie
