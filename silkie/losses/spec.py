"""`@loss(...)`: declares a function as a preference loss, with everything that the objective must know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

Inputs = Literal["reference", "lengths", "sft", "image", "anchor", "listwise", "labelled"]
Unit = Literal["pair", "token", "group", "example"]
Function = TypeVar("Function", bound=Callable[..., Tensor])


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """How the objective calls a loss.

    Attributes:
        fn: the pure function.
        inputs: what it is called with. reference: chosen, rejected, ref_chosen, ref_rejected. lengths: chosen, rejected
            and their lengths. sft: chosen. image: chosen, corrupted and their references. anchor: chosen, ref_chosen.
            listwise: all responses and the pairs. labelled: log-probs, references and labels of single responses.
        options: keyword of the function -> field of `LossOptions`.
        normalized: it also takes the lengths of a pair, as keywords.
        unit: what its sum is divided by. pair: sum of pair weights. token: chosen tokens, weighted. group: groups with
            a ranking. example: sum of the weights of labelled responses.
        permutes: its rows are quantiles of the batch and not pairs, so that a pair weight has no row.
        difference: it depends on the difference of two scores only, so that f-divergences generalise it: the partition
            function of the implicit reward cancels in the difference, and nowhere else.
        offset: `margin="offset"` has a meaning: its logit may be asked to exceed the rating gap.
        kl: it also takes the estimate of the KL divergence, as keyword.
    """

    fn: Callable[..., Tensor]
    inputs: Inputs
    options: Mapping[str, str]
    normalized: bool = False
    unit: Unit = "pair"
    permutes: bool = False
    difference: bool = False
    offset: bool = False
    kl: bool = False


BETA = {"beta": "beta"}
SMOOTHED = {"beta": "beta", "label_smoothing": "label_smoothing"}

DECLARED: dict[str, LossSpec] = {}


def loss(
    inputs: Inputs,
    options: Mapping[str, str],
    *,
    normalized: bool = False,
    unit: Unit = "pair",
    permutes: bool = False,
    difference: bool = False,
    offset: bool = False,
    kl: bool = False,
) -> Callable[[Function], Function]:
    """Declares a function as the loss of its name. The arguments are those of `LossSpec`."""

    def declare(fn: Function) -> Function:
        DECLARED[fn.__name__] = LossSpec(
            fn=fn,
            inputs=inputs,
            options=options,
            normalized=normalized,
            unit=unit,
            permutes=permutes,
            difference=difference,
            offset=offset,
            kl=kl,
        )
        return fn

    return declare
