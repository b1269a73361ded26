"""Pair rows that repeat an image and a prompt, joined into groups: the same loss from far fewer forwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, overload

import datasets
from datasets.fingerprint import Hasher

from silkie.data.schema import is_group_features


@dataclass(slots=True, kw_only=True)
class RegroupReport:
    """What regrouping saved. A pair trainer runs image, prompt and response once per response of every pair.

    Attributes:
        rows, groups: before and after.
        pairs: number of pairs (rows that repeat a pair add to its weight).
        response_forwards, responses: sequences that a pair trainer runs per pass, and distinct responses.
        contradictions: pairs of responses that occur in both orders.
    """

    rows: int
    groups: int
    pairs: int
    response_forwards: int
    responses: int
    contradictions: int

    @property
    def prompt_forwards_saved(self) -> int:
        """Passes over image and prompt that packing saves per epoch and per model (policy, reference)."""
        return self.response_forwards - self.groups

    def summary(self) -> str:
        text = (
            f"regrouped {self.rows:,} pair rows into {self.groups:,} groups: {self.response_forwards:,} sequences"
            f" become {self.responses:,}, and {self.prompt_forwards_saved:,} passes over image and prompt are saved"
        )
        return text + (f"; {self.contradictions:,} pairs occur in both orders" if self.contradictions else "")


@overload
def regroup(
    dataset: datasets.Dataset, *, return_report: Literal[False] = False, cache_dir: str | None = ...
) -> datasets.Dataset: ...
@overload
def regroup(
    dataset: datasets.Dataset, *, return_report: Literal[True], cache_dir: str | None = ...
) -> tuple[datasets.Dataset, RegroupReport]: ...


def regroup(
    dataset: datasets.Dataset, *, return_report: bool = False, cache_dir: str | None = None
) -> datasets.Dataset | tuple[datasets.Dataset, RegroupReport]:
    """Join the rows that share images and prompt. Takes groups, or TRL pair rows as they are.

    Equal responses are stored once. A pair that occurs in several rows gets the sum of their weights, so that the
    weighted mean over all pairs, the loss, is the one of the pair rows. Images are equal when their bytes are, or,
    where only a path is stored, when the path is. Groups come in the order of their first row. A dataset without
    repeats is returned as it is."""
    if not is_group_features(dataset.features):
        from silkie.data.loading import (
            load_preferences,  # a cycle at import time only: loading regroups what it has read
        )

        dataset = load_preferences(dataset, regroup_pairs=False, cache_dir=cache_dir)
    clusters = _clusters(dataset)
    if len(clusters) == len(dataset):
        joined = dataset
    else:
        starts = range(0, len(clusters), 2048)
        joined = datasets.Dataset.from_generator(
            _joined,
            features=dataset.features,
            gen_kwargs={"dataset": dataset, "clusters": [clusters[start : start + 2048] for start in starts]},
            cache_dir=cache_dir,
            fingerprint=Hasher.hash(["regroup", 1, dataset._fingerprint]),
        )
    return (joined, _report(dataset, joined)) if return_report else joined


def _clusters(dataset: datasets.Dataset) -> list[list[int]]:
    """Row numbers by image and prompt, in order of first occurrence. Holds 16 bytes of hash per row, never an image."""
    found: dict[bytes, list[int]] = {}
    keys = dataset.select_columns(["images", "prompt"])
    for index, row in enumerate(keys):
        found.setdefault(_key(row), []).append(index)
    return list(found.values())


def _key(row: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for image in row["images"]:
        data = image["bytes"]
        digest.update(
            b"bytes" + hashlib.blake2b(data, digest_size=16).digest()
            if data is not None
            else b"path" + image["path"].encode()
        )
    digest.update(json.dumps(row["prompt"]).encode())
    return digest.digest()


def _joined(dataset: datasets.Dataset, clusters: list[list[list[int]]]) -> Iterator[dict[str, Any]]:
    for part in clusters:
        for rows in part:
            yield dataset[rows[0]] if len(rows) == 1 else join_groups([dataset[row] for row in rows])


def join_groups(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Several groups of one image and prompt as one group: distinct responses, pairs renumbered, weights of equal pairs
    summed."""
    position: dict[str, int] = {}
    per_response: dict[str, list[Any]] = {name: [] for name in ("models", "ratings", "rationales") if name in groups[0]}
    weights: dict[tuple[int, int], float] = {}
    for group in groups:
        renumbered = []
        for index, response in enumerate(group["responses"]):
            new = position.setdefault(response, len(position))
            renumbered.append(new)
            for name, values in per_response.items():
                value = group[name][index] if group[name] else None
                if new == len(values):
                    values.append(value)
                elif values[new] is None:
                    values[new] = value
        for (chosen, rejected), weight in zip(group["pairs"], group["pair_weights"], strict=True):
            pair = (renumbered[chosen], renumbered[rejected])
            weights[pair] = weights.get(pair, 0.0) + weight
    joined = dict(
        groups[0], responses=list(position), pairs=[list(pair) for pair in weights], pair_weights=list(weights.values())
    )
    # a rating struct must be there for every response or for none; a model name may be missing for some
    joined.update(
        {
            name: values if (name == "models" and any(values)) or all(values) else None
            for name, values in per_response.items()
        }
    )
    return joined


def _report(before: datasets.Dataset, after: datasets.Dataset) -> RegroupReport:
    contradictions = pairs = responses = 0
    for row in after.select_columns(["pairs", "responses"]):
        given = {tuple(pair) for pair in row["pairs"]}
        contradictions += sum((rejected, chosen) in given for chosen, rejected in given) // 2
        pairs += len(given)
        responses += len(row["responses"])
    forwards = sum(2 * len(row["pairs"]) for row in before.select_columns(["pairs"]))
    return RegroupReport(
        rows=len(before),
        groups=len(after),
        pairs=pairs,
        response_forwards=forwards,
        responses=responses,
        contradictions=contradictions,
    )
