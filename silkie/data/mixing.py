"""Several preference datasets as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import datasets

from silkie.data.schema import DataError, aspects_of, group_features, is_group_features


def mix(
    parts: Sequence[datasets.Dataset],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted",
) -> datasets.Dataset:
    """Join datasets of groups whose rating aspects may differ.

    Pairs stay as they were built for each part. Where aspects differ, every group gets the aspects of all parts, null
    where it was not rated; its mean rating stays that over its own aspects.

    Args:
        weights: how often each part is drawn from, in any scale; None joins all groups of all parts, one part after the
            other.
        stop: with weights, end when the first part is used up, or when every part is; groups of the smaller parts are
            then repeated.
    """
    if not parts:
        raise ValueError("nothing to mix: no dataset given")
    for index, part in enumerate(parts):
        if not is_group_features(part.features):
            columns = ", ".join(part.column_names)
            raise DataError(
                f"part {index} is not a dataset of preference groups (columns {columns}); load it with load_preferences"
            )
    aspects = tuple(dict.fromkeys(aspect for part in parts for aspect in aspects_of(part.features)))
    aligned = [with_aspects(part, aspects) for part in parts]
    if weights is None:
        return datasets.concatenate_datasets(aligned)
    if len(weights) != len(parts) or min(weights) <= 0:
        raise ValueError(f"weights must be positive, one for each of the {len(parts)} datasets; found {list(weights)}")
    probabilities = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(aligned, probabilities=probabilities, seed=seed, stopping_strategy=stop)


def with_aspects(dataset: datasets.Dataset, aspects: Sequence[str]) -> datasets.Dataset:
    """The groups with rating columns for `aspects`; those that a group was not rated on are null."""
    if aspects_of(dataset.features) == tuple(aspects):
        return dataset
    features = group_features(aspects)
    features.update({name: kind for name, kind in dataset.features.items() if name not in features})  # ROW_FORM
    return dataset.map(
        _extend, fn_kwargs={"aspects": tuple(aspects)}, features=features, desc="aligning rating aspects"
    )


def _extend(group: dict[str, Any], aspects: tuple[str, ...]) -> dict[str, Any]:
    extended: dict[str, Any] = {}
    for column in ("ratings", "rationales"):
        values = group.get(column)
        extended[column] = (
            None if values is None else [{aspect: (value or {}).get(aspect) for aspect in aspects} for value in values]
        )
    return extended
