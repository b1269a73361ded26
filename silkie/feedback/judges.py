"""The three kinds of judge behind one interface: an OpenAI-compatible endpoint, a model in this process, a Python
function.

A judge rates all responses of an item in ONE call and knows nothing of order, votes, retries or journals:
`silkie.feedback.rate` shuffles the responses before the call and undoes it afterwards, for every judge alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from silkie.endpoint.errors import AnswerError, ItemError
from silkie.endpoint.event_loop import run_to_end
from silkie.feedback.items import AspectRating, JudgeItem, Verdict
from silkie.feedback.parse import parse_answer
from silkie.feedback.prompting import Form, answer_schema, judge_text, rubric_text
from silkie.feedback.rubric import Rubric, default_rubric

if TYPE_CHECKING:
    from silkie.endpoint.client import Endpoint

OracleFunction = Callable[[JudgeItem], Sequence[Mapping[str, "float | AspectRating | None"]]]


@runtime_checkable
class Judge(Protocol):
    """Interface of a judge. `rate` returns one {aspect: AspectRating} per response in the order of
    `item.responses`.

    Raises AnswerError for an answer that cannot be used (asking again may help), ItemError for an item that nobody can
    judge, StopRun when no further call makes sense. `attempt` counts unusable answers so far to this very question."""

    name: str
    rubric: Rubric

    def rate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict: ...

    async def arate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict: ...


class OracleJudge:
    """A judge that is a function: `fn(item)` returns one {aspect: rating} per response (numbers, None, or AspectRating
    with a rationale).

    The function sees the responses in the order a judge would be shown; `item.meta` carries whatever it needs to know
    the truth."""

    def __init__(self, fn: OracleFunction, *, rubric: Rubric | None = None, name: str = "oracle") -> None:
        self.fn = fn
        self.rubric = rubric or default_rubric()
        self.name = name

    def rate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict:
        rows = self.fn(item)
        if len(rows) != len(item.responses):
            raise ValueError(
                f"{self.name}: item {item.id}: expected {len(item.responses)} ratings (one per response), found"
                f" {len(rows)}"
            )
        return Verdict(ratings=tuple(self._check(row, item.id) for row in rows))

    async def arate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict:
        return self.rate(item, attempt=attempt)

    def _check(self, row: Mapping[str, float | AspectRating | None], item_id: str) -> dict[str, AspectRating]:
        if set(row) != set(self.rubric.aspect_names):
            raise ValueError(
                f"{self.name}: item {item_id}: expected the aspects {list(self.rubric.aspect_names)}, found {list(row)}"
            )
        rated = {name: value if isinstance(value, AspectRating) else AspectRating(value) for name, value in row.items()}
        for name, entry in rated.items():
            if entry.rating is not None and not self.rubric.minimum <= entry.rating <= self.rubric.maximum:
                scale = f"{self.rubric.minimum:g} to {self.rubric.maximum:g}"
                raise ValueError(f"{self.name}: item {item_id}: {name} is {entry.rating}; the scale is {scale}")
        return rated


class LocalJudge:
    """A model in this process (from `silkie.inference.load_policy`), asked in the Markdown form, greedily at first.

    A repeated question is sampled at `retry_temperature`, since a greedy answer would only repeat itself.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        rubric: Rubric | None = None,
        name: str = "local",
        max_new_tokens: int = 1536,
        retry_temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.model, self.processor = model, processor
        self.rubric = rubric or default_rubric()
        self.name = name
        self.max_new_tokens, self.retry_temperature, self.seed = max_new_tokens, retry_temperature, seed

    def rate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict:
        from silkie.endpoint.media import load_image
        from silkie.inference import generate

        images = [load_image(source) for source in item.images]
        text = f"{rubric_text(self.rubric)}\n\n{judge_text(item, self.rubric, 'markdown')}"
        prompt = [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]
        answers = generate(
            self.model,
            self.processor,
            [prompt],
            [images],
            max_new_tokens=self.max_new_tokens,
            temperature=self.retry_temperature if attempt else 0.0,
            seed=self.seed + attempt,
        )
        ratings, form = parse_answer(answers[0][0], self.rubric, len(item.responses))
        return Verdict(ratings=ratings, form=form)

    async def arate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict:
        return await asyncio.to_thread(self.rate, item, attempt=attempt)


class OpenAIJudge:
    """A judge behind an OpenAI-compatible endpoint (a hosted model, vLLM, `transformers serve`).

    Args:
        endpoint: where to ask; brings retries, timeouts and prices.
        structured: "auto" asks for JSON by schema, and for the Markdown form where the endpoint refuses that or the
            answer was unusable (some servers take the schema and ignore it); "json" insists on the schema; "markdown"
            never asks for it. Whatever was asked for, an answer in either form is read.
        temperature: None leaves it to the server.
        max_tokens: room for an answer; doubled for a question whose answer was unusable before, since it may have been
            cut.
        max_image_side: larger images are scaled down before they are sent, to save tokens.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        rubric: Rubric | None = None,
        structured: Literal["auto", "json", "markdown"] = "auto",
        temperature: float | None = 0.0,
        max_tokens: int = 2048,
        max_image_side: int | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model
        self.rubric = rubric or default_rubric()
        self.structured = structured
        self.temperature, self.max_tokens, self.max_image_side = temperature, max_tokens, max_image_side

    def rate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict:
        async def once() -> Verdict:
            try:
                return await self.arate(item, attempt=attempt)
            finally:
                await self.endpoint.close()

        return run_to_end(once())

    async def arate(self, item: JudgeItem, *, attempt: int = 0) -> Verdict:
        form = self._form(attempt)
        question = await asyncio.to_thread(self.messages, item, form)
        schema = answer_schema(self.rubric, len(item.responses)) if form == "json" else None
        ask = partial(self.endpoint.chat, question, temperature=self.temperature, response_format=schema)
        try:
            answer = await ask(max_tokens=self.max_tokens * 2**attempt)
        except ItemError as error:
            if attempt == 0 or error.kind != "rejected":
                raise
            answer = await ask(max_tokens=self.max_tokens)  # the context may hold no more than that
        try:
            ratings, found = parse_answer(answer.text, self.rubric, len(item.responses))
        except AnswerError as error:
            error.usage = answer.usage
            raise
        return Verdict(ratings=ratings, usage=answer.usage, form=found)

    def messages(self, item: JudgeItem, form: Form) -> list[dict[str, Any]]:
        """One user turn: the rubric first, as the part that never changes (servers cache equal beginnings), then
        images, then the item."""
        from silkie.endpoint.media import data_url

        urls = [
            data_url(image, where=f"item {item.id!r}, image {i}", max_side=self.max_image_side)
            for i, image in enumerate(item.images)
        ]
        content: list[dict[str, Any]] = [{"type": "text", "text": rubric_text(self.rubric)}]
        content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content.append({"type": "text", "text": judge_text(item, self.rubric, form)})
        return [{"role": "user", "content": content}]

    def _form(self, attempt: int) -> Form:
        if self.structured == "auto":
            return "json" if attempt == 0 and self.endpoint.supports("response_format") else "markdown"
        return self.structured
