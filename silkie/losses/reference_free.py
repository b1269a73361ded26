"""Losses that need no reference policy: `fn(chosen_logps [P], rejected_logps [P], chosen_lengths [P], rejected_lengths
[P], *, ...) -> [P]` with log-probabilities summed over tokens (nats) and lengths in scored tokens. `s` is the logistic
function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pairwise import smoothed_logistic
from .spec import BETA, SMOOTHED, loss

# Where the two forms below lose as much: expm1 is exact near 0, log1p far from it (Maechler, "Accurately computing
# log(1 - exp(-|a|))", 2012).
LOG_HALF = -0.6931471805599453


@loss("lengths", {**SMOOTHED, "gamma": "simpo_gamma"}, offset=True)
def simpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO: -log s(beta log p(y_w) / |y_w| - beta log p(y_l) / |y_l| - gamma). Meng et al., arXiv 2405.14734, eq.
    6."""
    margin = chosen_logps / chosen_lengths.clamp(min=1) - rejected_logps / rejected_lengths.clamp(min=1)
    return smoothed_logistic(beta * margin - gamma, label_smoothing)


@loss("lengths", SMOOTHED, offset=True)
def cpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The preference term of CPO: -log s(beta (log p(y_w) - log p(y_l))), DPO with a uniform reference. Xu et al.,
    arXiv 2401.08417.

    The lengths are not used; they keep the signature. CPO itself adds an `sft` term of weight 1.
    """
    return smoothed_logistic(beta * (chosen_logps - rejected_logps), label_smoothing)


def log1mexp(logps: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, stable at both ends. Values above -eps of the dtype count as -eps: at 0 the result is
    -inf."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return torch.where(logps > LOG_HALF, torch.log(-torch.expm1(logps)), torch.log1p(-torch.exp(logps)))


@loss("lengths", BETA)
def orpo(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, *, beta: float = 0.1
) -> Tensor:
    """The odds-ratio term of ORPO: -beta log s(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), p = exp(log p(y) /
    |y|). Hong et al., arXiv 2403.07691, eqs. 4 and 7; `beta` is the paper's lambda, as in TRL. ORPO itself adds an
    `sft` term of weight 1."""
    chosen = chosen_logps / chosen_lengths.clamp(min=1)
    rejected = rejected_logps / rejected_lengths.clamp(min=1)
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds)


@loss("sft", {}, unit="token")
def sft(chosen_logps: Tensor, chosen_lengths: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the chosen response, [P].

    With lengths the values are scaled so that their plain mean is the mean over all chosen tokens, TRL's normalisation;
    without them they are sums over tokens, which the objective divides by the number of chosen tokens of the optimizer
    step."""
    if chosen_lengths is None:
        return -chosen_logps
    return -chosen_logps / chosen_lengths.to(chosen_logps.dtype).mean()
