"""Log-probs tile by tile in pure torch: exact, any device, a few tens of MB whatever N and V. The CPU path.

Legend: N scored tokens, D hidden size, V vocabulary; n rows of one chunk, v columns of one vocabulary tile, y the target of a row.

Everything is measured from the target's own logit z_y, which is computed by a separate fp32 dot product:

    S    = sum_{v != y} exp(z_v - z_y)
    logp = -log1p(S)
    d logp / d h = (S * W_y - sum_{v != y} exp(z_v - z_y) W_v) / (1 + S)

so a confident token (S -> 0) keeps its relative accuracy: neither 1 - p nor one-hot minus p is ever formed by subtraction. Between
tiles the sums are carried relative to c = max(z_y, largest logit so far), so nothing overflows at any logit.

With a frozen head the gradient of each log-prob with respect to its hidden state is accumulated in the same pass (it does not depend on
the loss): two matrix products per tile, 4NVD operations in all, and the backward pass scales rows. With a trainable head the backward
pass recomputes the logits (8NVD) and yields gradients for hidden, weight and bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from silkie.logprob.sums import ChunkResult, PassResult, RowSums, StatSums, join_stats
from silkie.logprob.types import LogitTransform, LogprobStats, accumulate_dtype

ROWS = 512
"""Rows of one chunk."""
COLUMNS = 4096
"""Vocabulary columns of one tile: a 512 x 4096 fp32 tile is 8 MiB, so the passes over it stay in a CPU's cache."""
LOG2_E = math.log2(math.e)


def _matmul_operand(x: Tensor) -> Tensor:
    """fp16 cannot hold exponentials (range) and is slow on CPUs: its products run in fp32. Other dtypes as they are."""
    return x.float() if x.dtype == torch.float16 else x


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, never rounded on the way on CUDA. CPUs have no mixed-output product: theirs is rounded to the operands' dtype."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def target_logits(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """z_y [n] by a dot product in the accumulation dtype."""
    dtype = accumulate_dtype(hidden.dtype)
    raw = (hidden.to(dtype) * weight[target].to(dtype)).sum(-1)
    if bias is not None:
        raw = raw + bias[target].to(dtype)
    return transform(raw)


def _tile_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, anchor: Tensor, dtype: torch.dtype
) -> Tensor:
    """Final logits [n, v] of one vocabulary tile, in the accumulation dtype.

    Where the library rounds a bf16 product to bf16 (CPUs), the product is taken as `h @ W.T - anchor` in one fp32 accumulation: the
    rounding is then relative to the distance from the anchor [n] (z_y, or lse), so it vanishes for the tokens that carry the mass.
    """
    if hidden.dtype == dtype or hidden.is_cuda:
        raw = _product(hidden, weight.t(), dtype)
    else:
        near = anchor.to(hidden.dtype)[:, None]
        raw = torch.addmm(-near, hidden, weight.t()).to(dtype).add_(near.to(dtype))
    if bias is not None:
        raw += bias
    return transform.apply_(raw)


def _exp_(tile: Tensor, shift: Tensor) -> Tensor:
    """exp(tile - shift[:, None]) in place. By exp2, which torch computes three times faster than exp on some CPUs."""
    return tile.sub_(shift[:, None]).mul_(LOG2_E).exp2_()


def _set_target(tile: Tensor, column: Tensor, value: Tensor | float) -> None:
    """tile[n, column[n]] = value[n] where that column lies in this tile; without a host synchronisation."""
    inside = (column >= 0) & (column < tile.shape[1])
    index = column.clamp(0, tile.shape[1] - 1)[:, None]
    old = tile.gather(1, index)
    new = torch.as_tensor(value, dtype=tile.dtype, device=tile.device).expand(len(column))[:, None]
    tile.scatter_(1, index, torch.where(inside[:, None], new, old))


