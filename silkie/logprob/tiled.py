"""Log-probs tile by tile in pure torch: exact, any device, a few tens of MB whatever N and V. The CPU path.

Legend: N scored tokens, D hidden size, V vocabulary; n rows of one chunk, v columns of one vocabulary tile, y the
    target of a row.

Everything is measured from the target's own logit z_y, which is computed by a separate fp32 dot product:

    S    = sum_{v != y} exp(z_v - z_y)
    logp = -log1p(S)
    d logp / d h = (S * W_y - sum_{v != y} exp(z_v - z_y) W_v) / (1 + S)

so a confident token (S -> 0) keeps its relative accuracy: neither 1 - p nor one-hot minus p is ever formed by
subtraction. Between tiles the sums are carried relative to c = max(z_y, largest logit so far), so nothing overflows at
any logit.

With a frozen head the gradient of each log-prob with respect to its hidden state is accumulated in the same pass (it
does not depend on the loss): two matrix products per tile, 4NVD operations in all, and the backward pass scales rows.
With a trainable head the backward pass recomputes the logits (8NVD) and yields gradients for hidden, weight and bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from silkie.logprob.sums import PassResult, RowSums, StatSums, join_rows, join_stats, row_factor
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
    """a @ b in `dtype`, never rounded on the way on CUDA. CPUs have no mixed-output product: theirs is rounded to the
    operands' dtype."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def target_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, transform: LogitTransform
) -> Tensor:
    """z_y [n] by a dot product in the accumulation dtype."""
    dtype = accumulate_dtype(hidden.dtype)
    raw = (hidden.to(dtype) * weight[target].to(dtype)).sum(-1)
    if bias is not None:
        raw = raw + bias[target].to(dtype)
    return transform(raw)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _tile_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, anchor: Tensor, dtype: torch.dtype
) -> Tensor:
    """Final logits [n, v] of one vocabulary tile, in the accumulation dtype.

    Where the library rounds a bf16 product to bf16 (CPUs), the product is taken as `h @ W.T - anchor` in one fp32
    accumulation: the rounding is then relative to the distance from the anchor [n] (z_y), so it vanishes for the tokens
    that carry the mass."""
    if hidden.dtype == dtype or hidden.is_cuda:
        raw = _product(hidden, weight.t(), dtype)
    else:
        near = torch.where(anchor.isfinite(), anchor, torch.zeros_like(anchor)).to(hidden.dtype)[:, None]
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
    new = value[:, None] if isinstance(value, Tensor) else torch.full_like(old, value)
    tile.scatter_(1, index, torch.where(inside[:, None], new, old))


def _scan(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    want_grad: bool,
    want_stats: bool,
) -> tuple[RowSums, Tensor | None, LogprobStats | None]:
    """One pass over the vocabulary for the rows of one chunk (hidden [n, D]): sums, gradient [n, D] of each log-prob,
    statistics."""
    dtype = accumulate_dtype(hidden.dtype)
    z_y = target_logits(hidden, weight, target, bias, transform)
    # A target at -inf gives nothing to measure from. A quarter of the smallest number stays below any logit, and
    # differences to it stay finite.
    peak = torch.where(z_y.isfinite(), z_y, torch.full_like(z_y, torch.finfo(dtype).min / 4))
    operand = _matmul_operand(hidden)
    total = torch.zeros_like(z_y)
    grad = hidden.new_zeros(hidden.shape, dtype=dtype) if want_grad else None
    stats = StatSums.empty(z_y) if want_stats else None

    for start in range(0, weight.shape[0], COLUMNS):
        tile_weight = _matmul_operand(weight[start : start + COLUMNS])
        tile_bias = None if bias is None else bias[start : start + COLUMNS].to(dtype)
        tile = _tile_logits(operand, tile_weight, tile_bias, transform, z_y, dtype)
        slope = transform.slope(tile) if want_grad and not transform.is_identity else None
        if stats is not None:
            stats.logits += tile.sum(-1)
        # The sums are over the other columns; the target is compared with them through z_y.
        _set_target(tile, target - start, -torch.inf)
        best = tile.amax(-1)
        new_peak = torch.maximum(peak, best)
        rescale = (peak - new_peak).exp_()
        if stats is not None:
            _add_stats(stats, tile, best, target - start, peak, new_peak, rescale, total)
        _exp_(tile, new_peak)
        total = total.mul_(rescale).add_(tile.sum(-1))
        if grad is not None:
            if slope is not None:
                tile.mul_(slope)
            grad.mul_(rescale[:, None]).add_(_product(tile.to(tile_weight.dtype), tile_weight, dtype))
        peak = new_peak

    rows = RowSums(z_y, peak, total)
    if grad is not None:
        slope_y = 1.0 if transform.is_identity else transform.slope(z_y)[:, None]
        grad = (total[:, None] * slope_y * weight[target].to(dtype)).sub_(grad).div_(rows.norm[:, None])
    return rows, grad, None if stats is None else stats.finish(rows, weight.shape[0])


