"""New pairs for groups that are already stored."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import datasets

from silkie.data.pairs import PairFunction, PairOptions, own_aspects
from silkie.data.reports import OnError, Problem, unforeseen
from silkie.data.resolver import ImageResolver
from silkie.data.row import Row
from silkie.data.schema import RowError
from silkie.data.stored import pair_up, why_no_pairs

PROBLEM = "_problem"


def rebuild_pairs(
    dataset: datasets.Dataset,
    pairs: str | PairOptions | PairFunction,
    *,
    source: str = "dataset",
    need_pairs: bool = True,
    num_proc: int | None = None,
) -> tuple[datasets.Dataset, list[tuple[str, str]]]:
    """Replace the pairs of stored groups by those of another strategy.

    Pairs come from the ratings of a group. A group without ratings keeps those of its current pairs that fit the
    strategy. A pair function gets the group with its current pairs.

    Returns the groups that have a pair, and (row, reason) of those that have none. `need_pairs=False` keeps them.
    Raises RowError where the strategy needs what a group lacks, or the function fails.
    """
    kept, problems = rebuild_with_report(
        dataset, PairOptions.parse(pairs), source=source, need_pairs=need_pairs, num_proc=num_proc
    )
    return kept, [(problem.row, problem.reason) for problem in problems]


repair_pairs = rebuild_pairs  # its name until 0.1.0


def rebuild_with_report(
    dataset: datasets.Dataset,
    options: PairOptions,
    *,
    source: str,
    need_pairs: bool,
    num_proc: int | None,
    on_error: OnError = "raise",
) -> tuple[datasets.Dataset, list[Problem]]:
    """`rebuild_pairs` with a problem for every group without a pair. With `on_error="skip"` groups that raise are
    problems, too."""
    features = dataset.features.copy()
    features[PROBLEM] = datasets.Value("string")
    changed = dataset.map(
        _rebuild,
        with_indices=True,
        features=features,
        fn_kwargs={"options": options, "source": source, "on_error": on_error},
        num_proc=num_proc,
        desc="building pairs",
    )
    packed = changed.with_format("arrow")[PROBLEM][:].to_pylist()
    problems = {index: Problem(**json.loads(problem)) for index, problem in enumerate(packed) if problem is not None}
    dropped = {index for index, problem in problems.items() if need_pairs or problem.kind == "error"}
    kept = changed.remove_columns([PROBLEM])
    return (kept.select([index for index in range(len(kept)) if index not in dropped]) if dropped else kept), list(
        problems.values()
    )


def _rebuild(group: dict[str, Any], index: int, options: PairOptions, source: str, on_error: OnError) -> dict[str, Any]:
    row = Row(group, source, f"row {index}", ImageResolver(None, None))
    rated = options.needs_ratings and group.get("ratings") is not None
    problem = None
    try:
        known = {**group, "pairs": None, "ratings": own_aspects(group["ratings"])} if rated else group
        pairs, weights, notes = pair_up(known, options, row)
        if not pairs:
            reason = why_no_pairs(len(group["responses"]), notes)
            problem = Problem(kind="no pairs", row=row.location, reason=reason, message=f"{row.location}: {reason}")
    except Exception as caught:  # a pair function of the user's own may raise anything
        error = caught if isinstance(caught, RowError) else unforeseen(caught, row, "groups")
        if on_error == "raise":
            raise error from caught
        pairs, weights = [], []
        problem = Problem(kind="error", row=row.location, reason=error.reason, message=str(error))
    return {"pairs": pairs, "pair_weights": weights, PROBLEM: None if problem is None else json.dumps(asdict(problem))}