def _scan(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, transform: LogitTransform, want_grad: bool, want_stats: bool
) -> ChunkResult:
    """One pass over the vocabulary for the rows of one chunk (hidden [n, D])."""
    dtype = accumulate_dtype(hidden.dtype)
    n = hidden.shape[0]
    z_y = target_logits(hidden, weight, target, bias, transform)
    base = torch.where(z_y.isfinite(), z_y, torch.zeros_like(z_y))
    peak = torch.where(z_y.isfinite(), z_y, torch.full_like(z_y, torch.finfo(dtype).min / 4))
    operand = _matmul_operand(hidden)
    total = hidden.new_zeros(n, dtype=dtype)
    grad = hidden.new_zeros(hidden.shape, dtype=dtype) if want_grad else None
    stats = StatSums.zeros(total) if want_stats else None
    best = torch.full_like(total, -torch.inf)

    for start in range(0, weight.shape[0], COLUMNS):
        tile_weight = _matmul_operand(weight[start : start + COLUMNS])
        tile_bias = None if bias is None else bias[start : start + COLUMNS].to(dtype)
        tile = _tile_logits(operand, tile_weight, tile_bias, transform, base, dtype)
        if stats is not None:
            stats.logits += tile.sum(-1)
            earlier = torch.arange(start, start + tile.shape[1], device=tile.device) < target[:, None]
            stats.before = torch.maximum(stats.before, tile.masked_fill(~earlier, -torch.inf).amax(-1))
        slope = transform.slope(tile) if want_grad and not transform.is_identity else None
        _set_target(tile, target - start, -torch.inf)
        tile_best = tile.amax(-1)
        best = torch.maximum(best, tile_best)
        new_peak = torch.maximum(peak, tile_best)
        rescale = (peak - new_peak).exp_()
        if stats is not None:
            shifted = (tile - base[:, None]).clamp_(min=-1e30)
        _exp_(tile, new_peak)
        total.mul_(rescale).add_(tile.sum(-1))
        if stats is not None:
            stats.add(tile, shifted, rescale)
        if grad is not None:
            if slope is not None:
                tile.mul_(slope)
            grad.mul_(rescale[:, None]).add_(_product(tile.to(tile_weight.dtype), tile_weight, dtype))
        peak = new_peak

    rows = RowSums(z_y, peak, total, best)
    if grad is not None:
        slope_y = 1.0 if transform.is_identity else transform.slope(z_y)[:, None]
        grad = (total[:, None] * slope_y * weight[target].to(dtype)).sub_(grad).div_(rows.norm[:, None])
    return rows.result(grad, stats, weight.shape[0])


def forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignored: Tensor,
    transform: LogitTransform,
    want_grad: bool,
    want_stats: bool,
) -> PassResult:
    """All rows, chunk by chunk."""
    dtype = accumulate_dtype(hidden.dtype)
    count = hidden.shape[0]
    logps, lse = hidden.new_zeros(count, dtype=dtype), hidden.new_zeros(count, dtype=dtype)
    grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_grad else None
    parts: list[LogprobStats] = []
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        done = _scan(hidden[rows], weight, target[rows], bias, transform, want_grad, want_stats)
        logps[rows] = done.logps.masked_fill_(ignored[rows], 0.0)
        lse[rows] = done.lse
        if grad is not None and done.grad is not None:
            grad[rows] = done.grad.masked_fill_(ignored[rows, None], 0.0)
        if done.stats is not None:
            parts.append(done.stats)
    return PassResult(logps, lse, grad, join_stats(parts, ignored, dtype) if want_stats else None)


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad_logps: Tensor,
    logps: Tensor,
    lse: Tensor,
    transform: LogitTransform,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum(grad_logps * logps): tiles outside, chunks inside, so that each weight tile is summed in fp32 and written once."""
    want_hidden, want_weight, want_bias = want
    dtype = accumulate_dtype(hidden.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if want_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    for start in range(0, weight.shape[0], COLUMNS):
        columns = slice(start, start + COLUMNS)
        tile_weight = _matmul_operand(weight[columns])
        tile_bias = None if bias is None else bias[columns].to(dtype)
        sum_weight = tile_weight.new_zeros(tile_weight.shape, dtype=dtype) if want_weight else None
        sum_bias = tile_weight.new_zeros(tile_weight.shape[0], dtype=dtype) if grad_bias is not None else None
        for first in range(0, hidden.shape[0], ROWS):
            rows = slice(first, first + ROWS)
            operand = _matmul_operand(hidden[rows])
            tile = _tile_logits(operand, tile_weight, tile_bias, transform, lse[rows], dtype)
            slope = None if transform.is_identity else transform.slope(tile)
            _exp_(tile, lse[rows]).neg_()
            _set_target(tile, target[rows] - start, -torch.expm1(logps[rows]))
            if slope is not None:
                tile.mul_(slope)
            tile.mul_(grad_logps[rows, None])
            coefficients = tile.to(operand.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] += _product(coefficients, tile_weight, dtype)
            if sum_weight is not None:
                sum_weight += _product(coefficients.t(), operand, dtype)
            if sum_bias is not None:
                sum_bias += tile.sum(0)
        if grad_weight is not None and sum_weight is not None:
            grad_weight[columns] = sum_weight
        if grad_bias is not None and sum_bias is not None:
            grad_bias[columns] = sum_bias
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