def _add_stats(
    stats: StatSums,
    tile: Tensor,
    best: Tensor,
    local: Tensor,
    peak: Tensor,
    new_peak: Tensor,
    rescale: Tensor,
    total: Tensor,
) -> None:
    """Folds a tile of logits [n, v] (the target's own at -inf) into the statistics; total is still relative to the old
    peak."""
    earlier = torch.arange(tile.shape[1], device=tile.device) < local[:, None]
    stats.before = torch.maximum(stats.before, tile.masked_fill(~earlier, -torch.inf).amax(-1))
    stats.best = torch.maximum(stats.best, best)
    # distance * exp(distance) is NaN at -inf, where the target's column is.
    distance = (tile - new_peak[:, None]).clamp_(min=-1e30)
    exps = distance.exp()
    stats.weighted = (stats.weighted + (peak - new_peak) * total) * rescale + (distance * exps).sum(-1)
    stats.squares = stats.squares * rescale * rescale + exps.square_().sum(-1)


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
    """All rows, chunk by chunk: see `silkie.logprob.autograd.Backend`."""
    dtype = accumulate_dtype(hidden.dtype)
    grad = torch.empty_like(hidden, memory_format=torch.contiguous_format) if want_grad else None
    sums: list[RowSums] = []
    parts: list[LogprobStats] = []
    for rows in _chunks(len(hidden)):
        found, chunk_grad, stats = _scan(hidden[rows], weight, target[rows], bias, transform, want_grad, want_stats)
        sums.append(found)
        if grad is not None and chunk_grad is not None:
            grad[rows] = chunk_grad.masked_fill_(ignored[rows, None], 0.0)
        if stats is not None:
            parts.append(stats)
    joined = join_rows(sums, hidden.new_zeros(0, dtype=dtype))
    logps = joined.logps().masked_fill_(ignored, 0.0)
    return PassResult(logps, joined, grad, join_stats(parts, ignored, dtype) if want_stats else None)


def backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    grad_logps: Tensor,
    sums: RowSums,
    transform: LogitTransform,
    want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum(grad_logps * logps): tiles outside, chunks inside, so that each weight tile is summed in fp32
    and written once."""
    want_hidden, want_weight, want_bias = want
    dtype = accumulate_dtype(hidden.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if want_hidden else None
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    factor = row_factor(grad_logps, sums)
    for start in range(0, weight.shape[0], COLUMNS):
        columns = slice(start, start + COLUMNS)
        tile_weight = _matmul_operand(weight[columns])
        tile_bias = None if bias is None else bias[columns].to(dtype)
        sum_weight = tile_weight.new_zeros(tile_weight.shape, dtype=dtype) if want_weight else None
        sum_bias = tile_weight.new_zeros(tile_weight.shape[0], dtype=dtype) if grad_bias is not None else None
        for rows in _chunks(len(hidden)):
            operand = _matmul_operand(hidden[rows])
            tile = _tile_logits(operand, tile_weight, tile_bias, transform, sums.z_y[rows], dtype)
            slope = None if transform.is_identity else transform.slope(tile)
            _exp_(tile, sums.peak[rows])
            # In the target's column stands -S, so that p - 1 is not formed by subtraction.
            _set_target(tile, target[rows] - start, -sums.total[rows])
            if slope is not None:
                tile.mul_(slope)
            tile.mul_(factor[rows, None])
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
