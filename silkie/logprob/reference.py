"""The truth: log-probs from the full [N, V] logits by autograd. Any device, any dtype; float64 operands give float64
results."""

from __future__ import annotations

import torch
from torch import Tensor

from silkie.logprob.types import LogitTransform, LogprobStats, accumulate_dtype


def full_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Final logits [N, V] in the accumulation dtype; the product is rounded to the operands' dtype, as `nn.Linear`
    does."""
    raw = torch.nn.functional.linear(hidden, weight, bias)
    return transform(raw.to(accumulate_dtype(hidden.dtype)))


def reference_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignored: Tensor,
    transform: LogitTransform,
    want_stats: bool,
) -> tuple[Tensor, LogprobStats | None]:
    """`log_softmax(logits)[n, target[n]]`: hidden [N, D], weight [V, D], target [N] inside [0, V), ignored [N] bool ->
    [N].

    The one implementation that can be differentiated twice; it holds several [N, V] arrays.
    """
    hidden = hidden.masked_fill(ignored[:, None], 0.0)  # backward would multiply a NaN of theirs by 0
    logits = full_logits(hidden, weight, bias, transform)
    log_probs = logits.log_softmax(-1)
    logps = log_probs.gather(1, target[:, None]).squeeze(1).masked_fill(ignored, 0.0)
    return logps, (dense_stats(logits.detach(), log_probs.detach(), target, ignored) if want_stats else None)


def dense_stats(logits: Tensor, log_probs: Tensor, target: Tensor, ignored: Tensor) -> LogprobStats:
    """The statistics from full logits and log-probs [N, V]."""
    probs = log_probs.exp()
    plogp = torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs))
    return LogprobStats(
        mean_logit=logits.mean(-1).masked_fill(ignored, 0.0),
        entropy=plogp.sum(-1).neg().masked_fill(ignored, 0.0),
        is_top1=(logits.argmax(-1) == target) & ~ignored,
        log_sum_sq_probs=(2 * log_probs).logsumexp(-1).masked_fill(ignored, 0.0),
    )
