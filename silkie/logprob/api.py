"""The public function of the log-prob core: checks its inputs once and picks the implementation."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable
from functools import cache, partial
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from silkie.logprob import tiled
from silkie.logprob.autograd import Backend, fused_logprob
from silkie.logprob.reference import reference_logprob
from silkie.logprob.types import Impl, LogitTransform, LogprobStats

logger = logging.getLogger(__name__)

_Implementation = Callable[
    [Tensor, Tensor, Tensor, Tensor | None, Tensor, LogitTransform, bool], tuple[Tensor, LogprobStats | None]
]


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    impl: Impl = "auto",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    impl: Impl = "auto",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: Literal[True],
) -> tuple[Tensor, LogprobStats]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    impl: Impl = "auto",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LogprobStats]:
    """Log-probs of target tokens under a linear output head, without holding the [N, V] logits.

    Equation: `z = cap(logit_scale * (hidden @ weight.T + bias))`, `logp[n] = z[n, y_n] - log sum_v exp z[n, v]`, with
    `cap(x) = softcap * tanh(x / softcap)`. Equivalent PyTorch::

        logits = logit_scale * F.linear(hidden, weight, bias).float()
        logits = softcap * torch.tanh(logits / softcap)            # when softcap is given
        logps = -F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")

    Args:
        hidden: [N, D] final hidden states of the scored tokens; bf16, fp16, fp32 or fp64, any strides.
        weight: [V, D] output head, of hidden's dtype and device.
        target: [N] int64 token ids in [0, V), or `ignore_index`.
        bias: [V] or None.
        ignore_index: tokens with this target get log-prob 0 and no gradient.
        impl: "reference" (full logits, twice differentiable), "tiled" (pure torch, any device), "triton" (CUDA), or
            "auto": triton on CUDA where it can run, tiled everywhere else.
        softcap: the model's final logit soft-cap, or None.
        logit_scale: the model's logit multiplier.
        return_stats: also return `LogprobStats` (no gradient).

    Returns:
        fp32 [N] (fp64 for fp64 inputs), differentiable in `hidden`, and in `weight` and `bias` where they require a
        gradient. With a frozen head the gradient is computed in the forward pass (4NVD operations; 2NVD under
        `no_grad`, nothing stored); with a trainable head the logits are recomputed in backward. Under autocast the
        operands are cast to its dtype, as `F.linear` would.

    Raises:
        ValueError: shapes, devices, dtypes or options that do not fit; on CPU also a target outside [0, V). On CUDA a
            bad target fails a device-side assertion (no host synchronisation), reported by the next synchronising call.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check(hidden, weight, target, bias, softcap, logit_scale)
    ignored = target == ignore_index
    _check_targets(target, ignored, weight.shape[0])
    safe_target = target.masked_fill(ignored, 0)
    transform = LogitTransform(float(logit_scale), None if softcap is None else float(softcap))
    run = _implementation(impl, hidden.device.type, hidden.dtype)
    # Triton launches on the current device, which need not be the head's where a model is spread over several
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        logps, stats = run(hidden, weight, safe_target, bias, ignored, transform, return_stats)
    if return_stats:
        assert stats is not None
        return logps, stats
    return logps


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts the operands as autocast would for `F.linear`: float64 is left alone."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> None:
    def fail(what: str) -> None:
        raise ValueError(f"linear_logprob: {what}")

    if weight.numel() == 0:  # what ZeRO-3 leaves of a partitioned weight has the shape (0,)
        fail(
            f"weight of shape {tuple(weight.shape)} is empty; a sharded head must be gathered first"
            " (silkie.logprob.head_operands)"
        )
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        fail(f"expected hidden [N, D] and weight [V, D], found {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target.shape != hidden.shape[:1]:
        fail(f"expected target of shape ({hidden.shape[0]},), one id per hidden row, found {tuple(target.shape)}")
    if target.dtype != torch.int64:
        fail(f"expected target of dtype torch.int64, found {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        fail(f"expected bias of shape ({weight.shape[0]},), found {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("target", target), ("bias", bias)):
        if other is not None and other.device != hidden.device:
            fail(f"hidden is on {hidden.device} but {name} is on {other.device}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != hidden.dtype:
            fail(f"hidden is {hidden.dtype} but {name} is {other.dtype}; cast one of them, or call under autocast")
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        fail(f"expected a floating dtype, found {hidden.dtype}")
    if softcap is not None and not 0 < softcap < math.inf:
        fail(f"softcap must be positive and finite, or None, found {softcap}")
    if not math.isfinite(logit_scale):
        fail(f"logit_scale must be finite, found {logit_scale}")


def _check_targets(target: Tensor, ignored: Tensor, vocab: int) -> None:
    """On CUDA the check stays on the device: an assertion that the next synchronisation reports."""
    inside = ignored | ((target >= 0) & (target < vocab))
    if target.is_cuda:
        torch._assert_async(inside.all(), f"linear_logprob: a target token lies outside [0, {vocab})")
    elif not bool(inside.all()):
        bad = target[~inside][0].item()
        raise ValueError(
            f"linear_logprob: target token {bad} lies outside [0, {vocab}); is the tokenizer larger than the output"
            " head?"
        )


def _implementation(impl: str, device: str, dtype: torch.dtype) -> _Implementation:
    """The dispatch point: which implementation runs. It says once what it chose, and why."""
    if impl not in get_args(Impl):
        raise ValueError(f"linear_logprob: impl must be one of {', '.join(get_args(Impl))}; found {impl!r}")
    obstacle = _triton_obstacle(device, dtype) if impl in ("auto", "triton") else None
    if impl == "triton" and obstacle:
        raise ValueError(f"linear_logprob: impl='triton' cannot run here: {obstacle}; use impl='auto'")
    chosen = impl if impl != "auto" else ("tiled" if obstacle else "triton")
    _announce(impl, chosen, device, obstacle)
    if chosen == "reference":
        return reference_logprob
    return partial(fused_logprob, _backend(chosen))


def _triton_obstacle(device: str, dtype: torch.dtype) -> str | None:
    """Why the Triton pass cannot run, or None. Under Triton's interpreter it runs on CPU tensors (for tests)."""
    if dtype == torch.float64:
        return "it has no float64 form"
    if not _has_triton():
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"the tensors are on {device}, it needs CUDA"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _backend(name: str) -> Backend:
    if name == "tiled":
        return tiled
    from silkie.logprob import triton_pass  # imports triton, which not every platform has

    return triton_pass


@cache
def _announce(asked: str, chosen: str, device: str, obstacle: str | None) -> None:
    logger.info("linear_logprob: impl=%s -> %s on %s%s", asked, chosen, device, f" ({obstacle})" if obstacle else "")
