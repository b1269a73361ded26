"""Pairwise losses against a reference policy, one pure function each.

Every function is `fn(chosen_logps [P], rejected_logps [P], ref_chosen_logps [P], ref_rejected_logps [P], *, beta, ...)
-> [P]`, where a log-probability is the sum over the response's tokens (nats) and P counts pairs. In the equations `r_w
= chosen_logps - ref_chosen_logps` and `r_l = rejected_logps - ref_rejected_logps` are the log-ratios, `h = r_w - r_l`,
and `s` is the logistic function. Names, values and gradients are those of TRL 1.16's `DPOTrainer`, except where a
docstring says otherwise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .spec import BETA, SMOOTHED, loss


def logratio_margin(
    chosen_logps: Tensor, rejected_logps: Tensor, ref_chosen_logps: Tensor, ref_rejected_logps: Tensor
) -> Tensor:
    """h = (chosen - ref_chosen) - (rejected - ref_rejected), [P] in nats."""
    return (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), elementwise; e is the probability that a label is flipped."""
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0.0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


@loss("reference", SMOOTHED, difference=True, offset=True)
def sigmoid(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO: -log s(beta h). Rafailov et al., arXiv 2305.18290, eq. 7.

    With `label_smoothing` e > 0 it is conservative DPO, -(1 - e) log s(beta h) - e log s(-beta h) (Mitchell, "A note on
    DPO with noisy preferences", 2023). TRL 1.16 ignores `label_smoothing` for this loss; at 0 the two are equal."""
    margin = logratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return smoothed_logistic(beta * margin, label_smoothing)


@loss("reference", SMOOTHED, normalized=True, difference=True)
def sigmoid_norm(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Length-normalised DPO: -log s(beta (r_w / |y_w| - r_l / |y_l|)), with lengths [P] in scored tokens."""
    chosen = (chosen_logps - ref_chosen_logps) / chosen_lengths.clamp(min=1)
    rejected = (rejected_logps - ref_rejected_logps) / rejected_lengths.clamp(min=1)
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


@loss("reference", SMOOTHED, difference=True, offset=True)
def robust(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Provably robust DPO: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e), unbiased under flips of probability
    e < 1/2.

    Ray Chowdhury et al., arXiv 2403.00409, section 3.1. Unlike cDPO the flipped term is subtracted, so a loss may be
    negative. `label_smoothing` e must be in [0, 1/2): at 1/2 labels say nothing, and beyond it the opposite."""
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"robust needs 0 <= label_smoothing < 0.5, got {label_smoothing}.")
    logits = beta * logratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@loss("reference", BETA, difference=True, offset=True)
def hinge(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Hinge on the normalised margin: max(0, 1 - beta h). SLiC's calibration loss (Zhao et al., arXiv 2305.10425,
    section 2) with the reference-normalised likelihoods of RSO (Liu et al., arXiv 2309.06657)."""
    return torch.relu(1 - beta * logratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))


@loss("reference", BETA, normalized=True, difference=True)
def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2, `beta` being the paper's tau. Azar et al., arXiv 2310.12036, eq. 17.

    With lengths [P] the log-ratios are means over scored tokens instead of sums, which is what TRL computes and what
    the objective of this package passes; without them it is the equation as printed, whose scale grows with the length
    of a response."""
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    elif chosen_lengths is not None or rejected_lengths is not None:
        raise ValueError(
            "ipo got one of `chosen_lengths` and `rejected_lengths`. Pass both (mean per token) or neither (sum)."
        )
    return (chosen - rejected - 1 / (2 * beta)) ** 2


@loss("reference", SMOOTHED, difference=True, offset=True)
def exo_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """EXO on preferences, K = 2: the reverse KL( [s(beta h), s(-beta h)] || [1 - e, e] ). Ji et al., arXiv 2402.00856,
    eq. 16.

    `label_smoothing` e must be in (0, 1): at 0 the divergence is infinite.
    """
    if not 0.0 < label_smoothing < 1.0:
        raise ValueError(f"exo_pair needs 0 < label_smoothing < 1, got {label_smoothing}. The paper uses 1e-3.")
    logits = beta * logratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    keep = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-label_smoothing))
    flip = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(label_smoothing))
    return keep + flip


