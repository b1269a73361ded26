"""The CUDA pass: library matrix products with fp32 output, one Triton kernel per slab of logits, library product for
the gradient.

Legend: N scored tokens, D hidden size, V vocabulary; a chunk is up to ROWS rows, a slab COLUMNS columns of the
    vocabulary.

    z = hidden_chunk @ W_slab.T          library product, bf16 operands, fp32 logits (never rounded to bf16)
    e = exp(z - c), sums of e            slab_kernel: z read once, e written once in the operands' dtype
    G += e @ W_slab                      library product, accumulated in fp32 in place
    grad = (S W_y - G) / (S + e_y)       gradient_kernel, once per chunk

c is z_y until a logit exceeds it by `_HEADROOM`; then it moves, on the device. No host synchronisation anywhere, no
atomics: equal
inputs give equal bits. Workspace: logits and exponentials of one slab (604 MB at 8192 x 12288) and the chunk's fp32
gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from silkie.logprob.sums import PassResult, RowSums, StatSums, join_rows, join_stats, row_factor
from silkie.logprob.triton_kernels import coefficient_kernel, gradient_kernel, slab_kernel, target_logit_kernel
from silkie.logprob.types import LogitTransform, LogprobStats

ROWS = 8192
"""Rows of one chunk: at D = 3584, 896 output tiles of 128 x 256 fill 132 processors in 6.8 waves (1152 rows: 0.95 of
one)."""
COLUMNS = 12288
"""Columns of one slab. Constant, so that a new N compiles nothing; 3072 logit tiles of 128 x 256 are 23.3 waves."""
_BLOCK = 2048
_HEADROOM = 30.0
"""bf16 and fp32 hold exp(60), the square of the largest exponential, times any vocabulary. fp16 operands get headroom 0
and exponentials scaled by 2^15."""


def _kernel_range(dtype: torch.dtype) -> tuple[float, float]:
    """(headroom over the anchor, factor of the stored exponentials)."""
    return (0.0, 2.0**15) if dtype == torch.float16 else (_HEADROOM, 1.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with fp32 output. On CPU tensors (the interpreter, in tests) by upcasting."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in fp32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _options(transform: LogitTransform) -> dict[str, float]:
    """Kernel arguments of the transform; the soft-cap is only read where there is one."""
    return {"scale": transform.scale, "softcap": 1.0 if transform.softcap is None else transform.softcap}


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _target_logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, transform: LogitTransform
) -> Tensor:
    n, d = hidden.shape
    out = torch.empty(n, dtype=torch.float32, device=hidden.device)
    target_logit_kernel[(n,)](
        hidden,
        hidden.stride(0),
        weight,
        weight.stride(0),
        weight if bias is None else bias,
        target,
        out,
        **_options(transform),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=transform.softcap is not None,
        D=d,
        BLOCK=min(_BLOCK, triton.next_power_of_2(d)),
    )
    return out


def _scan(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignored: Tensor,
    transform: LogitTransform,
    out: Tensor | None,
    want_stats: bool,
) -> tuple[RowSums, LogprobStats | None]:
    """One pass over the vocabulary for the rows of one chunk; the gradient of each log-prob goes to `out` [n, D]."""
    (n, d), vocab = hidden.shape, weight.shape[0]
    z_y = _target_logits(hidden, weight, target, bias, transform)
    peak = torch.where(z_y.isfinite(), z_y, torch.full_like(z_y, torch.finfo(torch.float32).min / 4))
    total = torch.zeros_like(z_y)
    grad = torch.zeros(n, d, dtype=torch.float32, device=hidden.device) if out is not None else None
    stats = StatSums.empty(z_y) if want_stats else None
    headroom, factor = _kernel_range(hidden.dtype)
    for start in range(0, vocab, COLUMNS):
        slab = weight[start : start + COLUMNS]
        logits = _product(hidden, slab.t())
        # Without a gradient nothing is written there, so the logits stand in for an array that would never be touched.
        exps = torch.empty(logits.shape, dtype=hidden.dtype, device=hidden.device) if grad is not None else logits
        slab_kernel[(n,)](
            logits,
            logits.stride(0),
            exps,
            exps.stride(0),
            logits if bias is None else bias[start:],
            target,
            peak,
            total,
            total if grad is None else grad,
            d,
            *(
                (total,) * 5
                if stats is None
                else (stats.logits, stats.weighted, stats.squares, stats.best, stats.before)
            ),
            start,
            **_options(transform),
            headroom=headroom,
            exps_scale=factor,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            WANT_GRAD=grad is not None,
            WANT_STATS=want_stats,
            COLS=slab.shape[0],
            D=d,
            BLOCK=min(_BLOCK, triton.next_power_of_2(slab.shape[0])),
        )
        if grad is not None:
            _accumulate(grad, exps, slab)
        del logits, exps  # the next slab's arrays take their place
    rows = RowSums(z_y, peak, total)
    if grad is not None and out is not None:
        gradient_kernel[(n,)](
            grad,
            d,
            out,
            out.stride(0),
            weight,
            weight.stride(0),
            target,
            ignored.to(torch.int8),
            z_y,
            total,
            rows.norm,
            **_options(transform),
            exps_scale=factor,
            HAS_SOFTCAP=transform.softcap is not None,
            D=d,
            BLOCK=min(_BLOCK, triton.next_power_of_2(d)),
        )
    return rows, None if stats is None else stats.finish(rows, vocab)


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
    count, d = hidden.shape
    hidden, weight, bias = (
        _rows_contiguous(hidden),
        _rows_contiguous(weight),
        None if bias is None else _rows_contiguous(bias),
    )
    grad = torch.empty(count, d, dtype=hidden.dtype, device=hidden.device) if want_grad else None
    sums: list[RowSums] = []
    parts: list[LogprobStats] = []
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        out = None if grad is None else grad[rows]
        found, stats = _scan(hidden[rows], weight, target[rows], bias, ignored[rows], transform, out, want_stats)
        sums.append(found)
        if stats is not None:
            parts.append(stats)
    joined = join_rows(sums, hidden.new_zeros(0, dtype=torch.float32))
    logps = joined.logps().masked_fill_(ignored, 0.0)
    return PassResult(logps, joined, grad, join_stats(parts, ignored, torch.float32) if want_stats else None)


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
    """Recomputes the logits: slabs outside, chunks inside, so that each weight slab's gradient is summed in fp32 and
    written once."""
    want_hidden, want_weight, want_bias = want
    hidden, weight, bias = (
        _rows_contiguous(hidden),
        _rows_contiguous(weight),
        None if bias is None else _rows_contiguous(bias),
    )
    (count, d), vocab = hidden.shape, weight.shape[0]
    grad_hidden = torch.zeros(count, d, dtype=torch.float32, device=hidden.device) if want_hidden else None
    grad_weight = torch.empty_like(weight) if want_weight else None
    grad_bias = torch.empty_like(bias) if want_bias and bias is not None else None
    factor = row_factor(grad_logps, sums)
    for start in range(0, vocab, COLUMNS):
        columns = slice(start, start + COLUMNS)
        slab = weight[columns]
        width = slab.shape[0]
        sum_weight = torch.zeros(width, d, dtype=torch.float32, device=hidden.device) if want_weight else None
        sum_bias = torch.zeros(width, dtype=torch.float32, device=hidden.device)
        for first in range(0, count, ROWS):
            rows = slice(first, first + ROWS)
            logits = _product(hidden[rows], slab.t())
            coefficients = torch.empty(logits.shape, dtype=hidden.dtype, device=hidden.device)
            block = min(_BLOCK, triton.next_power_of_2(width))
            coefficient_kernel[(logits.shape[0], triton.cdiv(width, block))](
                logits,
                logits.stride(0),
                coefficients,
                coefficients.stride(0),
                logits if bias is None else bias[start:],
                target[rows],
                sums.peak[rows],
                sums.total[rows],
                factor[rows],
                start,
                **_options(transform),
                HAS_BIAS=bias is not None,
                HAS_SOFTCAP=transform.softcap is not None,
                COLS=width,
                BLOCK=block,
            )
            if grad_hidden is not None:
                _accumulate(grad_hidden[rows], coefficients, slab)
            if sum_weight is not None:
                _accumulate(sum_weight, coefficients.t(), hidden[rows])
            if grad_bias is not None:
                sum_bias += coefficients.sum(0, dtype=torch.float32)
            del logits, coefficients  # before the next slab's arrays, not beside them
        if grad_weight is not None and sum_weight is not None:
            grad_weight[columns] = sum_weight
        if grad_bias is not None:
            grad_bias[columns] = sum_bias
    return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias
