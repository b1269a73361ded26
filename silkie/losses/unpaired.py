"""Losses of single responses that are labelled desirable or undesirable: `fn(logps [U], ref_logps [U], desirable [U],
*, ...) -> [U]`. `r = logps - ref_logps` is the log-ratio (nats) and `s` the logistic function. Values and gradients are
those of TRL 1.16's `KTOTrainer`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .spec import BETA, loss

WEIGHTS = {"desirable_weight": "desirable_weight", "undesirable_weight": "undesirable_weight"}


def _weighed(losses: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    return losses * torch.where(desirable, desirable_weight, undesirable_weight).to(losses.dtype)


@loss("labelled", {**BETA, **WEIGHTS}, unit="example", kl=True)
def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO: w_d (1 - s(beta (r - z))) for a desirable response, w_u (1 - s(beta (z - r))) for an undesirable one.
    Ethayarajh et al., arXiv 2402.01306, eq. 8.

    Args:
        kl: the paper's z, an estimate of KL(policy || reference), without gradient: see `kl_estimate`.
    """
    gaps = beta * (logps - ref_logps - kl)
    return _weighed(torch.sigmoid(torch.where(desirable, -gaps, gaps)), desirable, desirable_weight, undesirable_weight)


@loss("labelled", {**BETA, **WEIGHTS}, unit="example")
def apo_zero_unpaired(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """The two terms of `apo_zero`, each on responses of its own: w_d (1 - s(beta r)) for a desirable response, w_u
    s(beta r) for an undesirable one. D'Oosterlinck et al., arXiv 2408.06266, eq. 7."""
    return kto(
        logps,
        ref_logps,
        desirable,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def kl_estimate(
    logps: Tensor, ref_logps: Tensor, weights: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """0-d, without gradient: max(0, mean of logps - ref_logps) over responses [M] that belong to other prompts than
    those they are scored under. Ethayarajh et al., arXiv 2402.01306, section 4.1.

    Args:
        weights: [M] weights of the mean.
        reduce: sums a tensor over all ranks (every rank must call). None is a single rank.
    """
    ratios, weights = (logps - ref_logps).detach(), weights.to(logps.dtype)
    sums = torch.stack([(weights * ratios).sum(), weights.sum()])
    total, count = (sums if reduce is None else reduce(sums)).unbind()
    return (total / torch.where(count > 0, count, 1.0)).clamp(min=0)


def balanced_weights(desirable: int, undesirable: int, undesirable_weight: float) -> tuple[float, float]:
    """Smallest and largest `desirable_weight` that the paper recommends for unequal numbers of labels: the ratio of
    desirable_weight * desirable to undesirable_weight * undesirable is within [1, 4/3] (section 4.2, eq. 9)."""
    equal = undesirable_weight * undesirable / max(desirable, 1)
    return equal, equal * 4 / 3
