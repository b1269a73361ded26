"""Two runs on one page: `silkie report RUN_A RUN_B`. What both evaluated is compared pair by pair, curves share their
panels, and of the configuration it shows what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from silkie.report.collect import MAX_CARDS, collect, merged_curves, pick_cards, read_run, short_names
from silkie.report.schema import BenchmarkRow, Evaluation, Report, System
from silkie.report.scored import score_evaluation

__all__ = ["side_by_side"]

MISSING = "–"


def side_by_side(a: str | Path, b: str | Path) -> Report:
    """The report of two run directories. A's trained system stands first, and B's is compared with it.

    Raises:
        FileNotFoundError, ValueError: what `silkie.report.collect.collect` says of either.
    """
    roots = Path(a), Path(b)
    names = short_names(*(root.resolve() for root in roots))
    reports = [collect(root, evaluations=False) for root in roots]
    result = Report(
        title=f"{names[0]} and {names[1]}",
        summary=f"Two runs side by side: {roots[0]} and {roots[1]}. Changes are {names[1]} minus {names[0]}.",
        names=names,
        curves=merged_curves(dict(zip(names, (report.curves for report in reports), strict=True))),
        configuration=_differences([report.configuration for report in reports], names, "Configuration"),
        data=_differences([report.data for report in reports], names, "Data"),
    )
    result.notes = [f"{name}: {note}" for name, report in zip(names, reports, strict=True) for note in report.notes]
    shared, alone = _shared_evaluations(roots, names)
    for root, evaluation in shared:
        rows, cards, notes = score_evaluation(root, evaluation)
        result.benchmarks += rows
        result.gallery += cards
        result.notes += notes
    result.notes += alone
    result.benchmarks += _given([report.benchmarks for report in reports], names)
    result.gallery_counts = Counter(card.flip for card in result.gallery)
    result.gallery = pick_cards(result.gallery, MAX_CARDS)
    return result


def _shared_evaluations(
    roots: tuple[Path, Path], names: tuple[str, str]
) -> tuple[list[tuple[Path, Evaluation]], list[str]]:
    """The benchmarks that both runs answered, as evaluations of the two trained systems; a note on each other one."""
    a, b = ({(e.benchmark, e.name): e for e in read_run(root).evaluations} for root in roots)
    shared = []
    for key in a.keys() & b.keys():
        files = [
            str((root / evaluation.systems[_trained(evaluation)]).resolve())
            for root, evaluation in zip(roots, (a[key], b[key]), strict=True)
        ]
        systems = dict(zip(names, files, strict=True))
        shared.append((list(a).index(key), replace(a[key], systems=systems, compare_with=None)))
    alone = [f"{title or benchmark} was answered by one of the runs only." for benchmark, title in a.keys() ^ b.keys()]
    return [(roots[0], evaluation) for _, evaluation in sorted(shared, key=lambda found: found[0])], sorted(alone)


def _trained(evaluation: Evaluation) -> str:
    return evaluation.compared[1] if evaluation.compared else next(iter(evaluation.systems))


def _given(rows: list[list[BenchmarkRow]], names: tuple[str, str]) -> list[BenchmarkRow]:
    """Rows that both reports give as values: the trained system of each. There are no answers to pair, so a change has
    no interval."""
    a, b = ({(row.group, row.name, row.metric): row for row in own} for own in rows)
    merged = []
    for key, row in a.items():
        if key not in b:
            continue
        first, second = (replace(_last(own[key]), name=name) for own, name in zip((a, b), names, strict=True))
        change = None if first.value is None or second.value is None else second.value - first.value
        systems = (_alone(first), replace(_alone(second), difference=change))
        merged.append(replace(row, systems=systems, headline=row.headline))
    return merged


def _last(row: BenchmarkRow) -> System:
    """The trained system: the one after the base."""
    return row.systems[1] if len(row.systems) > 1 else row.systems[0]


def _alone(system: System) -> System:
    """Without the change against its own run's base."""
    return replace(system, difference=None, difference_low=None, difference_high=None, p_value=None)


def _differences(
    sections: list[Mapping[str, Mapping[str, Any]]], names: tuple[str, str], title: str
) -> dict[str, dict[str, Any]]:
    """What differs, with both values, then what is the same."""
    a, b = ({(s, key): value for s, own in part.items() for key, value in own.items()} for part in sections)
    differs, same = {}, {}
    for section, key in dict.fromkeys([*a, *b]):
        x, y = a.get((section, key), MISSING), b.get((section, key), MISSING)
        label = f"{section}: {key}" if section else key
        if x == y:
            same[label] = x
        else:
            differs[label] = f"{names[0]} {x} | {names[1]} {y}"
    return {k: v for k, v in ((f"{title} that differs", differs), ("The same in both", same)) if v}
