"""`python -m silkie.feedback sample`: draw k responses per prompt from a pool, resumable at any point.

Every single draw is one line of a journal (OUT.journal), so that a kill loses only the draws in flight. Draws go in
rounds: round 0 fills every slot; a slot whose draw failed or repeats an earlier slot's text is drawn again in the next
round, up to `redraws` times. What a round has to do follows from the journal alone. At the end the items with enough
distinct responses go to OUT, in the order of the input."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from silkie.endpoint.budget import Prices
from silkie.endpoint.client import Endpoint
from silkie.endpoint.errors import AnswerError, ItemError, Usage
from silkie.endpoint.event_loop import run_to_end
from silkie.endpoint.media import data_url, load_image
from silkie.feedback.drawn import DrawState, SampleSummary
from silkie.feedback.inputs import RecordError, read_items, with_images
from silkie.feedback.items import JudgeItem
from silkie.feedback.journal import Journal, JournalError, Record
from silkie.feedback.options import SampleOptions
from silkie.feedback.pool import Member, Pool, Sampler, accepted_slots, draw_seed, sampler_of
from silkie.feedback.prompting import endpoint_messages, prompt_turns
from silkie.feedback.runner import JournalRun, OutageGuard, Progress, StopSignal, run_bounded, stop_on_signals
from silkie.io.console import say


@dataclass(frozen=True, slots=True)
class Draw:
    """One response to be drawn."""

    item: JudgeItem
    slot: int
    attempt: int
    sampler: Sampler


def sample_file(
    prompts: str | Path, pool: Pool, out: str | Path, options: SampleOptions | None = None
) -> SampleSummary:
    """Draw responses for every item of `prompts` (JSONL of {"image", "prompt"}, `id` optional) and write the responses
    file `out`.

    Raises ValueError where `out` is `prompts`, RecordError for a line that cannot be used, JournalError for a journal
    (`out` + ".journal") in use, damaged, or begun with another pool, seed, k or other prompts.
    """
    return run_to_end(_sample_file(Path(prompts), pool, Path(out), options or SampleOptions()))


async def _sample_file(prompts: Path, pool: Pool, out: Path, options: SampleOptions) -> SampleSummary:
    if out.resolve() == prompts.resolve():
        raise ValueError(f"the responses would replace the prompts in {prompts}; pass another output file")
    began = time.monotonic()
    state = DrawState()
    stop = StopSignal()
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(out.with_name(out.name + ".journal"), on_record=state.add))
        # held in memory: a later round needs the items whose draws failed or repeated, and prompts are short
        items = list(read_items(prompts, need_responses=False))
        if not items:
            raise RecordError(f"{prompts} holds no prompts")
        _check(items, pool, journal.path, state, options)
        done = sum(sum(accepted_slots(state.texts(item.id, options.k))) for item in items)
        progress = Progress(total=len(items) * options.k, done=done, unit="draw", show=options.progress)
        run = SampleRun(pool, options, prompts.parent, journal, state, stop, progress)
        try:
            with stop_on_signals(stop):
                for attempt in range(options.redraws + 1):
                    await run.round(items, attempt)
                    if stop.reason is not None:
                        break
        finally:
            progress.close()
            await run.close()
        complete, short, dropped = _write_responses(items, state, prompts, out, options)
    problems = state.problems | state.unreadable
    return SampleSummary(
        items=len(items),
        complete=complete,
        short=short,
        dropped=dropped,
        failed={item_id: problems[item_id] for item_id in dropped if item_id in problems},
        draws=state.draws,
        spent=state.spent,
        seconds=time.monotonic() - began,
        stopped=stop.reason,
    )


def _check(items: list[JudgeItem], pool: Pool, path: Path, state: DrawState, options: SampleOptions) -> None:
    current = (pool.fingerprint(), options.seed, options.k)
    if state.settings - {current}:
        raise JournalError(f"{path} was begun with another pool, seed or k; pass those again, or another output file")
    for item in items:
        if state.fingerprints.get(item.id, item.fingerprint()) != item.fingerprint():
            raise JournalError(
                f"{path}: item {item.id!r} was drawn for another prompt or image than the input now holds; pass another"
                " output file"
            )


class SampleRun(JournalRun):
    """One run of `sample`: the endpoints, the local model that is loaded, and where a draw's line goes."""

    def __init__(
        self,
        pool: Pool,
        options: SampleOptions,
        base: Path,
        journal: Journal,
        state: DrawState,
        stop: StopSignal,
        progress: Progress,
    ) -> None:
        super().__init__(options, spent=state.spent, items=state.draws)
        self.pool, self.options, self.base = pool, options, base
        self.journal, self.state, self.stop, self.progress = journal, state, stop, progress
        self.endpoints = {member.name: self._endpoint(member) for member in pool.members if member.base_url is not None}
        self.outages = {name: OutageGuard(limit=self.outage_limit) for name in self.endpoints}
        self.local: tuple[str, Any, Any] | None = None  # (member name, model, processor): one at a time, they are large

    def _endpoint(self, member: Member) -> Endpoint:
        assert member.base_url is not None and member.model is not None
        return Endpoint(
            member.base_url,
            member.model,
            timeout=self.options.timeout,
            prices=Prices(prompt=member.price_prompt, completion=member.price_completion),
            key_variable=member.key_variable,
            connections=member.concurrency or self.options.concurrency,
            sleep=self.stop.sleep,
        )

    async def close(self) -> None:
        for endpoint in self.endpoints.values():
            await endpoint.close()

    async def round(self, items: list[JudgeItem], attempt: int) -> None:
        """Every draw of this round: the local members one after the other, then all endpoints side by side."""
        by_member: dict[str, list[Draw]] = defaultdict(list)
        for draw in self._draws(items, attempt):
            by_member[draw.sampler.member.name].append(draw)
        for member in self.pool.members:
            if member.local is not None and self.stop.reason is None:
                await self._draw_locally(member, by_member[member.name])
        remote = (
            self._draw_remotely(member, by_member[member.name])
            for member in self.pool.members
            if member.base_url is not None
        )
        # An error of one member must not cost the calls of another
        for outcome in await asyncio.gather(*remote, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def _draws(self, items: list[JudgeItem], attempt: int) -> Iterator[Draw]:
        """Slots that have no accepted text and whose next attempt is this one."""
        k = self.options.k
        for item in items:
            slots = self.state.last.get(item.id, {})
            kept = accepted_slots(self.state.texts(item.id, k))
            for slot in range(k):
                tried = slots[slot][0] + 1 if slot in slots else 0
                if not kept[slot] and tried == attempt:
                    yield Draw(item, slot, attempt, sampler_of(self.pool, item.id, slot, attempt, k, self.options.seed))

    async def _draw_remotely(self, member: Member, draws: list[Draw]) -> None:
        await run_bounded(
            iter(draws), self._draw_one, concurrency=member.concurrency or self.options.concurrency, stop=self.stop
        )
        if self.stop.reason is None:
            await self.write_held(self.outages[member.name])

    async def _draw_one(self, draw: Draw) -> None:
        await self.account(partial(self._drawn, draw), self.outages[draw.sampler.member.name])

    async def _drawn(self, draw: Draw) -> Record:
        """The draw's line. Whatever is wrong with the answer is part of the line; StopRun passes through."""
        try:
            answer = await self._ask(draw)
        except (AnswerError, ItemError) as error:
            return self._record(draw, error.usage, error=error)
        return self._record(draw, answer.usage, response=answer.text.strip())

    async def _ask(self, draw: Draw) -> Any:
        def messages() -> list[dict[str, Any]]:
            item = with_images(draw.item, self.options.image_root, self.base)
            urls = (
                data_url(image, where=f"item {item.id!r}", max_side=self.options.max_image_side)
                for image in item.images
            )
            return endpoint_messages(prompt_turns(item), urls)

        member = draw.sampler.member
        return await self.endpoints[member.name].chat(
            await asyncio.to_thread(messages),
            keep_truncated=True,
            temperature=draw.sampler.temperature,
            top_p=member.top_p,
            max_tokens=member.max_tokens,
            seed=draw_seed(self.options.seed, draw.item.id, draw.slot, draw.attempt),
        )

    async def _draw_locally(self, member: Member, draws: list[Draw]) -> None:
        by_temperature: dict[float, list[Draw]] = defaultdict(list)
        for draw in draws:
            by_temperature[draw.sampler.temperature].append(draw)
        for temperature, group in sorted(by_temperature.items()):
            for batch in _batches(group, member.batch_size):
                if self.stop.reason is not None:
                    return
                for record in await asyncio.to_thread(self._generate, member, temperature, batch):
                    await self.write(record)

    def _generate(self, member: Member, temperature: float, batch: tuple[Draw, ...]) -> list[Record]:
        assert member.local is not None
        new = self.local is None or self.local[0] != member.name
        if new:
            say(f"loading {member.local} ...")
        from silkie.inference import generate, load_policy

        if self.local is None or new:
            self.local = None
            self.local = (member.name, *load_policy(member.local, base_model=member.base_model))
        records, ready = [], []
        for draw in batch:
            try:
                item = with_images(draw.item, self.options.image_root, self.base)
                side = self.options.max_image_side
                images = [load_image(image, where=f"item {item.id!r}", max_side=side) for image in item.images]
                ready.append((draw, prompt_turns(item), images))
            except ItemError as error:
                records.append(self._record(draw, Usage(), error=error))
        if ready:
            answers = generate(
                self.local[1],
                self.local[2],
                [prompt for _, prompt, _ in ready],
                [images for _, _, images in ready],
                max_new_tokens=member.max_tokens,
                temperature=temperature,
                top_p=member.top_p if member.top_p is not None else 1.0,
                seed=draw_seed(self.options.seed, ready[0][0].item.id, ready[0][0].slot, ready[0][0].attempt),
                batch_size=member.batch_size,
            )
            records += [
                self._record(draw, Usage(calls=1), response=texts[0])
                for (draw, _, _), texts in zip(ready, answers, strict=True)
            ]
        return records

    def _record(
        self, draw: Draw, usage: Usage, *, response: str | None = None, error: AnswerError | ItemError | None = None
    ) -> Record:
        record: Record = {
            "id": draw.item.id,
            "slot": draw.slot,
            "attempt": draw.attempt,
            "member": draw.sampler.member.name,
            "temperature": draw.sampler.temperature,
            "item": draw.item.fingerprint(),
            "pool": self.pool.fingerprint(),
            "seed": self.options.seed,
            "k": self.options.k,
            "usage": usage.to_json(),
        }
        if error is not None:
            return record | {"error": {"kind": error.kind, "message": str(error), "raw": error.raw}}
        return record | {"response": response}

    async def write(self, record: Record) -> None:
        if record.get("error", {}).get("kind") == "image":
            new = record["id"] not in self.state.unreadable
            self.state.unreadable[record["id"]] = ("image", record["error"]["message"])
            self.progress.update(failed=new, spent=self.state.spent, count=0)
            return
        await self.journal.append(record)
        before = self._accepted(record["id"])  # after the wait: other draws of the item are written meanwhile
        self.state.add(record)
        gained = self._accepted(record["id"]) - before  # below 0 where the text repeats that of a later slot
        self.progress.update(failed=record.get("response") is None, spent=self.state.spent, count=gained)

    def _accepted(self, item: str) -> int:
        return sum(accepted_slots(self.state.texts(item, self.options.k)))


def _batches(draws: list[Draw], size: int) -> Iterator[tuple[Draw, ...]]:
    return (tuple(draws[i : i + size]) for i in range(0, len(draws), size))


def _write_responses(
    items: list[JudgeItem], state: DrawState, prompts: Path, out: Path, options: SampleOptions
) -> tuple[int, int, list[str]]:
    """Write `out` atomically; returns (complete, short, ids skipped)."""
    complete = short = 0
    dropped: list[str] = []
    temporary = out.with_name(out.name + ".partial")
    with temporary.open("w", encoding="utf-8") as file:
        for item in items:
            texts = state.texts(item.id, options.k)
            kept = [slot for slot, keep in enumerate(accepted_slots(texts)) if keep]
            if len(kept) < min(options.minimum, options.k):
                dropped.append(item.id)
                continue
            complete += len(kept) == options.k
            short += len(kept) < options.k
            responses = [{"model": state.last[item.id][slot][2], "response": texts[slot]} for slot in kept]
            images = [_image_for(image, prompts, out, options.image_root) for image in item.images]
            image = images[0] if len(images) == 1 else images or None
            file.write(
                json.dumps(
                    {**item.meta, "id": item.written_id, "image": image, "prompt": item.prompt, "responses": responses},
                    default=str,
                )
                + "\n"
            )
    temporary.replace(out)
    return complete, short, dropped


def _image_for(image: str, prompts: Path, out: Path, image_root: str | None) -> str:
    """The image's path relative to `out`: a path relative to the prompts file must still work from the responses
    file."""
    beside = prompts.parent / image
    if (
        image_root is not None
        or os.path.isabs(image)
        or not beside.exists()
        or prompts.parent.resolve() == out.parent.resolve()
    ):
        return image
    return os.path.relpath(beside, out.parent)
