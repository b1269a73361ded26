"""Triton kernels of the CUDA pass. Logits arrive in fp32 from the library's matrix product; each is read once.

Legend: n rows of one chunk, D hidden size; one slab is COLS columns of the vocabulary; y the target of a row; c
    ("peak") its anchor.
Row offsets are 64-bit: n * COLS may pass 2^31. Sizes that bound loops are compile-time constants.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _transform(raw, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Final logits: cap(scale * raw). tanh(x) = 1 - 2 / (exp(2x) + 1), which holds where the exponential is 0 or
    infinite too."""
    z = raw * scale
    if HAS_SOFTCAP:
        z = softcap - 2 * softcap / (tl.exp(2 * z / softcap) + 1)
    return z


@triton.jit
def _cap_slope(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """d final / d (scale * raw) at a final logit z: at most 1. The factor `scale` is applied at the end, where nothing
    can overflow."""
    slope = 1.0
    if HAS_SOFTCAP:
        slope = 1 - (z / softcap) * (z / softcap)
    return slope


@triton.jit
def target_logit_kernel(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    target_ptr,
    out_ptr,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = final logit of the target, an fp32 dot product. One program per row; hidden and weight rows
    contiguous."""
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < D
        h = tl.load(hidden_ptr + row * hidden_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + target * weight_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        total += h * w
    raw = tl.sum(total, axis=0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + target).to(tl.float32)
    tl.store(out_ptr + row, _transform(raw, scale, softcap, HAS_SOFTCAP))


@triton.jit
def _sweep(
    logits_ptr,
    exps_ptr,
    bias_ptr,
    peak,
    local,
    scale,
    softcap,
    exps_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    WANT_STATS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One read of a row of the slab, relative to `peak`; the target (column `local`) is left out of all but the sum of
    logits.

    Returns the sum of exponentials, the largest logit, and for statistics the sums of logits, of e * (z - peak) and of
    e^2 and the largest logit left of the target. Writes the exponentials (times the soft-cap's slope) where the
    gradient is wanted."""
    total = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    logits_sum = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    before = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, COLS, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < COLS
        raw = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        z = _transform(raw, scale, softcap, HAS_SOFTCAP)
        other = mask & (offsets != local)
        e = tl.where(other, tl.exp(z - peak), 0.0)
        total += e
        best = tl.maximum(best, tl.where(other, z, -float("inf")))
        if WANT_STATS:
            logits_sum += tl.where(mask, z, 0.0)
            weighted += tl.where(e > 0, e * (z - peak), 0.0)
            squares += e * e
            before = tl.maximum(before, tl.where(other & (offsets < local), z, -float("inf")))
        if WANT_GRAD:
            if HAS_SOFTCAP:
                e = e * _cap_slope(z, softcap, HAS_SOFTCAP)
            tl.store(exps_ptr + offsets, (e * exps_scale).to(exps_ptr.dtype.element_ty), mask=mask)
    return (
        tl.sum(total, axis=0),
        tl.max(best, axis=0),
        tl.sum(logits_sum, axis=0),
        tl.sum(weighted, axis=0),
        tl.sum(squares, axis=0),
        tl.max(before, axis=0),
    )


@triton.jit
def slab_kernel(
    logits_ptr,
    logits_stride,
    exps_ptr,
    exps_stride,
    bias_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    grad_ptr,
    grad_stride,
    logits_sum_ptr,
    weighted_ptr,
    squares_ptr,
    best_ptr,
    before_ptr,
    first_column,
    scale,
    softcap,
    headroom,
    exps_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    WANT_STATS: tl.constexpr,
    COLS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Folds one slab of logits [n, COLS] into the rows' sums and turns it into exponentials. One program per row.

    A row whose largest logit exceeds its anchor by more than `headroom` is read again from a new anchor, that logit,
    and what it summed so far (its gradient too) is rescaled: decided on the device, and normal rows are read once and
    never rescaled."""
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    headroom = tl.cast(headroom, tl.float32)
    exps_scale = tl.cast(exps_scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    exps_ptr += row * exps_stride
    peak = tl.load(peak_ptr + row)
    local = tl.load(target_ptr + row) - first_column
    total, best, logits_sum, weighted, squares, before = _sweep(
        logits_ptr,
        exps_ptr,
        bias_ptr,
        peak,
        local,
        scale,
        softcap,
        exps_scale,
        HAS_BIAS,
        HAS_SOFTCAP,
        WANT_GRAD,
        WANT_STATS,
        COLS,
        BLOCK,
    )
    old_total = tl.load(total_ptr + row)
    rescale = 1.0
    moved = 0.0
    if best > peak + headroom:
        moved = peak - best
        rescale = tl.exp(moved)
        tl.store(peak_ptr + row, best)
        total, best, logits_sum, weighted, squares, before = _sweep(
            logits_ptr,
            exps_ptr,
            bias_ptr,
            best,
            local,
            scale,
            softcap,
            exps_scale,
            HAS_BIAS,
            HAS_SOFTCAP,
            WANT_GRAD,
            WANT_STATS,
            COLS,
            BLOCK,
        )
        if WANT_GRAD:
            for start in range(0, D, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                ptrs = grad_ptr + row * grad_stride + offsets
                tl.store(ptrs, tl.load(ptrs, mask=offsets < D, other=0.0) * rescale, mask=offsets < D)
    tl.store(total_ptr + row, old_total * rescale + total)
    if WANT_STATS:
        tl.store(best_ptr + row, tl.maximum(tl.load(best_ptr + row), best))
        tl.store(logits_sum_ptr + row, tl.load(logits_sum_ptr + row) + logits_sum)
        tl.store(weighted_ptr + row, (tl.load(weighted_ptr + row) + moved * old_total) * rescale + weighted)
        tl.store(squares_ptr + row, tl.load(squares_ptr + row) * rescale * rescale + squares)
        tl.store(before_ptr + row, tl.maximum(tl.load(before_ptr + row), before))


@triton.jit
def gradient_kernel(
    grad_ptr,
    grad_stride,
    out_ptr,
    out_stride,
    weight_ptr,
    weight_stride,
    target_ptr,
    ignored_ptr,
    target_logit_ptr,
    total_ptr,
    norm_ptr,
    scale,
    softcap,
    exps_scale,
    HAS_SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = scale * (total * slope_y * W_y - sum_{v != y} e_v slope_v W_v) / norm; 0 where ignored. One program per
    row."""
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    exps_scale = tl.cast(exps_scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = tl.load(ignored_ptr + row) == 0
    norm = tl.load(norm_ptr + row)
    pull = tl.load(total_ptr + row) * _cap_slope(tl.load(target_logit_ptr + row), softcap, HAS_SOFTCAP)
    for start in range(0, D, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < D
        w = tl.load(weight_ptr + target * weight_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        push = tl.load(grad_ptr + row * grad_stride + offsets, mask=mask, other=0.0) / exps_scale
        value = tl.where(live, scale * (pull * w - push) / norm, 0.0)
        tl.store(out_ptr + row * out_stride + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def coefficient_kernel(
    logits_ptr,
    logits_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    target_ptr,
    peak_ptr,
    total_ptr,
    factor_ptr,
    first_column,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n, v] = factor[n] * (exp(z - c), or -total at the target) * slope_v for one slab. Grid (n, column blocks)."""
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < COLS
    raw = tl.load(logits_ptr + row * logits_stride + offsets, mask=mask, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z = _transform(raw, scale, softcap, HAS_SOFTCAP)
    local = tl.load(target_ptr + row) - first_column
    value = tl.where(offsets == local, -tl.load(total_ptr + row), tl.exp(z - tl.load(peak_ptr + row)))
    value = value * tl.load(factor_ptr + row) * _cap_slope(z, softcap, HAS_SOFTCAP) * scale
    tl.store(out_ptr + row * out_stride + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)
