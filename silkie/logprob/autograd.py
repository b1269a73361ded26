"""How a pass over the vocabulary becomes differentiable: gradient in the forward pass (frozen head) or recompute
(trainable head)."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from silkie.logprob.sums import PassResult, RowSums
from silkie.logprob.types import LogitTransform, LogprobStats


class Backend(Protocol):
    """Two passes over the vocabulary; `silkie.logprob.tiled` and `silkie.logprob.triton_pass` are such modules."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        ignored: Tensor,
        transform: LogitTransform,
        want_grad: bool,
        want_stats: bool,
    ) -> PassResult:
        """Log-probs and, if asked for, the gradient of each one with respect to its own hidden state."""

    def backward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        grad_logps: Tensor,
        sums: RowSums,
        transform: LogitTransform,
        want: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of sum(grad_logps * logps) in hidden, weight and bias, those wanted."""


def fused_logprob(
    backend: Backend,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignored: Tensor,
    transform: LogitTransform,
    want_stats: bool,
) -> tuple[Tensor, LogprobStats | None]:
    """Log-probs [N] and statistics by `backend`; target inside [0, V) everywhere, ignored [N] bool.

    Nothing tracked: 2NVD operations, nothing stored. Frozen head: 4NVD, [N, D] stored. Trainable head: recompute, up to
    8NVD."""
    tracks = torch.is_grad_enabled()
    head_trains = tracks and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if not head_trains and not (tracks and hidden.requires_grad):
        done = backend.forward(hidden, weight, target, bias, ignored, transform, False, want_stats)
        return done.logps, done.stats
    function = _TrainableHead if head_trains else _FrozenHead
    stats: list[LogprobStats | None] = []
    logps = function.apply(backend, hidden, weight, target, bias, ignored, transform, want_stats, stats)
    return logps, stats[0]


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, hidden, weight, target, bias, ignored, transform, want_stats, stats):
        done = backend.forward(hidden, weight, target, bias, ignored, transform, True, want_stats)
        ctx.save_for_backward(done.grad, ignored)
        stats.append(done.stats)
        return done.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps):
        grad, ignored = ctx.saved_tensors
        # An ignored row of `grad` is 0, and 0 times an infinite gradient from above would be NaN
        rows = grad_logps.masked_fill(ignored, 0.0)
        # Into the result's dtype at once: the product as such is fp32, an array twice as large where that is bf16
        scaled = torch.mul(grad, rows[:, None], out=torch.empty_like(grad))
        return None, scaled, None, None, None, None, None, None, None


class _TrainableHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: Backend, hidden, weight, target, bias, ignored, transform, want_stats, stats):
        # Backward multiplies hidden states by 0 where ignored, and 0 times a NaN of theirs would be NaN in every row of
        # the head
        hidden = hidden.masked_fill(ignored[:, None], 0.0)
        done = backend.forward(hidden, weight, target, bias, ignored, transform, False, want_stats)
        ctx.save_for_backward(hidden, weight, target, bias, ignored, done.rows.z_y, done.rows.peak, done.rows.total)
        ctx.backend, ctx.transform, ctx.shape = backend, transform, weight.shape
        stats.append(done.stats)
        return done.logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps):
        hidden, weight, target, bias, ignored, *sums = ctx.saved_tensors
        if weight.shape != ctx.shape:
            was, now = tuple(ctx.shape), tuple(weight.shape)
            raise RuntimeError(
                f"linear_logprob: the output head was {was} in the forward pass and is {now} in backward: it was"
                " partitioned again. Call linear_logprob inside the head module's own forward, whose hooks gather it"
                " for both passes"
            )
        want = (ctx.needs_input_grad[1], ctx.needs_input_grad[2], ctx.needs_input_grad[4])
        rows = grad_logps.masked_fill(ignored, 0.0)
        with torch.autocast(hidden.device.type, enabled=False):  # as in the forward pass
            found = ctx.backend.backward(hidden, weight, target, bias, rows, RowSums(*sums), ctx.transform, want)
        return None, found[0], found[1], None, found[2], None, None, None, None
