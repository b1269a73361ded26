"""Pairs built anew on groups that are already stored."""

from __future__ import annotations

from typing import Any

import datasets

from silkie.data.finish import pair_up, why_no_pairs
from silkie.data.images import ImageResolver
from silkie.data.pairs import PairFunction, PairOptions
from silkie.data.registry import Row

REASON = "_reason"


def repair_pairs(
    dataset: datasets.Dataset,
    pairs: str | PairOptions | PairFunction,
    *,
    source: str = "dataset",
    need_pairs: bool = True,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, list[tuple[str, str]]]:
    """Replace the pairs of stored groups by those of another strategy.

    Returns the groups that have a pair, and (row, reason) of those that have none. `need_pairs=False` keeps them.
    """
    features = dataset.features.copy()
    features[REASON] = datasets.Value("string")
    options = PairOptions.parse(pairs)
    changed = dataset.map(
        _repair,
        with_indices=True,
        features=features,
        fn_kwargs={"options": options, "source": source},
        num_proc=num_proc,
        desc="building pairs",
    )
    reasons = changed.with_format("arrow")[REASON][:].to_pylist()
    dropped = [(f"row {index}", reason) for index, reason in enumerate(reasons) if reason is not None]
    kept = changed.remove_columns([REASON])
    if dropped and need_pairs:
        kept = kept.select([index for index, reason in enumerate(reasons) if reason is None])
    return kept, dropped


def _repair(group: dict[str, Any], index: int, options: PairOptions, source: str) -> dict[str, Any]:
    row = Row(group, source, f"row {index}", ImageResolver(None, None))
    pairs, weights, notes = pair_up(group, options, row)
    return {"pairs": pairs, "pair_weights": weights, REASON: None if pairs else why_no_pairs(len(group["responses"]), notes)}
