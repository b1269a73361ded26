"""`SilkieDPOTrainer`: TRL's DPO trainer on preference groups. Wiring only; the parts are in the modules it imports.

Of TRL's trainer it uses `__init__`, `compute_loss`, `_set_signature_columns_if_needed`, `log` and `_metrics`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin, TrainerCallback
from trl import DPOTrainer

from silkie.batch.collator import GroupCollator, ImageCorruption, blank_vision
from silkie.batch.encoding import GroupEncoder
from silkie.batch.packing import Layout
from silkie.batch.preparation import PreparationReport, prepare_groups
from silkie.batch.sampler import GroupBatchSampler, WithEmptyGroups
from silkie.config import SilkieDPOConfig
from silkie.data import load_preferences
from silkie.data.schema import aspects_of, is_group_features
from silkie.losses import GroupLogps, Objective, build_objective
from silkie.model.attention import Attention
from silkie.model.families import (
    PromptPositions,
    causal_lm,
    check_merges_images,
    freeze_vision,
    keep_used_conversions,
    unhook_vision,
    vision_is_frozen,
    with_default_targets,
)
from silkie.model.forward import Scorer, Scores
from silkie.model.layout import LayoutChoice, choose_layout, self_test
from silkie.model.processor import load_processor, looks_local
from silkie.model.vision import FeatureCache
from silkie.training import guards
from silkie.training.metrics import RunMetrics
from silkie.training.model_card import write_card
from silkie.training.reference import Reference
from silkie.training.reference_cache import ReferenceTable, precompute_reference
from silkie.training.resumable import RecoverableTrainer

logger = logging.getLogger(__name__)

GROUP_COLUMNS = [
    "id",
    "row",
    "images",
    "prompt",
    "responses",
    "pairs",
    "pair_weights",
    "ratings",
    "chat_template_kwargs",
]


class SilkieDPOTrainer(RecoverableTrainer, DPOTrainer):
    """Preference-trains a vision-language model on preference groups.

    Args:
        model: model, PeftModel, local directory or hub name.
        ref_model: reference model; None with LoRA: the same weights with the adapter off (for a pre-loaded adapter:
            with its frozen initial copy).
        args: `SilkieDPOConfig`.
        train_dataset, eval_dataset: preference groups from `silkie.data.load_preferences`, or TRL pair rows (prompt /
            chosen / rejected / images), which are regrouped so that pairs over the same prompt and images share their
            forward pass. `eval_dataset` may be a dict of them.
        processing_class: the model's processor; None loads it from the model's name.
        peft_config: LoRA config; without `target_modules` it goes on the language model's attention and MLP
            projections.
        callbacks, optimizers, compute_metrics, quantization_config: as in TRL.

    Raises:
        TypeError: `args` is not a `SilkieDPOConfig`, or the data is not a `Dataset`.
        ValueError, silkie.data.DataError: options or data that cannot work, before any compute is spent.
    """

    _tag_names = ["silkie", "trl", "dpo"]  # noqa: RUF012  (transformers reads it as a class attribute)
    args: SilkieDPOConfig
    model: Any
    train_dataset: Dataset
    eval_dataset: Any
    data_collator: Any
    processing_class: Any
    _signature_columns: Any
    reports: dict[str, PreparationReport]
    objective: Objective
    loss_is_scaled_for_ga = True  # compute_loss divides by the totals of the whole optimizer step

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: PreTrainedModel | None = None,
        args: SilkieDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = SilkieDPOConfig(output_dir="silkie-dpo")
        if not isinstance(args, SilkieDPOConfig):
            raise TypeError(
                f"args must be a SilkieDPOConfig, not {type(args).__name__}: `from silkie import SilkieDPOConfig`."
            )
        if train_dataset is None:
            raise ValueError(
                "`train_dataset` is required: preference groups from silkie.data.load_preferences, or TRL pair rows."
            )
        guards.check_launch(args)
        config, processing_class = _config_and_processor(model, processing_class, args)
        if peft_config is not None:
            guards.check_adapter_kind(peft_config)
            peft_config = with_default_targets(peft_config, config)
        elif isinstance(model, PeftModel):
            guards.check_adapter_kind(model.active_peft_config)  # which parameters train is the caller's choice
        elif args.freeze_vision and not isinstance(model, str):
            freeze_vision(model)

        self.encoder = GroupEncoder(
            processing_class,
            max_length=args.max_length,
            max_response_length=args.max_response_length,
            response_end=args.response_end,
            chat_template_kwargs=args.template_variables,
        )
        self.reports: dict[str, PreparationReport] = {}
        train_dataset = self._prepared(train_dataset, args, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepared(d, args, name) for name, d in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, args, "eval")

        self.choice: LayoutChoice = choose_layout(config, args)
        self.objective = build_objective(args.loss_type, args.loss_weights, args.loss_options)
        self.objective.check_aspects(aspects_of(train_dataset.features))
        if ref_model is None and self.objective.needs_reference:
            guards.check_adapter_init(peft_config)
            if not (peft_config or isinstance(model, PeftModel) or config._name_or_path):
                raise ValueError(
                    "Full fine-tuning needs a reference, and this model names no directory to load one from: pass"
                    " `ref_model`, or train a LoRA adapter with `peft_config`."
                )
        find_unused = args.ddp_find_unused_parameters
        with _without_precompute(args), guards.allow_adapted_head():
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=_refuse_collation,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        if peft_config is None and args.freeze_vision and isinstance(model, str):
            freeze_vision(self.model)
        self.frozen_vision = vision_is_frozen(self.model)
        if self.frozen_vision and find_unused is None:
            args.ddp_find_unused_parameters = (
                False  # TRL turns it on for the vision tower's sake; a frozen one leaves nothing unused
            )
        self._after_trl_init()

    def _after_trl_init(self) -> None:
        args = self.args
        guards.check_process_count(args, self.accelerator)
        guards.check_optimizer(args, self.accelerator)
        guards.check_adapter_dtypes(self.model, self.is_deepspeed_enabled)
        guards.keep_trainable_4bit(self.model)
        keep_used_conversions(self.model)
        check_merges_images(self.model)
        for model in (self.model, self.ref_model):
            if model is not None:
                self.choice.apply(causal_lm(model))
        self.scorer = Scorer(
            attention=Attention(backend=self.choice.backend, layout=self.choice.layout),
            fused=args.use_fused_logprob,
            impl=args.logprob_impl,
        )
        self.data_collator = self.collator_for(self.choice.layout)
        if not self.objective.needs_reference and self.ref_model is not None:
            self.ref_model = None  # TRL loads one for full fine-tuning whatever the loss; no loss here reads it
            self.accelerator.free_memory()
        self.reference = Reference(self.model, self.ref_model) if self.objective.needs_reference else None
        self._logged = {
            mode: RunMetrics(self.objective, token_stats=args.log_token_stats) for mode in ("train", "eval")
        }
        self.reference_table: ReferenceTable | None = None
        # Before training: a resumed full fine-tuning run loads its trained weights over these.
        self.reference_hash = self.reference.weights_hash() if self.reference and args.precompute_ref_log_probs else ""
        self._sampler: GroupBatchSampler | None = None
        self.add_callback(_StepHooks(self))
        if args.eval_benchmarks:
            from silkie.evaluation.callback import (
                BenchmarkCallback,
            )  # only where asked for: the trainer does without the evaluation package

            self.add_callback(
                BenchmarkCallback(
                    args.eval_benchmarks,
                    args.eval_benchmark_steps,
                    limit=args.eval_benchmark_limit,
                    seed=args.seed,
                    trainer=self,
                )
            )
        for line in self.setup_lines():  # the data's lines were logged when it was prepared
            logger.info(line)
        if args.layout == "auto" and self.choice.layout == "rows":
            logger.warning("layout='auto' runs one row per response, which costs more: %s", self.choice.reason)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        guards.keep_fp32_outputs(self.accelerator)

    def _prepared(self, dataset: Dataset, args: SilkieDPOConfig, name: str) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"The {name} data must be a datasets.Dataset of preference groups or pair rows, not"
                f" {type(dataset).__name__}: pass what silkie.data.load_preferences returns, one split of a"
                " DatasetDict, or Dataset.from_list(rows)."
            )
        with args.main_process_first(desc=f"preparing the {name} data"):
            if {"row", "prompt_length", "response_lengths"} <= set(dataset.column_names):
                # Another trainer's data: its encoder may have counted other tokens, so it is measured again.
                dataset = dataset.remove_columns(["prompt_length", "response_lengths"])
                if len(set(dataset["row"])) < len(dataset):  # joined from several: a number must name one row
                    dataset = dataset.remove_columns("row")
            elif not is_group_features(dataset.features):
                dataset = load_preferences(dataset, on_error=args.on_bad_row)
            dataset, self.reports[name] = prepare_groups(
                dataset, self.encoder, on_bad_row=args.on_bad_row, num_proc=args.dataset_num_proc, name=name
            )
        return dataset

    def collator_for(self, layout: Layout) -> GroupCollator:
        """This run's collator for a layout."""
        tokenizer, config = self.processing_class.tokenizer, causal_lm(self.model).config
        return GroupCollator(
            encoder=self.encoder,
            positions=PromptPositions(self.model),
            layout=layout,
            pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            image_token_id=getattr(config, "image_token_id", None),
            groups_per_row=self.choice.groups_per_row,
            aspects=aspects_of(self.train_dataset.features),
            corruption=self._corruption(),
            dummy_vision=(
                blank_vision(self.encoder) if guards.needs_dummy_image(self.accelerator, self.frozen_vision) else None
            ),
        )

    def _corruption(self) -> ImageCorruption | None:
        if "corrupted" not in self.objective.needs:
            return None
        return ImageCorruption(kind=self.args.corruption, strength=self.args.corruption_strength, seed=self.args.seed)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = list(GROUP_COLUMNS)

    def get_train_dataloader(self) -> DataLoader:
        """Batches of groups from `GroupBatchSampler`, dealt to the ranks by accelerate."""
        args, dataset = self.args, self.train_dataset
        self._sampler = GroupBatchSampler(
            self.choice.shapes(dataset),
            batch_size=self._train_batch_size,
            max_tokens=args.max_tokens_per_batch,
            world=self.accelerator.num_processes,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            padded=self.choice.groups_per_row == 1,
        )
        return self._loader(dataset, self._sampler, persistent_workers=args.dataloader_persistent_workers)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Every group once over all ranks: accelerate would repeat some to fill the last round, and the loss would
        count them twice."""
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        if (
            not isinstance(dataset, Dataset) or "row" not in dataset.column_names
        ):  # given to `evaluate`, not to `__init__`
            dataset = self._prepared(dataset, self.args, "eval")
        sampler = GroupBatchSampler(
            [(1, 1)] * len(dataset), batch_size=self.args.eval_batch_size, world=self.accelerator.num_processes
        )
        return self._loader(dataset, sampler)

    def _loader(self, dataset: Dataset, sampler: GroupBatchSampler, persistent_workers: bool = False) -> DataLoader:
        args = self.args
        loader = DataLoader(
            WithEmptyGroups(dataset.select_columns([c for c in GROUP_COLUMNS if c in dataset.column_names])),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        even = self.accelerator.even_batches
        self.accelerator.even_batches = False  # the sampler has made the batches even without repeating groups
        try:
            return self.accelerator.prepare(loader)
        finally:
            self.accelerator.even_batches = even

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and the totals over them and over all ranks that normalise its
        loss."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        units = [self.objective.units(self._group_logps(batch)) for batch in samples]
        totals = {name: torch.stack([u[name] for u in units]).sum().to(device) for name in units[0]}
        return samples, {name: self.accelerator.reduce(total, reduction="sum") for name, total in totals.items()}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the weighted mean over all pairs of the optimizer step.

        Args:
            num_items_in_batch: totals from `get_batch_samples`; None (evaluation): the batch is the whole step.
        """
        mode = "train" if self.model.training else "eval"
        cache = FeatureCache() if self.frozen_vision else None
        reference = self._reference_scores(model, inputs, cache)
        wants_stats = self.args.log_token_stats or "stats" in self.objective.needs
        scores = self.scorer(model, inputs, frozen_vision=self.frozen_vision, cache=cache, return_stats=wants_stats)
        group_logps = self._group_logps(inputs, scores, reference)
        if "corrupted" in self.objective.needs:
            self._score_corrupted(model, inputs, group_logps)
        loss, metrics = self.objective(group_logps, num_items_in_batch, training=mode == "train")
        self.watch.add(loss, inputs["names"])
        self._logged[mode].add(inputs, metrics, group_logps, scores)
        if mode == "eval":
            self._logged[mode].add_loss(group_logps)
        if mode == "train" and num_items_in_batch is not None:
            loss = (
                loss * self.accelerator.num_processes
            )  # DDP, ZeRO and FSDP average gradients over ranks; the totals are sums over them
        return (loss, {"logps": scores.logps}) if return_outputs else loss

    def _reference_scores(self, model: Any, inputs: dict[str, Any], cache: FeatureCache | None) -> Scores | None:
        if self.reference is None:
            return None
        if self.reference_table is not None and self.model.training:  # evaluation data is not in the table
            return self.reference_table.lookup(inputs)
        shared = cache if self.reference.shares_vision else None
        with self.reference.active(model) as reference_model:
            return self.scorer(reference_model, inputs, frozen_vision=True, cache=shared)

    def _score_corrupted(self, model: Any, inputs: dict[str, Any], group_logps: GroupLogps) -> None:
        """mDPO's second pass: the same rows with corrupted images."""
        batch = {**inputs, "vision": inputs["corrupted_vision"]}
        cache = FeatureCache() if self.frozen_vision else None
        assert self.reference is not None
        with self.reference.active(model) as reference_model:
            shared = cache if self.reference.shares_vision else None
            group_logps.ref_corrupted_logps = self.scorer(
                reference_model, batch, frozen_vision=True, cache=shared
            ).logps
        group_logps.corrupted_logps = self.scorer(model, batch, frozen_vision=self.frozen_vision, cache=cache).logps

    def _group_logps(
        self, batch: dict[str, Any], scores: Scores | None = None, reference: Scores | None = None
    ) -> GroupLogps:
        return GroupLogps(
            lengths=batch["lengths"],
            pairs=batch["pairs"],
            pair_weights=batch["pair_weights"],
            group=batch["group"],
            ratings=batch.get("ratings"),
            aspect_ratings=batch.get("aspect_ratings"),
            aspects=self.data_collator.aspects,
            owner=batch["owner"],
            token_ids=batch["target"],
            logps=scores.logps if scores else None,
            per_token_logps=scores.per_token_logps if scores else None,
            log_sum_sq_probs=scores.stats.log_sum_sq_probs if scores and scores.stats else None,
            ref_logps=reference.logps if reference else None,
            ref_per_token_logps=reference.per_token_logps if reference else None,
        )

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Evaluation needs the loss and the metrics only."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last call, over all ranks, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        line = self._logged[mode].pop(partial(self.accelerator.reduce, reduction="sum"))
        if line.loss is not None:
            logs.update({key: line.loss for key in logs if key.startswith("eval") and key.endswith("_loss")})
        self._metrics[mode].update({name: [mean] for name, mean in line.means.items()})
        if mode == "train":
            self._total_train_tokens += line.tokens
            self._metrics[mode]["num_tokens"] = [float(self._total_train_tokens)]
            self.check_finite()
        super().log(logs, start_time)

    def plan_lines(self) -> list[str]:
        """What runs, and why: data, layout, attention, kernel, reference, vision."""
        return [*(line for name, report in self.reports.items() for line in report.lines(name)), *self.setup_lines()]

    def setup_lines(self) -> list[str]:
        """The plan without the data: lines of the form "name: what runs"."""
        kernel = f"silkie.logprob ({self.args.logprob_impl})" if self.args.use_fused_logprob else "plain logits"
        return [
            *self.choice.lines(),
            f"log-probs: {kernel}",
            f"reference: {self.reference.kind if self.reference else 'none (the losses need none)'}",
            f"vision tower: {'frozen, encoded once per step and shared' if self.frozen_vision else 'trained'}",
        ]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves adapter (or weights), processor and model card."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_card(output_dir or str(self.args.output_dir), self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes silkie's card in place of TRL's."""
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self)

    def run_state(self) -> dict[str, Any]:
        """State of the losses, and the tokens trained on."""
        # Tokens since the last line of the log are in no total yet
        pending = self._logged["train"].tokens(
            partial(self.accelerator.reduce, reduction="sum"), self.accelerator.device
        )
        return {"objective": self.objective.state_dict(), "train_tokens": self._total_train_tokens + pending}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Of a checkpoint that the run goes on from."""
        self.objective.load_state_dict(state.get("objective", {}))
        self._total_train_tokens = state.get("train_tokens", 0)

    def begin(self) -> None:
        """Runs once the model is wrapped, before the first step: the self-test, then the reference pass."""
        if self.frozen_vision:
            unhook_vision(causal_lm(self.model))  # transformers has just turned checkpointing on
        if self.args.self_test and self.choice.layout == "packed":
            self_test(self)
        if self.args.precompute_ref_log_probs and self.reference is not None and self.reference_table is None:
            self.reference_table = precompute_reference(self)


class _StepHooks(TrainerCallback):
    """The trainer's own hooks on transformers' training loop."""

    def __init__(self, trainer: SilkieDPOTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._sampler is not None:  # also after resuming, where wrappers hide the sampler from the loop
            self.trainer._sampler.set_epoch(int(state.epoch or 0))
            self.trainer._sampler.finished = (
                state.global_step >= state.max_steps
            )  # the loop looks only after one more step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self.trainer.accelerator
        self.trainer.objective.end_step(partial(accelerator.reduce, reduction="sum"), accelerator.device)


@contextmanager
def _without_precompute(args: SilkieDPOConfig) -> Iterator[None]:
    """TRL's `__init__` refuses to precompute reference log-probs with images; silkie does that by itself."""
    wanted, args.precompute_ref_log_probs = args.precompute_ref_log_probs, False
    try:
        yield
    finally:
        args.precompute_ref_log_probs = wanted


def _config_and_processor(model: Any, processor: Any, args: SilkieDPOConfig) -> tuple[Any, Any]:
    """The model's config, and its processor: the given one, or the one of its directory or hub name."""
    if isinstance(model, str):
        if looks_local(model) and not Path(model).is_dir():
            raise FileNotFoundError(
                f"{model} is not a directory. Expected a model directory, or a hub name like 'org/name'."
            )
        revision = (args.model_init_kwargs or {}).get("revision") if isinstance(args.model_init_kwargs, dict) else None
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
        name = model
    else:
        config, revision = causal_lm(model).config, None
        name = config._name_or_path
    if processor is None:
        if not name:
            raise ValueError(
                "The model was not loaded from a directory or hub name; pass its processor as `processing_class`."
            )
        processor = load_processor(
            name, trust_remote_code=args.trust_remote_code, **({"revision": revision} if revision else {})
        )
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(
            "processing_class must be the model's processor (image processor + tokenizer), not"
            f" {type(processor).__name__}."
        )
    return config, processor


def _refuse_collation(rows: Any) -> Any:
    """Stands in until the model is there: the collator needs its positions rule."""
    raise RuntimeError("the collator is not set up yet")
