"""Pair rows that repeat an image and a prompt, joined into groups: the same loss from far fewer forwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher

from silkie.data.check import PER_RESPONSE
from silkie.data.images import encoded_size, image_digest
from silkie.data.reports import RegroupReport
from silkie.data.schema import ROW_FORM, DataError, is_group_features
from silkie.data.stamps import fingerprint_of


def regroup(
    dataset: datasets.Dataset, *, return_report: bool = False, cache_dir: str | None = None
) -> datasets.Dataset:
    """Join the groups that share images and prompt. `load_preferences` does so by itself.

    Equal responses are stored once. A pair that occurs in several rows gets the sum of their weights, so that the
    weighted mean over all pairs, the loss, is the one of the pair rows. Images are equal when their bytes are, under
    whatever names they are stored. Groups come in the order of their first row. A dataset without
    repeats is returned as it is. With `return_report` the result is that of `regroup_with_report`.

    Raises DataError where `dataset` does not hold preference groups."""
    joined, report = regroup_with_report(dataset, cache_dir=cache_dir)
    return cast(Any, (joined, report)) if return_report else joined


def regroup_with_report(
    dataset: datasets.Dataset, *, cache_dir: str | None = None
) -> tuple[datasets.Dataset, RegroupReport]:
    """`regroup`, and what it saved."""
    if not is_group_features(dataset.features):
        raise DataError(
            f"not preference groups (columns {', '.join(dataset.column_names)}): load them with load_preferences, which"
            " also joins the rows that share images and prompt"
        )
    clusters = _clusters(dataset)
    if len(clusters) == len(dataset):
        joined = dataset
    else:
        # `datasets` takes the elements of a list in gen_kwargs for shards, so it gets a few long parts
        starts = range(0, len(clusters), 2048)
        joined = datasets.Dataset.from_generator(
            _joined,
            features=dataset.features,
            gen_kwargs={"dataset": dataset, "clusters": [clusters[start : start + 2048] for start in starts]},
            cache_dir=cache_dir,
            fingerprint=Hasher.hash(["regroup", 2, fingerprint_of(dataset), clusters]),
        )
    return joined, _report(dataset, joined)


def _clusters(dataset: datasets.Dataset) -> list[list[int]]:
    """Row numbers by image and prompt, in order of first occurrence. Holds 32 bytes of hash per row, never an image."""
    found: dict[bytes, dict[bytes, list[int]]] = {}  # prompt -> its images -> rows
    by_path: set[bytes] = set()  # prompts with an image of which only a path is stored
    keys = dataset.select_columns(["images", "prompt", *(name for name in ROW_FORM if name in dataset.column_names)])
    for index, row in enumerate(keys):
        prompt = _prompt_key(row)
        found.setdefault(prompt, {}).setdefault(_images_key(row["images"]), []).append(index)
        if any(image["bytes"] is None for image in row["images"]):
            by_path.add(prompt)
    clusters: list[list[int]] = []
    for prompt, rows in found.items():
        several = prompt in by_path and len(rows) > 1
        clusters += _joined_by_bytes(dataset, list(rows.values())) if several else rows.values()
    return sorted(clusters)


def _prompt_key(row: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(json.dumps(row["prompt"]).encode(), digest_size=16)
    if form := [row[name] for name in ROW_FORM if row.get(name) is not None]:
        digest.update(json.dumps(form).encode())
    return digest.digest()


def _images_key(images: list[dict[str, Any]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        data = image["bytes"]
        digest.update(
            b"bytes" + hashlib.blake2b(data, digest_size=16).digest()
            if data is not None
            else b"path" + image["path"].encode()
        )
    return digest.digest()


def _joined_by_bytes(dataset: datasets.Dataset, clusters: list[list[int]]) -> list[list[int]]:
    """Clusters of one prompt, joined where their images are equal under several names. Only files of equal size are
    read; an image that cannot be read is equal to itself alone."""
    joined = []
    for alike in _alike(dataset, clusters, encoded_size):
        for same in _alike(dataset, alike, image_digest) if len(alike) > 1 else [alike]:
            joined.append(sorted(row for cluster in same for row in cluster))
    return joined


def _alike(dataset: datasets.Dataset, clusters: list[list[int]], of: Callable[[Any], Any]) -> Iterable[list[list[int]]]:
    """Clusters by what `of` says of the images of their first rows."""
    found: dict[Any, list[list[int]]] = {}
    for cluster in clusters:
        try:
            key: Any = tuple(of(image) for image in dataset[cluster[0]]["images"])
        except DataError:
            key = cluster[0]
        found.setdefault(key, []).append(cluster)
    return found.values()


def _joined(dataset: datasets.Dataset, clusters: list[list[list[int]]]) -> Iterator[dict[str, Any]]:
    for part in clusters:
        for rows in part:
            yield dataset[rows[0]] if len(rows) == 1 else join_groups([dataset[row] for row in rows])


def join_groups(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Several groups of one image and prompt as one group: distinct responses, pairs renumbered, weights of equal pairs
    summed."""
    position: dict[Any, int] = {}
    per_response: dict[str, list[Any]] = {name: [] for name in PER_RESPONSE if name in groups[0]}
    weights: dict[tuple[int, int], float] = {}
    for group in groups:
        renumbered = []
        for index, response in enumerate(group["responses"]):
            # each label is one opinion: equal responses with labels stay apart, as unpaired rows do
            key = response if group.get("labels") is None else (response, len(position))
            new = position.setdefault(key, len(position))
            renumbered.append(new)
            for name, values in per_response.items():
                value = group[name][index] if group[name] else None
                if new == len(values):
                    values.append(value)
                elif values[new] is None:
                    values[new] = value
        own = group["pair_weights"] or [1.0] * len(group["pairs"])
        for (chosen, rejected), weight in zip(group["pairs"], own, strict=True):
            pair = (renumbered[chosen], renumbered[rejected])
            weights[pair] = weights.get(pair, 0.0) + weight
    joined = dict(
        groups[0],
        responses=[key if isinstance(key, str) else key[0] for key in position],
        pairs=[list(pair) for pair in weights],
        pair_weights=list(weights.values()),
    )
    joined.update({name: values if _complete(name, values) else None for name, values in per_response.items()})
    return joined


def _complete(name: str, values: list[Any]) -> bool:
    """Whether values of all responses are kept: a rating struct must be there for every response or for none; a model
    name or a label may be missing for some."""
    return any(value is not None for value in values) if name in ("models", "labels") else all(values)


def _report(before: datasets.Dataset, after: datasets.Dataset) -> RegroupReport:
    contradictions = pairs = responses = 0
    for row in after.select_columns(["pairs", "responses"]):
        given = {tuple(pair) for pair in row["pairs"]}
        contradictions += sum((rejected, chosen) in given for chosen, rejected in given) // 2
        pairs += len(given)
        responses += len(row["responses"])
    given_rows = before.select_columns(["pairs", "responses"])
    forwards = sum(2 * len(row["pairs"]) or len(row["responses"]) for row in given_rows)
    return RegroupReport(
        rows=len(before),
        groups=len(after),
        pairs=pairs,
        response_forwards=forwards,
        responses=responses,
        contradictions=contradictions,
    )
