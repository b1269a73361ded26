"""`python -m silkie.feedback rate`: a file of responses through a judge into a journal, resumable at any point.

A line of the journal, one per item:

    {"id", "status": "ok", "judge": {"model", "rubric"}, "item": fingerprint, "ratings": [K x {aspect: number | null}],
     "rationales": [K x {aspect: text}], "orders": [votes x [response at position p]], "form",
     "scale": [lowest, highest], "usage", "seconds"}
     and with several votes "spread" (K x {aspect: number}) and "vote_ratings" (votes x K x {aspect: number})
    {"id", "status": "failed", "judge", "item", "error": {"kind", "message"}, "attempts": [{"kind", "message", "raw"}],
    "usage", "seconds"}
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from silkie.endpoint.errors import AnswerError, ItemError, Usage
from silkie.endpoint.event_loop import run_to_end
from silkie.feedback.inputs import RecordError, read_items, with_images
from silkie.feedback.items import AspectRating, JudgeItem
from silkie.feedback.journal import Journal, JournalError, Record
from silkie.feedback.judges import Judge, OpenAIJudge
from silkie.feedback.options import RateOptions
from silkie.feedback.rate import UnusableAnswers, Vote, cast_vote, combine_votes
from silkie.feedback.runner import (
    JournalRun,
    OutageGuard,
    Progress,
    StopSignal,
    failure_lines,
    run_bounded,
    stop_on_signals,
)


@dataclass(slots=True)
class JournalState:
    """What a journal holds, kept up to date while a run adds to it."""

    fingerprints: dict[str, str] = field(default_factory=dict)  # id -> fingerprint of the item that was rated
    failed: dict[str, tuple[str, str]] = field(default_factory=dict)  # id -> kind of the failure, message
    failures: Counter[str] = field(default_factory=Counter)  # id -> how many lines say so
    judges: set[tuple[str, str]] = field(default_factory=set)  # (model, rubric)
    spent: Usage = field(default_factory=Usage)

    def add(self, record: Record) -> None:
        item_id = str(record["id"])
        self.fingerprints[item_id] = record["item"]
        self.judges.add((record["judge"]["model"], record["judge"]["rubric"]))
        self.spent += Usage.from_json(record.get("usage"))
        if record["status"] == "ok":
            self.failed.pop(item_id, None)
        else:
            self.failed[item_id] = (record["error"]["kind"], record["error"]["message"])
            self.failures[item_id] += 1

    def done(self, item_id: str, *, retry_failed: bool) -> bool:
        return item_id in self.fingerprints and not (retry_failed and item_id in self.failed)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateSummary:
    """Where the items of the input stand after a run: `rated`, `failed` (id -> kind, message), `open` still to do.
    `spent` is what the whole journal has cost. `stopped` says why the run ended early; None where every item is
    accounted for."""

    items: int
    rated: int
    failed: dict[str, tuple[str, str]]
    open: int
    spent: Usage
    done_now: int
    seconds: float
    stopped: str | None

    @property
    def failures(self) -> dict[str, int]:
        """Kind of failure -> items."""
        return dict(Counter(kind for kind, _ in self.failed.values()))

    def text(self) -> str:
        cost = f", cost {self.spent.cost:.4f}" if self.spent.cost else ""
        lines = [
            f"{self.items} items: {self.rated} rated, {len(self.failed)} failed, {self.open} open",
            (
                f"{self.spent.calls} answers, {self.spent.tokens:,} tokens{cost} in all; {self.done_now} items in"
                f" {self.seconds:.1f} s now"
            ),
            *failure_lines(self.failed),
        ]
        if self.stopped:
            lines.append(f"stopped early: {self.stopped}")
        return "\n".join(lines)


def rate_file(
    responses: str | Path, judge: Judge, journal: str | Path, options: RateOptions | None = None
) -> RateSummary:
    """Rate every item of `responses` that the journal does not hold yet.

    Raises RecordError for a line of `responses` that cannot be used, JournalError for a journal in use, damaged, of
    another judge or rubric, or whose ratings belong to other texts than `responses` now holds. All of that is checked
    before the first call."""
    return run_to_end(_rate_file(Path(responses), judge, Path(journal), options or RateOptions()))


async def _rate_file(responses: Path, judge: Judge, path: Path, options: RateOptions) -> RateSummary:
    state = JournalState()
    stop = StopSignal()
    began = time.monotonic()
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(path, on_record=state.add))
        ids, waiting = _check(responses, judge, path, state, options)
        parts = _PartStore(stack, path, state)
        progress = Progress(total=len(ids), done=len(ids) - waiting, unit="item", show=options.progress)
        run = RateRun(judge, options, responses.parent, journal, parts, state, stop, progress)
        if isinstance(judge, OpenAIJudge):
            # a wait between retries ends with the run; the endpoint is the caller's, so its own sleep is put back
            stack.callback(setattr, judge.endpoint, "sleep", judge.endpoint.sleep)
            judge.endpoint.sleep = stop.sleep
        try:
            with stop_on_signals(stop):
                pending = (
                    item for item in read_items(responses) if not state.done(item.id, retry_failed=options.retry_failed)
                )
                await run_bounded(pending, run.work, concurrency=options.concurrency, stop=stop)
                if stop.reason is None:
                    await run.write_held(run.outage)
        finally:
            progress.close()
            if isinstance(judge, OpenAIJudge):
                await judge.endpoint.close()
        if stop.reason is None:
            parts.remove()
    return RateSummary(
        items=len(ids),
        rated=len(ids & state.fingerprints.keys() - state.failed.keys()),
        failed={item_id: problem for item_id, problem in state.failed.items() if item_id in ids},
        open=waiting - run.written,
        spent=state.spent,
        done_now=run.written,
        seconds=time.monotonic() - began,
        stopped=stop.reason,
    )


def _check(
    responses: Path, judge: Judge, path: Path, state: JournalState, options: RateOptions
) -> tuple[set[str], int]:
    """Read the whole input once before anything is paid for; returns the ids of its items, and how many are still to
    do."""
    current = (judge.name, judge.rubric.fingerprint())
    others = sorted(state.judges - {current})
    if others:
        raise JournalError(
            f"{path} holds ratings of {others} (model, rubric) and this run would add {current}. Ratings of two judges"
            " do not mix: pass another journal"
        )
    ids: set[str] = set()
    waiting = 0
    for item in read_items(responses):
        ids.add(item.id)
        waiting += not state.done(item.id, retry_failed=options.retry_failed)
        known = state.fingerprints.get(item.id)
        if known is not None and known != item.fingerprint():
            raise JournalError(
                f"{path}: item {item.id!r} was rated with another prompt, image or texts than {responses} holds; pass"
                " another journal"
            )
    if not ids:
        raise RecordError(f"{responses} holds no responses")
    return ids, waiting


class RateRun(JournalRun):
    """One run of `rate`: how an item is rated, and where its line goes."""

    def __init__(
        self,
        judge: Judge,
        options: RateOptions,
        base: Path,
        journal: Journal,
        parts: _PartStore,
        state: JournalState,
        stop: StopSignal,
        progress: Progress,
    ) -> None:
        super().__init__(options, spent=state.spent, items=len(state.fingerprints))
        self.judge, self.options, self.base = judge, options, base
        self.journal, self.parts, self.state, self.stop, self.progress = journal, parts, state, stop, progress
        self.outage = OutageGuard(limit=self.outage_limit)
        self.label = {"model": judge.name, "rubric": judge.rubric.fingerprint()}
        self.written = 0

    async def work(self, item: JudgeItem) -> None:
        """Rate one item and write its line."""
        await self.account(partial(self._rate, item), self.outage)

    async def write(self, record: Record) -> None:
        await self.journal.append(record)
        self.written += 1
        self.state.add(record)
        self.progress.update(failed=record["status"] == "failed", spent=self.state.spent)

    async def _rate(self, item: JudgeItem) -> Record:
        """The item's line. Whatever is wrong with the item or its answers is part of the line; StopRun passes
        through."""
        began = time.monotonic()
        record: Record = {"id": item.written_id, "status": "failed", "judge": self.label, "item": item.fingerprint()}
        votes: list[Vote] = []
        problems: list[AnswerError] = []
        fatal: ItemError | None = None
        try:
            shown = await asyncio.to_thread(with_images, item, self.options.image_root, self.base)
            await self._collect(shown, item, votes, problems)
        except ItemError as error:
            fatal = error
            problems += error.earlier
        # more than half of the votes: the mean of a minority would be a rating by another rule than its neighbours'
        if fatal is None and 2 * len(votes) > self.options.votes:
            rated = combine_votes(item, votes, self.judge.rubric.aspect_names)
            record |= {"status": "ok", "ratings": rated.ratings, "rationales": rated.rationales}
            rubric = self.judge.rubric
            record |= {"orders": rated.orders, "form": rated.form, "scale": [rubric.minimum, rubric.maximum]}
            if self.options.votes > 1:
                record |= {"spread": rated.spread, "vote_ratings": rated.vote_ratings}
        else:
            cause = fatal or problems[-1]
            texts: list[AnswerError | ItemError] = [*problems, fatal] if fatal and fatal.raw else [*problems]
            record["error"] = {"kind": cause.kind, "message": str(cause)}
            record["attempts"] = [{"kind": text.kind, "message": str(text), "raw": text.raw} for text in texts]
        usage = sum([vote.usage for vote in votes] + [problem.usage for problem in problems], Usage())
        return record | {"usage": usage.to_json(), "seconds": round(time.monotonic() - began, 3)}

    async def _collect(self, shown: JudgeItem, item: JudgeItem, votes: list[Vote], problems: list[AnswerError]) -> None:
        """Cast the votes of an item into `votes`; end once too many of them failed. `shown` is `item` with its images
        found."""
        for number in range(self.options.votes):
            vote, unusable = self.parts.get(item, number)
            if vote is None:
                try:
                    vote = await cast_vote(
                        shown,
                        self.judge,
                        vote=number,
                        seed=self.options.seed,
                        attempts=self.options.attempts,
                        earlier=unusable,
                        on_unusable=partial(self.parts.put_unusable, item, number),
                    )
                except UnusableAnswers as error:
                    problems += error.errors
                    if 2 * (number + 1 - len(votes)) >= self.options.votes:  # a majority is out of reach
                        return
                    continue
                if self.options.votes > 1:  # a single vote is the whole item, whose line comes next
                    await self.parts.put_vote(item, number, vote)
            votes.append(vote)


class _PartStore:
    """Votes and unusable answers of unfinished items: they were paid for, and the answers are used-up attempts. They
    are kept in a second journal beside the main one, so that a kill between two calls of an item loses neither. The
    file is created when first needed and removed once the run is complete."""

    def __init__(self, stack: ExitStack, path: Path, state: JournalState) -> None:
        self._stack, self._state = stack, state
        self._votes: dict[tuple[Any, ...], Vote] = {}
        self._unusable: dict[tuple[Any, ...], list[AnswerError]] = defaultdict(list)
        self.path = path.with_name(path.name + ".parts")
        self._journal = self._open() if self.path.exists() else None

    def get(self, item: JudgeItem, number: int) -> tuple[Vote | None, list[AnswerError]]:
        """The vote `number` of an item, or else the unusable answers to it."""
        key = tuple(self._key(item, number).values())
        return self._votes.pop(key, None), self._unusable.pop(key, [])

    async def put_vote(self, item: JudgeItem, number: int, vote: Vote) -> None:
        await self._put(item, number, {"vote": asdict(vote)})

    async def put_unusable(self, item: JudgeItem, number: int, error: AnswerError) -> None:
        await self._put(
            item,
            number,
            {"unusable": {"kind": error.kind, "message": str(error), "raw": error.raw, "usage": error.usage.to_json()}},
        )

    def remove(self) -> None:
        if self._journal is not None:
            self._journal.close()  # Windows removes no open file
            self.path.unlink(missing_ok=True)
            # Nobody waits for its lock: the main journal's is held
            self.path.with_name(self.path.name + ".lock").unlink(missing_ok=True)

    async def _put(self, item: JudgeItem, number: int, part: Record) -> None:
        self._journal = self._journal or self._open()
        await self._journal.append(self._key(item, number) | part)

    def _open(self) -> Journal:
        return self._stack.enter_context(Journal(self.path, on_record=self._add))

    def _key(self, item: JudgeItem, number: int) -> Record:
        """Parts belong to one attempt at an item: what led to a recorded failure is not reused by `retry_failed`."""
        return {"id": item.id, "item": item.fingerprint(), "failures": self._state.failures[item.id], "number": number}

    def _add(self, record: Record) -> None:
        if (
            self._state.done(record["id"], retry_failed=True)
            or record["failures"] != self._state.failures[record["id"]]
        ):
            return
        key = (record["id"], record["item"], record["failures"], record["number"])
        if "unusable" in record:
            told = record["unusable"]
            error = AnswerError(told["kind"], told["message"], raw=told["raw"], usage=Usage.from_json(told["usage"]))
            self._unusable[key].append(error)
            return
        vote = record["vote"]
        ratings = tuple({name: AspectRating(**entry) for name, entry in row.items()} for row in vote["ratings"])
        self._votes[key] = Vote(
            order=tuple(vote["order"]), ratings=ratings, usage=Usage(**vote["usage"]), form=vote["form"]
        )
