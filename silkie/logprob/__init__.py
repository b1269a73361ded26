"""Exact log-probs of a linear output head, fast and small in memory; usable alone.

    from silkie.logprob import linear_logprob
    logps = linear_logprob(hidden, lm_head.weight, target)         # fp32 [N], differentiable

Layers, each tested against the truth:

    reference       full logits by autograd, float64 capable: the truth
    tiled           pure torch, tile by tile, any device: the CPU path
    triton_pass     CUDA: library matrix products with fp32 logits, one Triton kernel per slab (triton_kernels)
    autograd        gradient in the forward pass for a frozen head, recompute for a trainable one
    sums            from running sums to log-probs and statistics
    api             checks, and the one place that picks an implementation
    head            the weight a head really applies: LoRA-wrapped, trained in full, or sharded

Legend: N scored tokens, D hidden size, V vocabulary size; z_NV logits; y_N targets; n rows of one chunk.
"""

from silkie.logprob.api import linear_logprob
from silkie.logprob.head import HeadOperands, HeadOptions, head_operands, head_options
from silkie.logprob.types import Impl, LogprobStats

__all__ = ["HeadOperands", "HeadOptions", "Impl", "LogprobStats", "head_operands", "head_options", "linear_logprob"]
