"""From the sums one pass over the vocabulary leaves to log-probs and statistics; shared by the tiled and the Triton
pass.

Legend: N scored tokens, D hidden size; n rows of one chunk; y the target of a row; c ("peak") the row's anchor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from silkie.logprob.types import LogprobStats


@dataclass(frozen=True, slots=True)
class RowSums:
    """z_y [n], c [n] and total = sum_{v != y} exp(z_v - c) [n]: all that log-probs, and a backward pass that recomputes
    logits, need."""

    z_y: Tensor
    peak: Tensor
    total: Tensor

    @property
    def own(self) -> Tensor:
        """exp(z_y - c)."""
        return (self.z_y - self.peak).exp()

    @property
    def norm(self) -> Tensor:
        """sum over all v of exp(z_v - c)."""
        return self.total + self.own

    def log_norm(self) -> Tensor:
        """log(norm), accurate also where the target is nearly certain (c = z_y, total near 0)."""
        # norm is 1 + total there, and a total below the rounding of 1 would be lost in the sum.
        return torch.where(self.z_y == self.peak, self.total.log1p(), self.norm.log())

    def logps(self) -> Tensor:
        """-log1p(total / exp(z_y - c)); where that quotient cannot be represented, the difference of logarithms is
        accurate."""
        gap = self.z_y - self.peak
        ratio = self.total / self.own
        return torch.where(ratio.isfinite() & (gap > -80), -ratio.log1p(), gap - self.log_norm())


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass over the vocabulary yields: logps [N], the rows' sums, grad [N, D] in hidden's dtype or None, stats
    or None.

    logps, grad and stats are 0 where ignored.
    """

    logps: Tensor
    rows: RowSums
    grad: Tensor | None
    stats: LogprobStats | None


@dataclass(slots=True)
class StatSums:
    """Running sums over the tiles: of logits (all v), and over v != y of e * (z - c) and e^2, with e = exp(z - c).

    best: the largest logit of v != y; before: the largest logit of a token with a smaller id than the target.
    """

    logits: Tensor
    weighted: Tensor
    squares: Tensor
    best: Tensor
    before: Tensor

    @staticmethod
    def empty(like: Tensor) -> StatSums:
        zeros = [torch.zeros_like(like) for _ in range(3)]
        return StatSums(
            zeros[0], zeros[1], zeros[2], torch.full_like(like, -torch.inf), torch.full_like(like, -torch.inf)
        )

    def finish(self, rows: RowSums, vocab: int) -> LogprobStats:
        """entropy = log norm - mean of (z - c) under p; exponents of -inf weigh nothing."""
        norm, own, log_norm = rows.norm, rows.own, rows.log_norm()
        target_term = torch.where(own > 0, own * (rows.z_y - rows.peak), torch.zeros_like(own))
        return LogprobStats(
            mean_logit=self.logits / vocab,
            entropy=log_norm - (self.weighted + target_term) / norm,
            is_top1=(rows.z_y >= self.best) & (rows.z_y > self.before),
            log_sum_sq_probs=(self.squares + own * own).log() - 2 * log_norm,
        )


def join_rows(parts: list[RowSums], like: Tensor) -> RowSums:
    """The chunks' sums in one piece; `like` is what no rows look like."""
    return RowSums(*(torch.cat([getattr(part, name) for part in parts] or [like]) for name in ("z_y", "peak", "total")))


def row_factor(grad_logps: Tensor, rows: RowSums) -> Tensor:
    """What turns exp(z_v - c) into a logit's gradient: -grad_logp / norm [n]; 0 for rows without a gradient, whatever
    their sums hold.

    With -total in the target's place, the product there is grad_logp * (1 - p_y) without a cancellation.
    """
    return torch.where(grad_logps == 0, torch.zeros_like(grad_logps), -grad_logps / rows.norm)


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
