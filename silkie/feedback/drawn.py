"""What has been drawn: the journal of `sample`, read, and the account that the command gives of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from silkie.endpoint.errors import Usage
from silkie.feedback.journal import Record
from silkie.feedback.runner import failure_lines

__all__ = ["DrawState", "SampleSummary"]


@dataclass(slots=True)
class DrawState:
    """What the journal holds: per item and slot the last attempt and its text (None where it failed), and per item why
    a draw failed last. `unreadable`, items without their image, is this run's alone: with the image mended, the same
    command draws them."""

    last: dict[str, dict[int, tuple[int, str | None, str]]] = field(default_factory=lambda: defaultdict(dict))
    problems: dict[str, tuple[str, str]] = field(default_factory=dict)
    unreadable: dict[str, tuple[str, str]] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    settings: set[tuple[Any, ...]] = field(default_factory=set)
    spent: Usage = field(default_factory=Usage)
    draws: int = 0

    def add(self, record: Record) -> None:
        self.last[record["id"]][record["slot"]] = (record["attempt"], record.get("response"), record["member"])
        self.fingerprints[record["id"]] = record["item"]
        self.settings.add((record["pool"], record["seed"], record["k"]))
        self.spent += Usage.from_json(record.get("usage"))
        self.draws += 1
        if "error" in record:
            self.problems[record["id"]] = (record["error"]["kind"], record["error"]["message"])

    def texts(self, item_id: str, k: int) -> list[str | None]:
        slots = self.last.get(item_id, {})
        return [slots[slot][1] if slot in slots else None for slot in range(k)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSummary:
    """`complete`: items with k distinct responses; `short`: with fewer but enough; `dropped`: with too few; `failed`:
    those of `dropped` with a failed draw -> kind, message of the last one."""

    items: int
    complete: int
    short: int
    dropped: list[str]
    failed: dict[str, tuple[str, str]]
    draws: int
    spent: Usage
    seconds: float
    stopped: str | None

    def text(self) -> str:
        cost = f", cost {self.spent.cost:.4f}" if self.spent.cost else ""
        lines = [
            (
                f"{self.items} items: {self.complete} complete, {self.short} with fewer responses, {len(self.dropped)}"
                " skipped"
            ),
            f"{self.draws} draws in all, {self.spent.tokens:,} tokens{cost}; {self.seconds:.1f} s now",
        ]
        alike = [item_id for item_id in self.dropped if item_id not in self.failed]
        if alike and not self.stopped:
            lines.append(
                f"skipped (too few distinct responses): {', '.join(alike[:10])}{' ...' if len(alike) > 10 else ''}"
            )
        lines += [f"skipped, {line}" for line in failure_lines(self.failed)]
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}")
        return "\n".join(lines)
