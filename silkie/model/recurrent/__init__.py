"""Recurrent layers (linear attention, Mamba-2, short convolutions) in the packed layout.

layers   which layers and modules are recurrent
calls    how often a mixer is called, and which rows together
plan     which tokens each call of a mixer holds, and whose state they start from
fork     the mixer's own forward, called along the plan
probe    whether all that is exact for a model, found out before its weights are loaded
"""

from silkie.model.recurrent.calls import CALLS, SHARED_CALLS, Calls
from silkie.model.recurrent.fork import install
from silkie.model.recurrent.layers import count_recurrent, mask_kinds
from silkie.model.recurrent.plan import ForkPlan, fork_plan
from silkie.model.recurrent.probe import why_not_forkable

__all__ = [
    "CALLS",
    "SHARED_CALLS",
    "Calls",
    "ForkPlan",
    "count_recurrent",
    "fork_plan",
    "install",
    "mask_kinds",
    "why_not_forkable",
]
