"""What `silkie train` and `recipes/dpo_silkie.py` do: arguments, data, model, training, saving. Importable, so that a
script can change one part and keep the rest. `command` reads the command line, `launch` starts several processes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, cast

from datasets import Dataset
from transformers import AutoConfig
from trl import ModelConfig, get_peft_config, get_quantization_config

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data import load_preferences
from silkie.data.splits import By, check_choice, check_leak, split_groups
from silkie.io.console import computing
from silkie.model.families import shell
from silkie.model.processor import load_processor
from silkie.model.vision import unquantized_modules
from silkie.plan.dry_run import dry_run
from silkie.run.adapter import check_adapter, load_adapted
from silkie.training.ending import PREEMPTED_EXIT_CODE

logger = logging.getLogger(__name__)


@dataclass
class RunArguments:
    """Data of a run, and what to do with it."""

    dataset_name: str = field(
        metadata={"help": "Preference data: hub name, directory, JSONL, parquet or zip (see silkie.data)."}
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Directory or zip that relative image paths are in."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the data to train on."})
    dataset_format: str | None = field(
        default=None, metadata={"help": "Source format, where it cannot be told from the name and the columns."}
    )
    pairs: str = field(
        default="all",
        metadata={
            "help": (
                "Ratings to pairs: all, best_vs_worst, best_vs_rest, random, longest, or model:NAME (its answer as"
                " best)."
            )
        },
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data to evaluate on; shares nothing that eval_split_by names with the training data."},
    )
    eval_size: float = field(
        default=0.0, metadata={"help": "Share of the groups held out for evaluation, split as eval_split_by says."}
    )
    eval_split_by: str = field(
        default="both",
        metadata={
            "help": (
                "What training and evaluation data must not share: both (image and prompt), image, or prompt. image is"
                " for data with a few stock prompts."
            )
        },
    )
    allow_remote_images: bool = field(default=False, metadata={"help": "Fetch images that the data names by URL."})
    max_groups: int | None = field(default=None, metadata={"help": "Train on the first groups only."})
    min_pixels: int | None = field(default=None, metadata={"help": "Smallest image area after resizing, in pixels."})
    max_pixels: int | None = field(
        default=None,
        metadata={"help": "Largest image area after resizing, in pixels; Qwen spends a token on 28 x 28 (32 x 32)."},
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": (
                "LoRA adapter of the model to train on from. The policy starts as this adapter, and a frozen copy of it"
                " is the reference."
            )
        },
    )
    resume: bool = field(
        default=True, metadata={"help": "Resume from the last complete checkpoint in output_dir, where there is one."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load everything, run one optimizer step, print the plan and stop."}
    )

    def __post_init__(self) -> None:
        for name in ("max_groups", "min_pixels", "max_pixels"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, not {getattr(self, name)}.")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"`min_pixels={self.min_pixels}` is above `max_pixels={self.max_pixels}`.")
        if not 0 <= self.eval_size < 1:
            raise ValueError(f"`eval_size` is a share of the groups: in [0, 1), not {self.eval_size}.")
        check_choice("eval_split_by", self.eval_split_by, By)
        if self.eval_size and self.eval_dataset_name:
            raise ValueError(
                "`eval_size` holds out training data, `eval_dataset_name` names other data: pass one of them."
            )


def run(run_args: RunArguments, args: SilkieDPOConfig, model_args: ModelConfig) -> SilkieDPOTrainer:
    """Loads data and model, trains, saves adapter (or weights), processor and model card to `output_dir`.

    Raises:
        ValueError, silkie.data.DataError: arguments or data that cannot work, before any compute is spent.
        silkie.training.checkpoints.CheckpointError: `output_dir` cannot be written, or is held by another run, or
            its checkpoints are those of another run.
        SystemExit: with code 75, where a signal or the stop file ended the run; nothing is saved but its checkpoint.
    """
    if not model_args.model_name_or_path:
        raise ValueError("Name a model: --model_name_or_path DIRECTORY_OR_HUB_NAME.")
    check_adapter(run_args.adapter_name_or_path, model_args)
    train, evaluation = load_data(run_args, args)
    trainer = make_trainer(run_args, args, model_args, train, evaluation)
    if run_args.dry_run:
        dry_run(trainer)
        return trainer
    with computing():
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or run_args.resume)
    if trainer.preempted:  # with on_preempt="return", which leaves the decision to the caller of train()
        raise SystemExit(PREEMPTED_EXIT_CODE)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if trainer.accelerator.is_main_process:
        logger.info("saved to %s; load it with silkie.inference.load_policy(%r)", args.output_dir, args.output_dir)
        logger.info("next: silkie infer %s IMAGE QUESTION; silkie report %s", args.output_dir, args.output_dir)
    return trainer


def load_data(run_args: RunArguments, args: SilkieDPOConfig) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation groups, which share nothing that `eval_split_by` names."""
    by = cast(By, run_args.eval_split_by)
    with args.main_process_first(desc="loading the data"):
        train = _load(run_args.dataset_name, run_args, args)
        if run_args.max_groups is not None:
            train = train.select(range(min(run_args.max_groups, len(train))))
        if run_args.eval_dataset_name:
            evaluation = _load(run_args.eval_dataset_name, run_args, args)
            check_leak(train, evaluation, by=by)
            return train, evaluation
        if run_args.eval_size:
            parts = split_groups(train, run_args.eval_size, seed=args.seed, by=by)
            return parts["train"], parts["test"]
    return train, None


def _load(source: str, run_args: RunArguments, args: SilkieDPOConfig) -> Dataset:
    return load_preferences(
        source,
        image_root=run_args.image_root,
        split=run_args.dataset_split,
        pairs=run_args.pairs,
        on_error=args.on_bad_row,
        allow_remote_images=run_args.allow_remote_images,
        format=run_args.dataset_format,
        num_proc=args.dataset_num_proc,
    )


def make_trainer(
    run_args: RunArguments, args: SilkieDPOConfig, model_args: ModelConfig, train: Dataset, evaluation: Dataset | None
) -> SilkieDPOTrainer:
    """The trainer of a run, with the model loaded by TRL and the processor by silkie."""
    name = model_args.model_name_or_path
    assert name is not None
    revision = {"revision": model_args.model_revision} if model_args.model_revision else {}
    args.model_init_kwargs = {
        **(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}),
        **revision,
        "dtype": model_args.dtype or "auto",
        "use_safetensors": True,
        **({"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}),
    }
    pixels = {
        k: v for k, v in (("min_pixels", run_args.min_pixels), ("max_pixels", run_args.max_pixels)) if v is not None
    }
    processor = load_processor(name, trust_remote_code=args.trust_remote_code, **revision, **pixels)
    config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **revision)
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        quantization.llm_int8_skip_modules = unquantized_modules(shell(config))
    model: Any = name
    if run_args.adapter_name_or_path:
        model = load_adapted(name, run_args.adapter_name_or_path, args, quantization)
        args.model_init_kwargs = quantization = None  # both were read, and TRL has nothing to load any more
    return SilkieDPOTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization,
    )
