"""Work through items with bounded concurrency, keep a budget, write a journal, and stop cleanly: what `rate` and
`sample` share."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any, TypeVar

from tqdm import tqdm

from silkie.endpoint.budget import Budget
from silkie.endpoint.errors import StopRun, Usage, clipped
from silkie.endpoint.retries import TRANSPORT_KINDS
from silkie.feedback.journal import Record
from silkie.feedback.options import JournalOptions

T = TypeVar("T")


class StopSignal:
    """Asked for by a signal, a spent budget or a lost endpoint: no further item starts, waiting retries end, answers
    under way are kept."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._event = asyncio.Event()

    def request(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
        self._event.set()

    async def sleep(self, seconds: float) -> None:
        """Wait between two attempts. Raises StopRun where the run is asked to stop meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        if self.reason is not None:
            raise StopRun(self.reason)


async def run_bounded(
    items: Iterator[T], work: Callable[[T], Awaitable[None]], *, concurrency: int, stop: StopSignal
) -> None:
    """`await work(item)` for every item, at most `concurrency` at a time.

    StopRun from any of them stops the run. So does any other error, which is raised once the calls in flight, which may
    have been paid for, have ended.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency {concurrency}: expected 1 or more")
    errors: list[Exception] = []

    async def worker() -> None:
        try:
            for item in items:
                if stop.reason is not None:
                    return
                await work(item)
        except StopRun as reason:
            stop.request(str(reason))
        except Exception as error:
            errors.append(error)
            stop.request(f"{type(error).__name__}: {error}")

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    if errors:
        raise errors[0]


@contextlib.contextmanager
def stop_on_signals(stop: StopSignal) -> Iterator[None]:
    """SIGINT and SIGTERM ask for a clean stop; a second one ends the process at once, as usual."""
    loop = asyncio.get_running_loop()

    def ask(name: str, number: int) -> None:
        loop.remove_signal_handler(number)
        print(f"\n{name}: finishing the calls in flight (again to end at once)", file=sys.stderr)
        stop.request(f"stopped by {name}")

    installed = []
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not on Windows, and not outside the main thread
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, ask, number.name, number)
            installed.append(number)
    try:
        yield
    finally:
        for number in installed:
            loop.remove_signal_handler(number)


class OutageGuard:
    """Keeps an outage from turning the rest of a run into failures.

    An item that got no answer at all is held back until another item gets one, which proves the endpoint alive. After
    `limit` such items in a row the run stops, and the held items stay undone for the next run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: list[Any] = []

    def hold(self, record: Any, why: str) -> None:
        """An item without an answer. Raises StopRun for the `limit`-th in a row."""
        self._held.append(record)
        if len(self._held) >= self.limit:
            raise StopRun(
                f"no answer for {len(self._held)} items in a row, the last: {why}. They stay undone; run the command"
                " again later"
            )

    def release(self) -> list[Any]:
        """The held items, which turned out to be separate failures."""
        held, self._held = self._held, []
        return held


class Progress:
    """One line on stderr: items done, rate, time left, failures, tokens and cost."""

    def __init__(self, *, total: int, done: int, unit: str, show: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            disable=not show,
            file=sys.stderr,
            mininterval=0.5 if terminal else 15.0,
            dynamic_ncols=terminal,
        )
        self.failed = 0

    def update(self, *, failed: bool, spent: Usage, count: int = 1) -> None:
        self.failed += failed
        cost = {"cost": f"{spent.cost:.4f}"} if spent.cost else {}
        self._bar.set_postfix(failed=self.failed, tokens=spent.tokens, **cost, refresh=False)
        self._bar.update(count)

    def close(self) -> None:
        self._bar.close()


def failure_lines(problems: Mapping[str, tuple[str, str]]) -> list[str]:
    """A line per kind of failure: how many items, and what went wrong with the first of them. `problems`: id -> (kind,
    message)."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for item_id, (kind, _) in problems.items():
        by_kind[kind].append(item_id)
    return [
        f"{kind}, {len(ids)} item{'s' if len(ids) > 1 else ''}, the first of them {ids[0]!r}:"
        f" {' '.join(clipped(problems[ids[0]][1], 500).split())}"
        for kind, ids in sorted(by_kind.items())
    ]


class JournalRun:
    """A run that turns items into lines of a journal: what an item may cost, whether it got an answer, and when to stop
    are the same for ratings and draws; `write` is theirs."""

    def __init__(self, options: JournalOptions, *, spent: Usage, items: int) -> None:
        """spent, items: what the journal holds already."""
        self.budget = Budget(max_tokens=options.max_tokens, max_cost=options.max_cost, spent=spent, items=items)
        # More than the calls in flight, which all fail when a server restarts; not so many that an outage is noticed
        # only after minutes of retries.
        self.outage_limit = 2 * options.concurrency + 8

    async def write(self, record: Record) -> None:
        """Append a line to the journal and account for it."""
        raise NotImplementedError

    async def account(self, make: Callable[[], Awaitable[Record]], guard: OutageGuard) -> None:
        """Make an item's line within the budget and write it. A line without any answer waits until `guard` knows that
        the endpoint answers others. StopRun passes through, also from the budget."""
        self.budget.start()
        try:
            record = await make()
        except BaseException:
            self.budget.abandon()
            raise
        usage = Usage.from_json(record["usage"])
        problem = record.get("error")
        try:
            if problem is not None and not usage.calls and problem["kind"] in TRANSPORT_KINDS:
                guard.hold(record, problem["message"])
            else:
                # released before the write: items that fail during it are not proved wrong by this answer
                held = guard.release() if usage.calls else []
                for line in (record, *held):
                    await self.write(line)
        finally:
            self.budget.finish(usage, usable=problem is None)

    async def write_held(self, guard: OutageGuard) -> None:
        """Write the items that got no answer although the endpoint answers others."""
        for record in guard.release():
            await self.write(record)
