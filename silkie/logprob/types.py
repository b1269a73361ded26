"""Types shared by the layers of `silkie.logprob`.

Legend: N scored tokens, D hidden size, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "tiled", "triton"]


@dataclass(frozen=True, slots=True)
class LogprobStats:
    """Per-token statistics of the output distribution; none of them carries a gradient. Ignored tokens hold 0 / False.

    mean_logit        [N]  mean over the vocabulary of the final logits
    entropy           [N]  -sum_v p_v log p_v, in nats
    is_top1           [N]  bool: the target is the argmax (of equal logits the smallest id is)
    log_sum_sq_probs  [N]  log sum_v p_v^2 (the token weight of WPO, arXiv:2406.11827, section 4)
    """

    mean_logit: Tensor
    entropy: Tensor
    is_top1: Tensor
    log_sum_sq_probs: Tensor


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to `hidden @ weight.T + bias` before the softmax: `z = cap(scale * raw)`, `cap(x) = softcap *
    tanh(x / softcap)`.

    Gemma 2 and 3 set `final_logit_softcapping`, Cohere multiplies by `logit_scale`, Granite divides by
    `logits_scaling`."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def apply_(self, raw: Tensor) -> Tensor:
        """Raw logits to final logits, in place."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw

    def __call__(self, raw: Tensor) -> Tensor:
        """Raw logits to final logits, differentiable."""
        if self.scale != 1.0:
            raw = raw * self.scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw

    def slope(self, final: Tensor) -> Tensor:
        """d final / d raw, from the final logits: `scale * (1 - (z / softcap)^2)`."""
        if self.softcap is None:
            return torch.full_like(final, self.scale)
        return final.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype logits, sums and results are held in: float64 for float64 operands, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
