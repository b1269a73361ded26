"""Labelled responses for the losses that take no pairs, and the responses of other prompts for their estimate of the KL
divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from silkie.data.pairs import mean_ratings

Row = Mapping[str, Any]


class Example(NamedTuple):
    """A response of a group with its label. `weight` 2 counts as two rows of unpaired data."""

    response: int
    desirable: bool
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Which responses of a group are desirable and which are not.

    Attributes:
        threshold: responses of a higher mean rating are desirable, those of a lower one undesirable, others neither.
            None: the labels of the data, and in a group without labels its pairs: the chosen response of each is
            desirable, the rejected one undesirable, as TRL unpairs them.
        mismatched: each prompt also scores the responses of another group of its micro-batch (`with_mismatched`).
    """

    threshold: float | None
    mismatched: bool

    def examples(self, row: Row) -> list[Example]:
        """The labelled responses of a row; a response of several pairs has one example per pair."""
        if self.threshold is not None:
            means = mean_ratings(row.get("ratings") or [])
            # NaN, a response that is not rated, is neither above nor below
            above = [
                (i, mean > self.threshold)
                for i, mean in enumerate(means)
                if mean > self.threshold or mean < self.threshold
            ]
            found = [Example(i, desirable, 1.0) for i, desirable in above]
        elif row.get("labels"):
            found = [Example(i, label, 1.0) for i, label in enumerate(row["labels"]) if label is not None]
        else:
            weights = row.get("pair_weights") or [1.0] * len(row["pairs"])
            pairs = list(zip(row["pairs"], weights, strict=True))
            found = [Example(pair[side], side == 0, weight) for side in (0, 1) for pair, weight in pairs]
        return [example._replace(weight=0.0) for example in found] if row.get("empty") else found

    def tensors(self, rows: Sequence[Row], added: Sequence[Sequence[float]]) -> dict[str, Tensor]:
        """`examples`, `desirable`, `example_weights`, `mismatched` and `mismatched_weights` of a batch.

        Args:
            rows: as in the data.
            added: weights of the responses that stand behind those of each row, as `with_mismatched` returns them.
        """
        examples: list[Example] = []
        mismatched: list[int] = []
        first = 0
        for row, weights in zip(rows, added, strict=True):
            examples += [e._replace(response=first + e.response) for e in self.examples(row)]
            first += len(row["responses"])
            mismatched += range(first, first + len(weights))
            first += len(weights)
        return {
            "examples": torch.tensor([e.response for e in examples], dtype=torch.long),
            "desirable": torch.tensor([e.desirable for e in examples], dtype=torch.bool),
            "example_weights": torch.tensor([e.weight for e in examples], dtype=torch.float32),
            "mismatched": torch.tensor(mismatched, dtype=torch.long),
            "mismatched_weights": torch.tensor([w for own in added for w in own], dtype=torch.float32),
        }

    def with_mismatched(self, rows: Sequence[Row]) -> tuple[list[Row], list[list[float]]]:
        """Each row with the labelled responses of the row before it (of the last row for the first) behind its own, so
        that the responses that estimate the KL divergence are those that are trained on, under other prompts. With one
        response per row these are TRL's: (x_1, y_n), (x_2, y_1), ..., (x_n, y_{n-1}). A row that is alone scores its
        own.

        Returns:
            The rows, and for each the weights of what was added to it.
        """
        added: list[Row] = []
        weights = []
        for g, row in enumerate(rows):
            # an answer in several turns is written in another form than one of text
            other = next(o for o in (*reversed(rows[:g]), *reversed(rows[g:])) if o.get("form") == row.get("form"))
            own: dict[int, float] = {}
            for example in self.examples(other):
                own[example.response] = own.get(example.response, 0.0) + example.weight
            ratings = [*row["ratings"], *(None for _ in own)] if row.get("ratings") else None
            responses = [*row["responses"], *(other["responses"][i] for i in own)]
            added.append({**row, "responses": responses, "ratings": ratings})
            weights.append([0.0 if row.get("empty") else weight for weight in own.values()])
        return added, weights
