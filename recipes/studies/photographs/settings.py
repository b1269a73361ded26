"""Sizes of a run, and the ways of learning that are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from photographs.base import BaseSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything. `boards`: prompts per round come from so many; `questions`: yes/no questions per board
    beside its description. `held_out`: boards described; `question_boards`: boards of each set of yes/no questions;
    `development`: boards of `--explore`."""

    base: BaseSizes = field(default_factory=BaseSizes)
    boards: int = 120
    questions: int = 0
    responses: int = 4
    held_out: int = 300
    sampled: int = 300
    development: int = 128
    question_boards: int = 25


QUICK = Sizes(
    base=BaseSizes(eye_boards=600, described=400, asked=80),
    boards=60,
    held_out=60,
    sampled=40,
    development=60,
    question_boards=15,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn, for preferences and for the sampled evaluation alike."""

    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of learning from rated responses.

    Args:
        group: what the oracle pays for a thing that is called by its group's name; its own name pays 1.
        pairs: an argument of `silkie.data.load_preferences`.
        aspects: rating aspects that make the pairs; empty: the mean of all.
        min_margin: pairs whose ratings differ by less are dropped.
        shuffled: the two sides of every pair are drawn anew.
        rounds: on-policy rounds of sample -> rate -> train, with the prompts divided among them.
        options: further fields of SilkieDPOConfig.
    """

    name: str
    title: str
    group: float = 0.5
    pairs: str = "all"
    aspects: tuple[str, ...] = ()
    min_margin: float = 0.0
    losses: tuple[str, ...] = ("sigmoid", "sft")
    loss_weights: tuple[float, ...] = (1.0, 0.2)
    beta: float = 0.1
    learning_rate: float = 1e-3
    epochs: float = 2.0
    batch: int = 8
    shuffled: bool = False
    rounds: int = 1
    temperature: float | None = None
    top_p: float | None = None
    responses: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


DPO = Arm(name="dpo", title="DPO")
CONTROLS = (
    Arm(name="sft", title="SFT on the best", pairs="best_vs_worst", losses=("sft",), loss_weights=(1.0,)),
    replace(DPO, name="shuffled", title="DPO, shuffled preferences", shuffled=True),
    replace(DPO, name="longest", title="DPO, longest-as-best", pairs="longest"),
    replace(DPO, name="helpfulness", title="DPO, helpfulness only", aspects=("Helpfulness",)),
    replace(DPO, name="faithfulness", title="DPO, faithfulness only", aspects=("Visual Faithfulness",)),
)
ARMS = {arm.name: arm for arm in (DPO, *CONTROLS)}
