"""From the sums one pass over the vocabulary leaves to log-probs and statistics; shared by the tiled and the Triton pass.

Legend: N scored tokens, D hidden size; n rows of one chunk; y the target of a row; c ("peak") the row's anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from silkie.logprob.types import LogprobStats


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """What one pass over the vocabulary yields for n rows: logps [n], lse [n] (log sum_v exp z_v), grad [n, D], stats."""

    logps: Tensor
    lse: Tensor
    grad: Tensor | None
    stats: LogprobStats | None


@dataclass(frozen=True, slots=True)
class PassResult:
    """The chunks of a call put together: logps [N] (0 where ignored), lse [N], grad [N, D] in hidden's dtype or None, stats or None."""

    logps: Tensor
    lse: Tensor
    grad: Tensor | None
    stats: LogprobStats | None


@dataclass(slots=True)
class StatSums:
    """Running sums over the tiles: of logits (all v), and over v != y of e * (z - base) and e^2, with e = exp(z - c).

    base is z_y, or 0 where z_y is infinite; `before` is the largest logit of a token with a smaller id than the target.
    """

    logits: Tensor
    weighted: Tensor
    squares: Tensor
    before: Tensor

    @staticmethod
    def zeros(like: Tensor) -> StatSums:
        return StatSums(torch.zeros_like(like), torch.zeros_like(like), torch.zeros_like(like), torch.full_like(like, -torch.inf))

    def add(self, exps: Tensor, shifted: Tensor, rescale: Tensor) -> None:
        """exps [n, v]; shifted = z - base [n, v], which is overwritten; rescale [n]: exp(old c - new c)."""
        self.weighted.mul_(rescale).add_(shifted.mul_(exps).sum(-1))
        self.squares.mul_(rescale).mul_(rescale).add_(torch.mul(exps, exps, out=shifted).sum(-1))


@dataclass(frozen=True, slots=True)
class RowSums:
    """z_y [n], c [n], total = sum_{v != y} exp(z_v - c) [n] and best = max_{v != y} z_v [n]."""

    z_y: Tensor
    peak: Tensor
    total: Tensor
    best: Tensor

    @property
    def norm(self) -> Tensor:
        """sum over all v of exp(z_v - c)."""
        return self.total + (self.z_y - self.peak).exp()

    def logps(self) -> Tensor:
        """-log1p(total / exp(z_y - c)); where that quotient cannot be represented, the difference of logarithms is accurate."""
        gap = self.z_y - self.peak
        ratio = self.total / gap.exp()
        return torch.where(ratio.isfinite() & (gap > -80), -ratio.log1p(), gap - self.norm.log())

    def result(self, grad: Tensor | None, sums: StatSums | None, vocab: int) -> ChunkResult:
        logps, norm = self.logps(), self.norm
        lse = self.peak + norm.log()
        if sums is None:
            return ChunkResult(logps, lse, grad, None)
        own = (self.z_y - self.peak).exp()
        # lse - base is -logp where base is z_y: that keeps its accuracy where the difference would cancel.
        distance = torch.where(self.z_y.isfinite(), -logps, lse)
        stats = LogprobStats(
            mean_logit=sums.logits / vocab,
            entropy=distance - sums.weighted / norm,
            is_top1=(self.z_y >= self.best) & (self.z_y > sums.before),
            log_sum_sq_probs=(sums.squares + own * own).log() - 2 * norm.log(),
        )
        return ChunkResult(logps, lse, grad, stats)


def join_stats(parts: list[LogprobStats], ignored: Tensor, dtype: torch.dtype) -> LogprobStats:
    """The chunks' statistics in one piece, 0 / False where ignored."""

    def join(name: str, like: torch.dtype) -> Tensor:
        found = [getattr(part, name) for part in parts]
        whole = torch.cat(found) if found else torch.zeros(0, dtype=like, device=ignored.device)
        return whole.masked_fill_(ignored, 0)

    return LogprobStats(
        mean_logit=join("mean_logit", dtype),
        entropy=join("entropy", dtype),
        is_top1=join("is_top1", torch.bool),
        log_sum_sq_probs=join("log_sum_sq_probs", dtype),
    )
