"""The one table of losses: what each is computed from, which options it reads, and how its terms are averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from . import listwise, multimodal, pairwise, reference_free

Inputs = Literal["reference", "lengths", "sft", "image", "anchor", "listwise"]
Unit = Literal["pair", "token", "group"]

# The losses of a difference of two scores: the others have no offset and no f-divergence generalisation, because the
# partition function of the implicit reward cancels only in the difference.
DIFFERENCE = frozenset({"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """How the objective calls a loss.

    Attributes:
        fn: the pure function.
        inputs: what it is called with. reference: chosen, rejected, ref_chosen, ref_rejected. lengths: chosen, rejected
            and their lengths. sft: chosen. image: chosen, corrupted and their references. anchor: chosen, ref_chosen.
            listwise: all responses and the pairs.
        options: keyword of the function -> field of `LossOptions`.
        normalized: it also takes the lengths of a pair, as keywords.
        unit: what its sum is divided by. pair: sum of pair weights. token: chosen tokens, weighted. group: groups with
            a ranking.
        permutes: its rows are quantiles of the batch and not pairs, so that a pair weight has no row.
    """

    fn: Callable[..., Tensor]
    inputs: Inputs
    options: dict[str, str]
    normalized: bool = False
    unit: Unit = "pair"
    permutes: bool = False


_BETA = {"beta": "beta"}
_SMOOTH = {"beta": "beta", "label_smoothing": "label_smoothing"}

SPECS: dict[str, LossSpec] = {
    "sigmoid": LossSpec(fn=pairwise.sigmoid, inputs="reference", options=_SMOOTH),
    "sigmoid_norm": LossSpec(fn=pairwise.sigmoid_norm, inputs="reference", options=_SMOOTH, normalized=True),
    "robust": LossSpec(fn=pairwise.robust, inputs="reference", options=_SMOOTH),
    "hinge": LossSpec(fn=pairwise.hinge, inputs="reference", options=_BETA),
    "ipo": LossSpec(fn=pairwise.ipo, inputs="reference", options=_BETA, normalized=True),
    "exo_pair": LossSpec(fn=pairwise.exo_pair, inputs="reference", options=_SMOOTH),
    "nca_pair": LossSpec(fn=pairwise.nca_pair, inputs="reference", options=_BETA),
    "bco_pair": LossSpec(fn=pairwise.bco_pair, inputs="reference", options=_BETA),
    "sppo_hard": LossSpec(fn=pairwise.sppo_hard, inputs="reference", options=_BETA),
    "apo_zero": LossSpec(fn=pairwise.apo_zero, inputs="reference", options=_BETA),
    "apo_down": LossSpec(fn=pairwise.apo_down, inputs="reference", options=_BETA),
    "aot": LossSpec(fn=pairwise.aot, inputs="reference", options=_SMOOTH, permutes=True),
    "aot_unpaired": LossSpec(fn=pairwise.aot_unpaired, inputs="reference", options=_SMOOTH, permutes=True),
    "discopop": LossSpec(fn=pairwise.discopop, inputs="reference", options={"beta": "beta", "tau": "discopop_tau"}),
    "simpo": LossSpec(fn=reference_free.simpo, inputs="lengths", options={**_SMOOTH, "gamma": "simpo_gamma"}),
    "cpo": LossSpec(fn=reference_free.cpo, inputs="lengths", options=_SMOOTH),
    "orpo": LossSpec(fn=reference_free.orpo, inputs="lengths", options=_BETA),
    "sft": LossSpec(fn=reference_free.sft, inputs="sft", options={}, unit="token"),
    "mdpo_image": LossSpec(fn=multimodal.mdpo_image, inputs="image", options=_BETA),
    "mdpo_anchor": LossSpec(
        fn=multimodal.mdpo_anchor, inputs="anchor", options={"beta": "beta", "anchor": "mdpo_anchor"}
    ),
    "plackett_luce": LossSpec(fn=listwise.plackett_luce, inputs="listwise", options=_BETA, unit="group"),
}

LOSSES: dict[str, Callable[..., Tensor]] = {name: spec.fn for name, spec in SPECS.items()}
