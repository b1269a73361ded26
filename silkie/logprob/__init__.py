"""Exact log-probs of a linear output head, fast and small in memory; usable alone.

    from silkie.logprob import linear_logprob
    logps = linear_logprob(hidden, lm_head.weight, target)         # fp32 [N], differentiable

Layers, each tested against the one before it:

    reference   full logits by autograd, float64 capable: the truth
    tiled       pure torch, tile by tile, any device: the CPU path
    api         checks, and the one place that picks an implementation
    head        the weight a head really applies: LoRA-wrapped, trained in full, or sharded

Legend: N scored tokens, D hidden size, V vocabulary size.
"""

from silkie.logprob.api import linear_logprob
from silkie.logprob.head import HeadOptions, HeadWeight, head_options, head_weight
from silkie.logprob.types import Impl, LogprobStats

__all__ = ["HeadOptions", "HeadWeight", "Impl", "LogprobStats", "head_options", "head_weight", "linear_logprob"]
