"""Builds the parts of a run from its options (encoder, collator, passes) and checks the model that TRL loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from silkie.batch.collator import GroupCollator, ImageCorruption, blank_vision, image_joins
from silkie.batch.companies import Company, describe_companies, find_companies
from silkie.batch.encoding import GroupEncoder
from silkie.batch.labels import Labels
from silkie.batch.preparation_report import PreparationReport
from silkie.config import SilkieDPOConfig
from silkie.losses import Objective, balanced_weights
from silkie.model.attention import Attention
from silkie.model.families import causal_lm, check_merges_images, keep_used_conversions
from silkie.model.forward import LogpsForward
from silkie.model.layout import LayoutChoice
from silkie.model.positions import PromptPositions
from silkie.model.vision import vision_is_frozen
from silkie.training import guards
from silkie.training.passes import Passes
from silkie.training.reference import Reference, match_dtypes

logger = logging.getLogger(__name__)

_WORTHWHILE = 0.05  # of the tokens of a pass, which sharing must save where silkie decides


def build_encoder(processor: Any, args: SilkieDPOConfig) -> GroupEncoder:
    """The encoder of a run's groups."""
    return GroupEncoder(
        processor,
        max_length=args.max_length,
        max_response_length=args.max_response_length,
        response_end=args.response_end,
        special_tokens=args.special_tokens,
        chat_template_kwargs=args.template_variables,
    )


def labels_of(args: SilkieDPOConfig, objective: Objective) -> Labels | None:
    """How responses are labelled for losses that take no pairs; None for those that take pairs."""
    if not objective.unpaired:
        return None
    return Labels(threshold=args.label_threshold, mismatched="kl" in objective.needs)


def tell_of_labels(report: PreparationReport, args: SilkieDPOConfig) -> None:
    """Logs what TRL's KTO computes otherwise, and TRL's warning about unequal numbers of labels."""
    if "kto" in args.loss_type and report.responses > report.groups:
        logger.info(
            "train: prompts with several answers: the KL term of kto scores all of them under another prompt of the"
            " micro-batch; TRL takes the answer of the row before, whose prompt may be the same"
        )
    if report.desirable == report.undesirable:
        return
    least, most = balanced_weights(report.desirable, report.undesirable, args.undesirable_weight)
    if not least <= args.desirable_weight <= most:
        logger.warning(
            "train: %d desirable and %d undesirable responses: KTO's authors recommend desirable_weight from %.2f to"
            " %.2f (with undesirable_weight=%g), and it is %g",
            report.desirable,
            report.undesirable,
            least,
            most,
            args.undesirable_weight,
            args.desirable_weight,
        )


def check_loaded_model(model: Any, args: SilkieDPOConfig, accelerator: Accelerator, *, deepspeed: bool) -> None:
    """What can only be checked, or kept right, once TRL has loaded and wrapped the model.

    Raises:
        silkie.training.guards.LaunchError: launcher, optimizer or dtypes cannot work together.
        ValueError: the model does not merge images as silkie needs it.
    """
    guards.check_process_count(args, accelerator)
    guards.check_optimizer(args, accelerator)
    guards.check_something_trains(model)
    match_dtypes(model)
    guards.check_adapter_dtypes(model, deepspeed)
    guards.keep_trainable_4bit(model)
    keep_used_conversions(model)
    check_merges_images(model)


def build_collator(
    model: Any,
    encoder: GroupEncoder,
    tokenizer: Any,
    choice: LayoutChoice,
    args: SilkieDPOConfig,
    *,
    aspects: tuple[str, ...],
    corrupted: bool,
    dummy_image: bool,
    labels: Labels | None,
    router_aux: bool,
) -> GroupCollator:
    """The collator of a run.

    Args:
        aspects: rating aspects of the training data.
        corrupted: whether a loss scores corrupted images.
        labels: see `labels_of`.
        dummy_image: whether a micro-batch without images must run the vision tower (`guards.needs_dummy_image`).
        router_aux: whether the load balancing loss of the routers is trained on.
    """
    corruption = ImageCorruption(kind=args.corruption, strength=args.corruption_strength, seed=args.seed)
    return GroupCollator(
        encoder=encoder,
        positions=PromptPositions(model),
        layout=choice.layout,
        pad_id=tokenizer.pad_token_id,  # `startup.set_pad_token` has set it
        image_token_id=getattr(causal_lm(model).config, "image_token_id", None),
        groups_per_row=choice.groups_per_row,
        share_prefix=choice.shares_prefix,
        aspects=aspects,
        corruption=corruption if corrupted else None,
        joins=image_joins(encoder),
        labels=labels,
        dummy_vision=blank_vision(encoder) if dummy_image else None,
        pad_to_multiple_of=args.pad_to_multiple_of,  # type: ignore[arg-type]  # a number or None once TRL has read it
        count_uses=router_aux and choice.layout == "packed",
        image_keys=args.vision_cache != "off" and vision_is_frozen(model),
    )


def share_prefixes(
    choice: LayoutChoice, dataset: Dataset, encoder: GroupEncoder, args: SilkieDPOConfig
) -> tuple[LayoutChoice, list[Company]]:
    """Whether the groups of a prepared training set share the beginnings of their prompts, and which come together.

    Raises:
        ValueError: that is asked for, and each response has a row of its own.
    """
    if args.share_prefix == "off":
        return choice, []
    if choice.layout == "rows":
        if args.share_prefix == "image":
            raise ValueError(f"share_prefix='image' needs the packed layout: {choice.reason}. Set share_prefix='off'.")
        return choice, []
    room = args.per_device_train_batch_size if args.max_tokens_per_batch is None else args.share_prefix_groups
    lengths = [tokens for _, tokens in choice.shapes(dataset)]
    most = min(room, args.share_prefix_groups)
    companies = find_companies(dataset, encoder, lengths, most=most, max_tokens=args.max_tokens_per_batch)
    found = describe_companies(companies, lengths)
    if not companies and args.share_prefix == "image":
        logger.warning("share_prefix='image' shares nothing: %s", found)
    if not companies or (args.share_prefix == "auto" and sum(c.saved for c in companies) < _WORTHWHILE * sum(lengths)):
        return replace(choice, sharing=f"each prompt runs by itself; {found}"), []
    return replace(choice, shares_prefix=True, sharing=f"{found}; at most {most} groups come together"), companies


def build_passes(
    objective: Objective,
    choice: LayoutChoice,
    reference: Reference | None,
    args: SilkieDPOConfig,
    *,
    frozen_vision: bool,
    aspects: tuple[str, ...],
    router_aux: bool,
    reduce: Callable[[Tensor], Tensor],
) -> Passes:
    """The forward passes that the losses of a run need."""
    return Passes(
        forward=LogpsForward(
            attention=Attention(backend=choice.backend, layout=choice.layout, calls=choice.calls),
            fused=args.use_fused_logprob,
            impl=args.logprob_impl,
        ),
        reference=reference,
        frozen_vision=frozen_vision,
        corrupted="corrupted" in objective.needs,
        kl="kl" in objective.needs,
        reduce=reduce,
        token_stats=args.log_token_stats or "stats" in objective.needs,
        router_aux=router_aux,
        aspects=aspects,
    )