@loss("reference", BETA)
def nca_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Noise contrastive alignment of a pair: -log s(beta r_w) - (log s(-beta r_w) + log s(-beta r_l)) / 2. Chen et al.,
    arXiv 2402.05369, section 4.1.

    Absolute, not relative: it pushes the chosen log-ratio towards 0 from both sides and the rejected one down.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@loss("reference", BETA)
def bco_pair(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    reward_shift: float | Tensor = 0.0,
) -> Tensor:
    """Binary classifier optimisation: -log s(beta r_w - d) - log s(-(beta r_l - d)). Jung et al., arXiv 2404.04656,
    section 4.

    Args:
        reward_shift: the paper's d, an estimate of the mean reward beta r over chosen and rejected responses. TRL 1.16
            has none (d = 0); `RunningMean` keeps the estimate over optimizer steps.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps) - reward_shift
    rejected = beta * (rejected_logps - ref_rejected_logps) - reward_shift
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@loss("reference", BETA)
def sppo_hard(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Self-play preference optimisation with hard labels: (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2. Wu et al.,
    arXiv 2405.00675, eq. 4.7 with win probability 1 for the chosen and 0 for the rejected response."""
    target = 0.5 / beta
    return (chosen_logps - ref_chosen_logps - target) ** 2 + (rejected_logps - ref_rejected_logps + target) ** 2


@loss("reference", BETA)
def apo_zero(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Anchored preference optimisation, "zero": (1 - s(beta r_w)) + s(beta r_l). D'Oosterlinck et al., arXiv
    2408.06266, eq. 7.

    Raises the chosen and lowers the rejected response: for data whose chosen responses are better than the policy's
    own."""
    return torch.sigmoid(-beta * (chosen_logps - ref_chosen_logps)) + torch.sigmoid(
        beta * (rejected_logps - ref_rejected_logps)
    )


@loss("reference", BETA)
def apo_down(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Anchored preference optimisation, "down": s(beta r_w) + (1 - s(beta h)). D'Oosterlinck et al., arXiv 2408.06266,
    eq. 8.

    Lowers both, the rejected response more: for data whose chosen responses are worse than the policy's own.
    """
    margin = logratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return torch.sigmoid(beta * (chosen_logps - ref_chosen_logps)) + torch.sigmoid(-beta * margin)


@loss("reference", SMOOTHED, permutes=True)
def aot(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Alignment via optimal transport, paired: -log s(beta d), d = sort(policy margins) - sort(reference margins).
    Melnyk et al., arXiv 2406.05882, section 3.

    The result belongs to quantiles of the batch, not to its pairs: row i compares the i-th smallest margins.
    """
    policy, _ = torch.sort(chosen_logps - rejected_logps)
    reference, _ = torch.sort(ref_chosen_logps - ref_rejected_logps)
    return smoothed_logistic(beta * (policy - reference), label_smoothing)


@loss("reference", SMOOTHED, permutes=True)
def aot_unpaired(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Alignment via optimal transport, unpaired: -log s(beta d), d = sort(r_w) - sort(r_l). Melnyk et al., arXiv
    2406.05882, section 3.

    As in `aot`, a row belongs to a quantile of the batch.
    """
    chosen, _ = torch.sort(chosen_logps - ref_chosen_logps)
    rejected, _ = torch.sort(rejected_logps - ref_rejected_logps)
    return smoothed_logistic(beta * (chosen - rejected), label_smoothing)


@loss("reference", {"beta": "beta", "tau": "discopop_tau"}, difference=True, offset=True)
def discopop(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> Tensor:
    """Log-ratio modulated loss: (1 - s(x / tau)) (-log s(x)) + s(x / tau) exp(-x), x = beta h. Lu et al., arXiv
    2406.08414, eq. 5.

    The loss is not monotone: at tau = 0.05 it rises on -0.118 < x < 0.072, and there a gradient step lowers the margin.
    Every run that starts at policy = reference starts in that interval.
    The exponential part is computed as exp(log s(x / tau) - x): the product as printed is 0 * inf at large negative x.
    """
    logits = beta * logratio_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    logistic = torch.sigmoid(-logits / tau) * -F.logsigmoid(logits)
    exponential = torch.exp(F.logsigmoid(logits / tau) - logits)
    return logistic + exponential
