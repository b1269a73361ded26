"""Models that answer: one in this process (adapter on or off), or one behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

__all__ = ["Answerer", "AnswererError", "EndpointAnswerer", "LocalAnswerer"]


class AnswererError(RuntimeError):
    """No answers are available at the moment; those written so far are kept, and the same command resumes after
    them."""


class Answerer(Protocol):
    """Answers a batch. `wants_pixels`: images are decoded (PIL, in workers); otherwise their paths are handed over."""

    wants_pixels: bool

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, seed: int) -> list[str]: ...

    def close(self) -> None: ...


class LocalAnswerer:
    """A model in this process.

    Args:
        model, processor: of `silkie.inference.load_policy`.
        use_adapter: False answers with the base model under the adapter (no second copy of the weights).
    """

    wants_pixels = True

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        use_adapter: bool = True,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        system: str | None = None,
    ) -> None:
        if not use_adapter and not hasattr(model, "disable_adapter"):
            raise ValueError(
                "The model has no adapter to switch off. Give an adapter directory, or ask for the base answers of a"
                " plain model."
            )
        self.model, self.processor, self.use_adapter, self.system = model, processor, use_adapter, system
        self.generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, seed: int) -> list[str]:
        from silkie.inference import generate

        conversations = [
            question_turns(prompt, len(own), self.system) for prompt, own in zip(prompts, images, strict=True)
        ]
        with nullcontext() if self.use_adapter else self.model.disable_adapter():
            texts = generate(
                self.model,
                self.processor,
                conversations,
                [list(own) for own in images],
                seed=seed,
                batch_size=len(prompts),
                **self.generation,
            )
        return [text[0] for text in texts]

    def close(self) -> None:
        """Nothing to close: the model belongs to the caller."""


class EndpointAnswerer:
    """A model behind an OpenAI-compatible endpoint; the questions of a batch go out together. The key comes from the
    environment.

    An answer that the endpoint declines, or that is empty, is the empty string: it is scored as such. A server that
    cannot be reached stops the run; running the command again resumes it.
    """

    wants_pixels = False

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        system: str | None = None,
        timeout: float = 120.0,
        key_variable: str | None = None,
    ) -> None:
        from silkie.endpoint.client import Endpoint

        self.endpoint = Endpoint(base_url, model, timeout=timeout, key_variable=key_variable)
        self.generation = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self.system = system
        # one event loop for the whole run: the client's connections belong to it
        self._runner = asyncio.Runner()

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], *, seed: int) -> list[str]:
        from silkie.endpoint.errors import AnswerError, ItemError, StopRun

        try:
            return self._runner.run(self._answer_all(prompts, images, seed))
        except (AnswerError, ItemError, StopRun) as error:
            raise AnswererError(
                f"{error}. The answers so far are kept; run the same command again to resume."
            ) from error

    def close(self) -> None:
        self._runner.run(self.endpoint.close())
        self._runner.close()

    async def _answer_all(self, prompts: Sequence[str], images: Sequence[Sequence[Any]], seed: int) -> list[str]:
        # wait for every call before an error ends the batch: a call left in flight would be answered, and paid for,
        # after the run
        calls = (self._one(prompt, own, seed) for prompt, own in zip(prompts, images, strict=True))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, str)]

    async def _one(self, prompt: str, images: Sequence[Any], seed: int) -> str:
        from silkie.endpoint.errors import AnswerError
        from silkie.endpoint.media import data_url

        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
        ]
        content.append({"type": "text", "text": prompt})
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": content if images else prompt})
        try:
            answer = await self.endpoint.chat(messages, keep_truncated=True, seed=seed, **self.generation)
        except AnswerError as error:
            if error.kind in ("refused", "empty"):
                return ""
            raise
        return answer.text.strip()


def question_turns(prompt: str, images: int, system: str | None = None) -> list[dict[str, Any]]:
    """A single user turn: the images, then the text."""
    parts: list[dict[str, Any]] = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    head = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*head, {"role": "user", "content": parts}]
