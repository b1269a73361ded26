"""`SilkieDPOTrainer`: TRL's DPO trainer on preference groups. Wiring only; the parts are in the modules it imports.

Of TRL's trainer it uses `__init__`, `compute_loss`, `_prepare_dataset`, `log`, `_metrics` and `_total_train_tokens`; of
transformers' `_prepare_inputs`, `_train_batch_size` and `model_wrapped` (tests/unit/test_private_pieces.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalPrediction
from trl import DPOConfig, DPOTrainer

from silkie.batch.batch import Batch
from silkie.batch.companies import Company
from silkie.batch.loaders import GroupLoaders, open_stream, prepared_groups, read_stream
from silkie.batch.preparation_report import PreparationReport
from silkie.batch.streaming import StreamedBatches
from silkie.config import SilkieDPOConfig
from silkie.data.schema import aspects_of
from silkie.losses import GroupLogps, build_objective
from silkie.model.adapters import ENOUGH, coverage, names_no_targets
from silkie.model.checkpointing import checkpoint_first
from silkie.model.dropout import disable_dropout
from silkie.model.families import causal_lm
from silkie.model.forward import SequenceLogps
from silkie.model.layout import LayoutChoice, choose_layout
from silkie.model.processor import ask_for_token_types
from silkie.model.vision import freeze_vision, vision_is_frozen
from silkie.training import guards, recurrent_calls, startup
from silkie.training.before_training import BeforeTraining
from silkie.training.hooks import StepHooks
from silkie.training.metrics import RunMetrics
from silkie.training.parts import (
    build_collator,
    build_encoder,
    build_passes,
    check_loaded_model,
    labels_of,
    share_prefixes,
    tell_of_labels,
)
from silkie.training.passes import preferences_of
from silkie.training.record import RunRecord
from silkie.training.reference import Reference
from silkie.training.resumable import RecoverableTrainer
from silkie.training.trl_surface import TrlSurface

if TYPE_CHECKING:
    from silkie.plan.checkpointing import Checkpointing

logger = logging.getLogger(__name__)

_MICRO_BATCHES = "micro_batches"  # among the totals of an optimizer step: micro-batches of all ranks


class SilkieDPOTrainer(BeforeTraining, RunRecord, TrlSurface, RecoverableTrainer, DPOTrainer):
    """Preference-trains a vision-language model on preference groups.

    Args:
        model: model, PeftModel, local directory or hub name.
        ref_model: reference model; None with LoRA: the same weights with the adapter off (for a pre-loaded adapter:
            with its frozen initial copy).
        args: `SilkieDPOConfig`, or TRL's `DPOConfig`, which is taken over.
        train_dataset, eval_dataset: preference groups from `silkie.data.load_preferences`, or TRL pair rows (prompt /
            chosen / rejected / images), which are regrouped so that pairs over the same prompt and images share their
            forward pass. `eval_dataset` may be a dict of them. A stream is read in windows (`stream_window`), one of
            evaluation data as a whole.
        processing_class: the model's processor, or the tokenizer of a language model; None loads it from the model's
            name.
        peft_config: LoRA config; without `target_modules` it adapts the language model's attention and MLP
            projections.
        callbacks, optimizers, compute_metrics, quantization_config: as in TRL.
        data_collator: None, or one of TRL's own; arguments come in TRL's order.

    Raises:
        TypeError: `args` is no config of silkie or TRL, or the data is not a `Dataset`.
        ValueError, silkie.data.DataError: options or data that cannot work, before any compute is spent.
    """

    _tag_names = ["silkie", "trl", "dpo"]  # noqa: RUF012  (transformers reads it as a class attribute)
    eval_dataset: Any
    data_collator: Any
    processing_class: Any
    loss_is_scaled_for_ga = True  # compute_loss divides by the totals of the whole optimizer step

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = startup.settle_arguments(args, model, data_collator, train_dataset)
        self._card: dict[str, Any] = {}
        self.checkpointing: Checkpointing | None = None  # what gradient_checkpointing="auto" chose
        guards.check_launch(args)
        config, processing_class = startup.config_and_processor(model, processing_class, args)
        default_targets = peft_config is not None and names_no_targets(peft_config)
        peft_config = startup.choose_trained_parts(model, peft_config, config, args)
        self.encoder = build_encoder(processing_class, args)
        self.objective = build_objective(args.loss_type, args.loss_weights, args.loss_options)
        self.labels = labels_of(args, self.objective)
        self._companies: list[Company] = []
        self.reports: dict[str, PreparationReport] = {}
        self.stream: StreamedBatches | None = None
        train_dataset = self._prepared(train_dataset, args, "train")
        tell_of_labels(self.reports["train"], args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepared(d, args, name) for name, d in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._prepared(eval_dataset, args, "eval")

        self.choice: LayoutChoice = choose_layout(config, args, startup.a_micro_batch(train_dataset, args))
        with args.main_process_first(desc="looking for shared prefixes"):
            if self.stream is None:
                self.choice, self._companies = share_prefixes(self.choice, train_dataset, self.encoder, args)
        self.objective.check_aspects(aspects_of(train_dataset.features))
        if ref_model is None and self.objective.needs_reference:
            startup.check_own_reference(model, peft_config, config)
        with startup.trl_init(args, model):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=startup.refuse_collation,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if args.disable_dropout:
            disable_dropout(self.model)
        if peft_config is None and args.freeze_vision and isinstance(model, str):
            freeze_vision(self.model)
        self.aux_loss_enabled = self.aux_loss_enabled and guards.has_router_loss(self.model, args)
        self.frozen_vision = vision_is_frozen(self.model)
        check_loaded_model(self.model, args, self.accelerator, deepspeed=self.is_deepspeed_enabled)
        guards.check_adapter_on_vision(self.model)
        guards.warn_of_untrained_vision(self.model, args, default_targets=default_targets)
        self._coverage = coverage(self.model) if isinstance(self.model, PeftModel) else None
        if default_targets and self._coverage and self._coverage.share < ENOUGH:
            logger.warning("the default LoRA adapter is on %s", self._coverage)
        # Both: the reference runs the same rows under the same masks, or its log-probs would be those of other
        # positions.
        for loaded in (self.model, self.ref_model):
            if loaded is not None:
                self.choice.apply(causal_lm(loaded))
        self._set_up_passes()
        self._tested = self._settle_layout()
        self._set_up_hooks()
        for line in self.setup_lines():  # the data's lines were logged when it was prepared
            logger.info(line)
        if args.layout == "auto" and self.choice.layout == "rows":
            logger.warning("layout='auto' runs one row per response, which costs more: %s", self.choice.reason)

    def _set_up_passes(self) -> None:
        args, aspects = self.args, aspects_of(self.train_dataset.features)
        ask_for_token_types(self.processing_class, type(causal_lm(self.model)).forward)
        self.data_collator = build_collator(
            self.model,
            self.encoder,
            self.encoder.tokenizer,
            self.choice,
            args,
            aspects=aspects,
            corrupted="corrupted" in self.objective.needs,
            labels=self.labels,
            router_aux=self.aux_loss_enabled,
            dummy_image=guards.needs_dummy_image(self.accelerator, self.frozen_vision),
        )
        self.loaders = GroupLoaders(
            collate=self.data_collator, accelerator=self.accelerator, args=args, max_tokens=args.max_tokens_per_batch
        )
        self.choice = recurrent_calls.settle(self.choice, self.model.config, args, self.train_dataset, self.companies)
        if not self.objective.needs_reference and self.ref_model is not None:
            self.ref_model = None  # TRL loads one for full fine-tuning whatever the loss; no loss here reads it
            self.accelerator.free_memory()
        self.reference = Reference(self.model, self.ref_model) if self.objective.needs_reference else None
        # Before training: a resumed full fine-tuning run loads its trained weights over these.
        self._reference_hash = self.reference.weights_hash() if self.reference and args.precompute_ref_log_probs else ""
        self._sum = partial(self.accelerator.reduce, reduction="sum")
        self.passes = build_passes(
            self.objective,
            self.choice,
            self.reference,
            args,
            frozen_vision=self.frozen_vision,
            aspects=aspects,
            reduce=self._sum,
            router_aux=self.aux_loss_enabled,  # TRL's rule: its option, or None for the model's own coefficient
        )

    def _set_up_hooks(self) -> None:
        args = self.args
        stats = args.log_token_stats
        self._logged = {mode: RunMetrics(self.objective, token_stats=stats) for mode in ("train", "eval")}
        self.add_callback(
            StepHooks(
                begin=self.begin,
                sampler=lambda: self.loaders.train_sampler,
                end_step=lambda: self.objective.end_step(self._sum, self.accelerator.device),
            )
        )
        if args.eval_benchmarks or args.log_answers:
            from silkie.evaluation.while_training import callbacks  # training needs no evaluation package otherwise

            for callback in callbacks(self, args, self.eval_dataset):
                self.add_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        guards.keep_fp32_outputs(self.accelerator)

    def _prepared(self, dataset: Any, args: SilkieDPOConfig, name: str) -> Dataset:
        with args.main_process_first(desc=f"preparing the {name} data"):
            if isinstance(dataset, IterableDataset):
                if name == "train":
                    self.stream = open_stream(dataset, self.encoder, args, self.labels)
                    groups, self.reports[name] = self.stream.first_window()
                    return groups
                dataset = read_stream(dataset)
            num_proc = args.dataset_num_proc
            groups, self.reports[name] = prepared_groups(
                dataset, self.encoder, args, name, labels=self.labels, num_proc=num_proc
            )
        return groups

    @property
    def groups_per_batch(self) -> int:
        """Groups of a micro-batch. transformers lowers its number under `auto_find_batch_size`, which is private."""
        return self._train_batch_size

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the training groups."""
        mismatched, padded = "kl" in self.objective.needs, self.choice.groups_per_row == 1
        shapes = partial(self.choice.shapes, mismatched=mismatched)
        if self.stream is not None:
            return self.loaders.train_stream(
                self.stream, shapes, batch_size=self.groups_per_batch, padded=padded, mismatched=mismatched
            )
        return self.loaders.train(
            self.train_dataset,
            shapes(self.train_dataset),
            batch_size=self.groups_per_batch,
            padded=padded,
            shuffle=self.args.train_sampling_strategy == "random",
            companies=self.companies,
            mismatched=mismatched,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of an optimizer step, and the totals over them and over all ranks that normalise its
        loss."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        self._window = samples[-1].get("window")
        units = [self.objective.units(preferences_of(batch, self.passes.aspects)) for batch in samples]
        totals = {name: torch.stack([u[name] for u in units]).sum().to(device) for name in units[0]}
        if self.aux_loss_enabled:
            totals[_MICRO_BATCHES] = torch.tensor(float(len(samples)), device=device)
        return samples, {name: self._sum(total) for name, total in totals.items()}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the weighted mean over all pairs of the optimizer step.

        Args:
            inputs: a `silkie.batch.batch.Batch`.
            num_items_in_batch: totals from `get_batch_samples`; None (evaluation): the batch is the whole step.
        """
        batch: Batch = inputs
        training = self.model.training
        sequence_logps, group_logps = self._run_passes(model, batch, training=training)
        loss, metrics = self.objective(group_logps, num_items_in_batch, training=training)
        if sequence_logps.aux_loss is not None and training:  # a mean over the micro-batches of the step, as in TRL
            share = 1.0 if num_items_in_batch is None else 1.0 / num_items_in_batch[_MICRO_BATCHES]
            loss = loss + self.router_aux_loss_coef * share * sequence_logps.aux_loss
        self.watch.add(loss, batch["names"])
        logged = self._logged["train" if training else "eval"]
        logged.add(batch, metrics, group_logps, sequence_logps)
        if not training:
            logged.add_loss(group_logps)
        elif num_items_in_batch is not None:
            # DDP, ZeRO and FSDP average gradients over ranks; the totals are sums over them
            loss = loss * self.accelerator.num_processes
        return (loss, {"logps": sequence_logps.logps}) if return_outputs else loss

    def _run_passes(self, model: Any, batch: Batch, *, training: bool) -> tuple[SequenceLogps, GroupLogps]:
        """The forward passes of a micro-batch; in training with more layers checkpointed where the device runs out of
        memory. Nothing is accumulated or logged before they are through, so running them again is exact."""
        while True:
            try:
                return self.passes.run(model, batch, use_table=training)
            except torch.OutOfMemoryError:
                if not training or self.checkpointing is None or not self.checkpointing.add(self.model):
                    raise
            torch.cuda.empty_cache()  # once the failed pass is released

    def _set_checkpointing(self) -> None:
        from silkie.plan.checkpointing import choose_checkpointing

        guards.keep_passes_alone(self.model_wrapped, self.args)
        self.checkpointing = choose_checkpointing(self)
        checkpoint_first(self.model, self.checkpointing.layers)
        logger.info("%s", self.checkpointing)
