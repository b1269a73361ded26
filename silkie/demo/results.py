"""The values of a demo run: which recipes are trained, how much of everything there is, what was measured, and how long
it took. The loop fills them, the pages and the studies read them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silkie.stats import Estimate

Scores = dict[str, dict[str, list[float]]]
"""decoding -> metric -> [mean, low, high] over images"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to learn from the same rated responses."""

    name: str
    title: str
    pairs: str = "all"
    losses: tuple[str, ...] = ("sigmoid", "sft")
    loss_weights: tuple[float, ...] = (1.0, 0.2)
    shuffled: bool = False
    epochs: float = 2.0
    learning_rate: float = 1e-3
    options: Mapping[str, Any] = field(default_factory=dict)  # further fields of SilkieDPOConfig


DPO = Recipe(name="dpo", title="DPO")
CONTROLS = (
    Recipe(name="sft", title="SFT on the best", pairs="best_vs_worst", losses=("sft",), loss_weights=(1.0,)),
    Recipe(name="shuffled", title="DPO, shuffled preferences", shuffled=True),
    Recipe(name="longest", title="DPO, longest-as-best", pairs="longest"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything; the defaults make a run of 404 CPU seconds, under five minutes on two free cores."""

    images: int = 400
    card_images: int = 120
    questions: int = 3
    mme_images: int = 40
    pope_images: int = 30
    captions: int = 150
    red_team_images: int = 80


@dataclass(slots=True)
class Summary:
    """What a run measured. `scores`: policy -> decoding -> metric -> Estimate; `print` it for the table."""

    base_dir: str
    seed: int
    groups: int
    pairs: int
    scores: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    table: str = ""

    def __str__(self) -> str:
        return self.table

    def to_json(self) -> dict[str, Any]:
        scores = {
            policy: {mode: {key: list(value) for key, value in metrics.items()} for mode, metrics in modes.items()}
            for policy, modes in self.scores.items()
        }
        return {
            "seed": self.seed,
            "groups": self.groups,
            "pairs": self.pairs,
            "seconds": self.seconds,
            "policies": self.titles,
            "scores": scores,
        }


class Watch:
    """Seconds per part of the run: `with watch("name"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Timer:
        return _Timer(self.seconds, name)


class _Timer:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start, 1)


def cached(file: Path, compute: Callable[[], Any]) -> Any:
    """The result in `file`, computed and stored (whole, by renaming) where it is missing."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        value = compute()
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(value) + "\n", encoding="utf-8")
        unfinished.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))
