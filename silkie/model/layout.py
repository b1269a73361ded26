"""Which layout and attention backend run, why, and the proof at start-up that the packed layout computes the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig

from silkie.batch.packing import Layout
from silkie.model import recurrent
from silkie.model.attention import IMPLEMENTATIONS, ONE_GROUP_PER_ROW, Attention, Backend, why_not_available
from silkie.model.attention.varlen import kernel_name
from silkie.model.families import causal_lm, why_not_packable
from silkie.training.guards import NonFiniteError

logger = logging.getLogger(__name__)

_TOLERANCE_FP32 = 2e-3
_TOLERANCE_HALF = 0.25


class LayoutMismatch(RuntimeError):
    """The packed layout does not compute what separate rows compute on this model."""


@dataclass(slots=True, frozen=True, kw_only=True)
class LayoutChoice:
    """The layout of a run.

    Attributes:
        layout, reason: what runs and why.
        backend, backend_reason: attention of the language model in the packed layout.
        groups_per_row: groups that share a row; None: the whole micro-batch.
    """

    layout: Layout
    reason: str
    backend: Backend
    backend_reason: str
    groups_per_row: int | None

    def apply(self, base: Any) -> None:
        """Sets the language model's attention implementation (the vision tower keeps its own), and has its recurrent
        mixers fork.

        Raises:
            ValueError: not all of the model's recurrent layers can fork.
        """
        if self.layout == "packed":
            forking, expected = recurrent.install(base), recurrent.count_recurrent(base.config)
            if forking != expected:
                raise ValueError(
                    f"{forking} recurrent mixers were found in a model whose config names {expected} recurrent layers:"
                    " set layout='rows'."
                )
        implementation = IMPLEMENTATIONS[self.backend]
        if self.layout == "packed" and base.config.get_text_config()._attn_implementation != implementation:
            base.set_attn_implementation({"text_config": implementation})

    def shapes(self, dataset: Dataset) -> list[tuple[int, int]]:
        """(rows, tokens of its longest row) of each group in a forward pass."""
        lengths = zip(dataset["prompt_length"], dataset["response_lengths"], strict=True)
        if self.layout == "packed":
            return [(1, p + sum(r)) for p, r in lengths]
        return [(len(r), p + max(r)) for p, r in lengths]

    def lines(self) -> list[str]:
        """For the log."""
        out = [f"layout: {self.layout} ({self.reason})"]
        if self.layout == "packed":
            out.append(f"attention: {self.backend} ({self.backend_reason})")
        return out


def choose_layout(config: PretrainedConfig, args: Any) -> LayoutChoice:
    """The layout for a model.

    Raises:
        ValueError: `layout="packed"` is asked for, and packing is wrong for the model.
    """
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    obstacle = why_not_packable(config, args.device, dtype)
    if args.layout == "packed" and obstacle:
        raise ValueError(f"layout='packed' is not exact here: {obstacle}. Use layout='rows' or 'auto'.")
    if args.layout == "rows" or obstacle:
        reason = obstacle if args.layout != "rows" else "asked for"
        return LayoutChoice(
            layout="rows", reason=reason or "", backend="sdpa", backend_reason="the model's own", groups_per_row=1
        )
    backend, why = _choose_backend(config, args)
    reason = "asked for" if args.layout == "packed" else f"{config.model_type} has only full and sliding attention"
    if forks := recurrent.count_recurrent(config):
        reason = f"{forks} recurrent layers start each response from the state of its prompt"
    return LayoutChoice(
        layout="packed",
        reason=reason,
        backend=backend,
        backend_reason=why,
        groups_per_row=1 if backend in ONE_GROUP_PER_ROW else None,
    )


def _choose_backend(config: PretrainedConfig, args: Any) -> tuple[Backend, str]:
    """Backend and reason.

    Raises:
        ValueError: the backend asked for cannot run here.
    """
    wanted = args.attention_backend
    device = torch.device(args.device)
    if wanted == "auto":
        if device.type == "cpu" and why_not_available("segments", config, device) is None:
            return "segments", "sdpa without the scores that nothing sees, the fastest on a CPU; one group per row"
        return "sdpa", "exact on every device; one group per row"
    if obstacle := why_not_available(wanted, config, device):
        raise ValueError(f"attention_backend={wanted!r} cannot run here: {obstacle}.")
    return wanted, f"asked for; {kernel_name()}" if wanted == "varlen" else "asked for"


def self_test(trainer: Any) -> float:
    """Runs the first group packed and as separate rows, on every rank, and compares the log-probs of its tokens.

    Returns:
        The largest absolute difference.

    Raises:
        LayoutMismatch: it is above the tolerance.
        silkie.training.guards.NonFiniteError: the log-probs of separate rows are not finite.
    """
    rows: Sequence[dict[str, Any]] = [trainer.train_dataset[0]]
    base = causal_lm(trainer.model)
    model = trainer.model_wrapped if trainer.model_wrapped is not None else trainer.model
    values = []
    training = model.training
    model.eval()
    try:
        for layout in ("packed", "rows"):
            batch = trainer._prepare_inputs(trainer.collator_for(layout)(rows))
            scorer = (
                trainer.scorer
                if layout == "packed"
                else replace(trainer.scorer, attention=Attention(backend="sdpa", layout="rows"))
            )
            with torch.no_grad(), trainer.compute_loss_context_manager():
                values.append(scorer(model, batch, frozen_vision=True).per_token_logps.float())
    finally:
        model.train(training)
    if not values[1].isfinite().all():  # in separate rows: not for packing to blame
        raise NonFiniteError(
            "Self-test: log-probs of the first group are not finite even in separate rows. The weights hold NaN or"
            " infinities, or overflow in this dtype: look at the checkpoint, or train in fp32 or bf16."
        )
    difference = float((values[0] - values[1]).abs().max())
    half = trainer.args.bf16 or trainer.args.fp16 or next(base.parameters()).dtype in (torch.bfloat16, torch.float16)
    # 8-bit products quantise activations, and which columns they spare depends on all rows of the input
    half = half or getattr(base, "is_loaded_in_8bit", False)
    tolerance = (
        trainer.args.self_test_tolerance
        if trainer.args.self_test_tolerance is not None
        else (_TOLERANCE_HALF if half else _TOLERANCE_FP32)
    )
    if not difference <= tolerance:
        raise LayoutMismatch(
            f"Self-test failed: packed and separate log-probs of the first group differ by up to {difference:.3g} per"
            f" token (tolerance {tolerance:g}). Packing is not exact on this model or attention backend. Set"
            " layout='rows', or attention_backend='sdpa' if another backend is in use."
        )
    logger.info("self-test: packed equals separate within %.2g per token (tolerance %g)", difference, tolerance)
    return difference
