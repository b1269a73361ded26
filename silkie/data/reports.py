"""Reports: the rows that loading, regrouping and validating dropped, and why."""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from silkie.data.row import Found, Row
from silkie.data.schema import RowError

OnError = Literal["raise", "skip"]


@dataclass(slots=True, kw_only=True)
class Problem:
    """A dropped row: what kind, where, and why."""

    kind: str  # "error", "skipped" (the source says so) or "no pairs"
    row: str
    reason: str
    message: str


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


@dataclass(slots=True, kw_only=True)
class LoadReport:
    """What `load_preferences` read and dropped.

    Attributes:
        rows: records read.
        groups: groups returned.
        pairs: pairs in them.
        problems: every dropped row.
        notes: reason -> number of responses or pairs dropped from groups (kept groups or dropped ones).
        regrouped: what regrouping saved; None where rows were groups already.
    """

    source: str
    format: str
    rows: int = 0
    groups: int = 0
    pairs: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    regrouped: RegroupReport | None = None

    def reasons(self) -> Counter[str]:
        """Dropped rows by reason."""
        return Counter(problem.reason for problem in self.problems)

    def summary(self) -> str:
        lines = [
            f"{self.source} ({self.format}): {self.rows:,} rows -> {self.groups:,} groups with {self.pairs:,} pairs"
        ]
        lines += [f"  dropped rows, {reason}: {count:,}" for reason, count in self.reasons().most_common()]
        lines += [f"  dropped from groups, {reason}: {count:,}" for reason, count in self.notes.most_common()]
        if self.regrouped:
            lines.append(f"  {self.regrouped.summary()}")
        return "\n".join(lines)


@dataclass(slots=True, kw_only=True)
class ValidationReport:
    """What `validate` found.

    Attributes:
        rows: groups looked at.
        problems: broken groups.
        flags: judge behaviour that deserves a look: flag -> rows. Flagged groups are kept.
    """

    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    flags: dict[str, list[str]] = field(default_factory=dict)

    def reasons(self) -> Counter[str]:
        """Broken groups by reason."""
        return Counter(problem.reason for problem in self.problems)

    def summary(self) -> str:
        lines = [f"{self.rows:,} groups, {len(self.problems):,} broken"]
        lines += [f"  {reason}: {count:,}" for reason, count in self.reasons().most_common()]
        lines += [f"  judge, {flag}: {len(rows):,} groups (first: {rows[0]})" for flag, rows in self.flags.items()]
        return "\n".join(lines)


def unforeseen(problem: Exception, row: Row, format: str) -> RowError:
    """Turn any exception into a RowError. It quotes the failing line, since a worker process passes on no traceback."""
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    found = f"a record that raised {type(problem).__name__}: {problem} (in {frame.name}, line {frame.lineno})"
    return row.error("(record)", Found(found), f"one that format {format!r} and the pair function can read")
