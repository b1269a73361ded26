"""f-divergence regularisers other than the reverse KL (f-DPO: Wang et al., arXiv 2309.16240), applied to log-ratios.

f-DPO replaces the log-ratio log t, t = policy / reference, by the score f'(t). A loss that depends on the difference of
two scores then takes the scores as log-probabilities with a reference of zero.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# exp stays finite below these. TRL clamps alpha_divergence with them; silkie clamps forward_kl too, which overflows to
# inf - inf without.
_MAX_EXPONENT = {torch.float16: 11.0, torch.bfloat16: 80.0, torch.float32: 80.0, torch.float64: 700.0}


def _clamped_expm1(exponent: Tensor) -> Tensor:
    return torch.expm1(exponent.clamp(max=_MAX_EXPONENT[exponent.dtype]))


def f_scores(logratios: Tensor, divergence: Divergence = "reverse_kl", alpha: float = 0.5) -> Tensor:
    """f'(t) at t = exp(logratios), elementwise; any shape, dimensionless.

    reverse_kl: log t. forward_kl: 1 - 1/t. js_divergence: log(2t / (1 + t)). alpha_divergence: (t^(alpha - 1) - 1) /
    (alpha - 1), whose limit at alpha = 1 is log t. Exponents are clamped where exp would overflow, so that no
    difference of scores is NaN; beyond the clamp the gradient is zero.

    Raises:
        ValueError: an unknown divergence.
    """
    if divergence == "reverse_kl":
        return logratios
    if divergence == "forward_kl":
        return -_clamped_expm1(-logratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "alpha_divergence":
        power = alpha - 1.0
        return logratios if abs(power) < 1e-6 else _clamped_expm1(power * logratios) / power
    raise ValueError(
        f"unknown f_divergence_type {divergence!r}; expected 'reverse_kl', 'forward_kl', 'js_divergence' or"
        " 'alpha_divergence'"
    )
