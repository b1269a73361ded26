"""What a run does before its first step: the self-test, the choice of the layout, and the reference pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from trl import DPOTrainer

from silkie.batch.companies import Company
from silkie.batch.encoding import GroupEncoder
from silkie.batch.labels import Labels
from silkie.config import SilkieDPOConfig
from silkie.losses import Objective
from silkie.model.families import causal_lm
from silkie.model.layout import LayoutChoice, rows_choice
from silkie.model.vision import unhook_vision
from silkie.training.features import features_on_disk
from silkie.training.forward_context import ForwardContext
from silkie.training.passes import Passes
from silkie.training.reference import Reference
from silkie.training.reference_cache import ReferencePass
from silkie.training.self_test import LayoutMismatch, SelfTest, company_to_test, groups_to_test


class BeforeTraining(DPOTrainer):
    """The part of `SilkieDPOTrainer` that proves its path and prepares its reference."""

    args: SilkieDPOConfig
    model: Any
    train_dataset: Dataset
    encoder: GroupEncoder
    labels: Labels | None
    data_collator: Any
    choice: LayoutChoice
    objective: Objective
    passes: Passes
    reference: Reference | None
    frozen_vision: bool
    _companies: list[Company]
    _tested: bool
    _reference_hash: str

    def _set_up_passes(self) -> None:
        raise NotImplementedError

    @property
    def companies(self) -> list[Company]:
        """Training groups that come together to share the beginning of their prompts."""
        return self._companies if self.choice.shares_prefix else []

    @property
    def _context(self) -> ForwardContext:
        return ForwardContext(prepare=self._prepare_inputs, autocast=self.compute_loss_context_manager)

    def _self_test(self, policy: Any) -> None:
        """Raises what `SelfTest` raises."""
        test = SelfTest(
            encoder=self.encoder,
            collate=self.data_collator,
            forward=self.passes.forward,
            context=self._context,
            half_precision=self.args.bf16 or self.args.fp16,
            labels=self.labels,
            tolerance=self.args.self_test_tolerance,
            features=self.passes.features,
            agree=lambda x: float(self.accelerator.gather(torch.tensor([x], device=self.accelerator.device)).max()),
        )
        test(policy, groups_to_test(self.train_dataset, lengths=self.choice.calls.roots + 1))
        if self.companies:
            test(policy, company_to_test(self.train_dataset, self.companies))

    def _settle_layout(self) -> bool:
        """Where the layout is left to silkie, takes rows if the model does not compute the same in the packed one.
        Returns whether the layout has passed the self-test; sharded weights can only be run once they are wrapped."""
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        undecided = self.args.layout == "auto" or (self.choice.shares_prefix and self.args.share_prefix == "auto")
        undecided = undecided or self.choice.probed
        if not self.args.self_test or not undecided or self.choice.layout == "rows" or sharded:
            return False
        try:
            self._self_test(self.model)
        except LayoutMismatch as error:
            if self.choice.probed:
                self.choice = self.choice.on_sdpa(f"{self.choice.backend} was faster, but: {error}")
                for loaded in (self.model, self.ref_model):
                    if loaded is not None:
                        self.choice.apply(causal_lm(loaded))
            elif not self.choice.shares_prefix:
                self.choice = rows_choice(str(error))
            elif self.args.share_prefix == "image":
                raise
            else:
                self.choice = replace(self.choice, shares_prefix=False, sharing=f"each prompt runs by itself ({error})")
            self._set_up_passes()
            return self._settle_layout()
        return True

    def _set_checkpointing(self) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        """Runs once the model is wrapped, before the first step: the self-test, then the reference pass."""
        if self.frozen_vision:
            unhook_vision(causal_lm(self.model))  # transformers has just turned checkpointing on
        if self.args.gradient_checkpointing == "auto":
            self._set_checkpointing()
        policy = self.model_wrapped if self.model_wrapped is not None else self.model
        if self.passes.vision_cache is None:
            self.passes.vision_cache = features_on_disk(
                self.model, self.train_dataset, self.data_collator, self._context, self.args
            )
        # Once more where the loop has wrapped the model: DDP, ZeRO and FSDP are paths of their own. With features from
        # disk, too.
        tested = self._tested and policy is self.model and self.passes.vision_cache is None
        if self.args.self_test and not tested:
            self._self_test(policy)
        if self.args.precompute_ref_log_probs and self.reference is not None and self.passes.table is None:
            reference_pass = ReferencePass(
                reference=self.reference,
                weights_hash=self._reference_hash,
                forward=self.passes.forward,
                collate=self.data_collator,
                context=self._context,
                choice=self.choice,
                companies=self.companies,
                accelerator=self.accelerator,
                args=self.args,
                tokens="reference_tokens" in self.objective.needs,
                features=self.passes.features,
            )
            self.passes.table = reference_pass.run(policy, self.train_dataset)
