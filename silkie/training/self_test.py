"""Start-up proof that the packed layout computes what separate rows compute on this model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from silkie.batch.packing import Layout
from silkie.model.attention import Attention
from silkie.model.families import causal_lm
from silkie.model.forward import Scorer
from silkie.training.forward_context import ForwardContext
from silkie.training.non_finite import NonFiniteError

logger = logging.getLogger(__name__)

_TOLERANCE_FP32 = 2e-3
_TOLERANCE_HALF = 0.25

Collate = Callable[[Sequence[Mapping[str, Any]]], Any]


class LayoutMismatch(RuntimeError):
    """The packed layout does not compute what separate rows compute on this model."""


def self_test(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    scorer: Scorer,
    collators: Mapping[Layout, Collate],
    context: ForwardContext,
    half_precision: bool,
    tolerance: float | None,
) -> float:
    """Runs groups packed and as separate rows and compares the log-probs of their tokens. Every rank calls it.

    Args:
        model: the policy as the training loop calls it (wrapped by DDP, FSDP2 or DeepSpeed).
        rows: groups of the training data.
        scorer: the run's own forward in the packed layout.
        collators: the run's collator for each layout.
        context: device placement and autocast of the run.
        half_precision: whether the run autocasts to fp16 or bf16.
        tolerance: largest allowed difference of a token's log-prob, in nats; None: 2e-3, or 0.25 in half precision.

    Returns:
        The largest absolute difference, in nats.

    Raises:
        LayoutMismatch: it is above the tolerance.
        silkie.training.non_finite.NonFiniteError: the log-probs of separate rows are not finite.
    """
    separate = replace(scorer, attention=Attention(backend="sdpa", layout="rows"))
    training = model.training
    model.eval()
    try:
        packed_logps = _token_logps(model, rows, scorer, collators["packed"], context)
        row_logps = _token_logps(model, rows, separate, collators["rows"], context)
    finally:
        model.train(training)
    if not row_logps.isfinite().all():  # separate rows do not depend on packing, so packing is not to blame
        raise NonFiniteError(
            "Self-test: log-probs of the first group are not finite even in separate rows. The weights hold NaN or"
            " infinities, or overflow in this dtype: look at the checkpoint, or train in fp32 or bf16."
        )
    difference = float((packed_logps - row_logps).abs().max())
    if tolerance is None:
        tolerance = _TOLERANCE_HALF if half_precision or _runs_in_half(causal_lm(model)) else _TOLERANCE_FP32
    if not difference <= tolerance:
        raise LayoutMismatch(
            f"Self-test failed: packed and separate log-probs of the first group differ by up to {difference:.3g} per"
            f" token (tolerance {tolerance:g}). Packing is not exact on this model or attention backend. Set"
            " layout='rows', or attention_backend='sdpa' if another backend is in use."
        )
    logger.info("self-test: packed equals separate within %.2g per token (tolerance %g)", difference, tolerance)
    return difference


def _token_logps(
    model: Any, rows: Sequence[Mapping[str, Any]], scorer: Scorer, collate: Collate, context: ForwardContext
) -> Tensor:
    """fp32 [N] log-probs of the response tokens of `rows`."""
    batch = context.prepare(collate(rows))
    with torch.no_grad(), context.autocast():
        return scorer(model, batch, frozen_vision=True).per_token_logps.float()


def _runs_in_half(base: Any) -> bool:
    """Whether products lose as much as in half precision: half-precision weights, or 8-bit ones, which quantise
    activations, and which columns they spare depends on all rows of the input."""
    half = next(base.parameters()).dtype in (torch.bfloat16, torch.float16)
    return half or getattr(base, "is_loaded_in_8bit", False)
