"""One preference group -> token ids and image tensors, as the model's chat template and processor write them.

Where a prompt ends is found in `silkie.batch.splitting`; here responses get their end and are cut to the limits.
Legend: L prompt tokens (image tokens included), K responses.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from silkie.batch.splitting import PromptSplitter
from silkie.batch.template import (
    ChatTemplate,
    GroupTexts,
    TemplateMismatch,
    common_prefix,
    plain_prompt,
    plain_texts,
)
from silkie.batch.text_tokens import SpecialTokens, TextTokens
from silkie.data.images import open_image

logger = logging.getLogger(__name__)

ResponseEnd = Literal["template", "end_of_turn"]


@dataclass(slots=True, kw_only=True)
class EncodedGroup:
    """Token ids of one group.

    Attributes:
        prompt_ids: [L] prompt with its image tokens expanded and the assistant header at the end.
        responses: K tensors of token ids, each ending with the end-of-turn token unless its tail was cut.
        token_inputs: every other [L] output of the processor that has one number per token, under its own name
            (`token_type_ids`, `mm_token_type_ids`, ...).
        vision: image tensors of the processor (`pixel_values`, `image_grid_thw`, ...); empty for a text-only group.
        n_images: images of the group.
    """

    prompt_ids: Tensor
    responses: list[Tensor]
    token_inputs: dict[str, Tensor] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)
    n_images: int = 0


@dataclass(slots=True, frozen=True, kw_only=True)
class GroupLengths:
    """Token counts of one group after cutting."""

    prompt: int
    responses: tuple[int, ...]
    cut: int  # responses whose tail was cut
    equal_to: tuple[int, ...]  # of each response, the first one with the same tokens after cutting
    header: tuple[int, ...]  # of each response, how many of its first tokens also stand in the generation prompt
    unlike: int  # last tokens of the generation prompt that are not part of the prompt, as no answer follows them

    @property
    def fits(self) -> bool:
        """False where the prompt leaves no room for a response."""
        return all(n > 0 for n in self.responses)


class GroupEncoder:
    """Encodes groups with a processor.

    Args:
        processor: VLM processor with a chat template, or the tokenizer of a text-only model.
        max_length: limit on prompt + response tokens; only response tails are cut to hold it. None: no limit.
        max_response_length: limit on the tokens of a response. None: no limit.
        response_end: "template" scores what the chat template writes after an answer (for Qwen `<|im_end|>` and a line
            break), as TRL does; "end_of_turn" stops at the end-of-turn token.
        chat_template_kwargs: variables of the chat template, such as `enable_thinking`; a row's column of this name
            wins over them.
        special_tokens: "refuse" rows whose own text holds a special token of the tokenizer, or "parse" them as TRL
            does.

    Attributes:
        splitter: finds where the prompt of a rendered row ends.
        text_tokens: finds the special tokens that stand in the text of a row.

    Raises:
        ValueError: the processor has no chat template that writes prompts and answers.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        max_response_length: int | None = None,
        response_end: ResponseEnd = "template",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        special_tokens: SpecialTokens = "refuse",
    ) -> None:
        self.template = ChatTemplate(processor=processor, kwargs=dict(chat_template_kwargs or {}))
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.max_length = max_length
        self.max_response_length = max_response_length
        self.response_end = response_end
        self.text_tokens = TextTokens(processor, special_tokens)
        self.splitter = PromptSplitter(processor, self.template)
        self._end = self._end_of_turn() if self.template.exists else None

    def encode(self, row: Mapping[str, Any]) -> EncodedGroup:
        """Encodes a row of a preference-group dataset.

        A response of the row is a string, or a list of turns (an answer in several turns).

        Raises:
            silkie.data.DataError: an image cannot be decoded.
            ValueError: the prompt leaves no room for the responses (such rows are dropped before training starts), or
                the chat template cannot write the row.
        """
        images = [
            open_image(image, where=f"{row_name(row)}, image {i}") for i, image in enumerate(row.get("images") or [])
        ]
        try:
            texts = self._texts(row)
            out = self.splitter.process(texts.prompt, images, plain=texts.plain)
            prompt_ids = out["input_ids"][0]
            split = self.splitter.split(texts, prompt_ids.tolist(), images)
        except TemplateMismatch as error:
            raise ValueError(f"{row_name(row)}: {error}.") from error
        length = split.length
        responses = self._cut(self._ended(split.responses, texts), length)
        if not all(len(r) for r in responses):
            raise ValueError(
                f"{row_name(row)}: the prompt has {length} tokens and max_length is {self.max_length}: no room"
                " for a response."
            )
        per_token = {k: v[0, :length] for k, v in out.items() if _is_per_token(v, out["input_ids"])}
        return EncodedGroup(
            prompt_ids=prompt_ids[:length],
            responses=[torch.tensor(r, dtype=torch.long) for r in responses],
            token_inputs={k: v for k, v in per_token.items() if k not in ("input_ids", "attention_mask", "labels")},
            vision={k: v for k, v in out.items() if k not in per_token},
            n_images=len(images),
        )

    def measure(self, row: Mapping[str, Any], image_sizes: Sequence[tuple[int, int]]) -> GroupLengths:
        """Token counts of a row, from its text and the (height, width) of its images, without processing them where the
        processor can count.

        Raises:
            TemplateMismatch: the chat template cannot write the row.
        """
        texts, splitter = self._texts(row), self.splitter
        if texts.plain or (image_sizes and not splitter.counts_image_tokens):
            images = [open_image(image, where=row_name(row)) for image in row.get("images") or []]
            ids = splitter.process(texts.prompt, images, plain=texts.plain)["input_ids"][0].tolist()
            split = splitter.split(texts, ids, images)
        else:
            split = splitter.counted(texts, image_sizes)
        whole = self._ended(split.responses, texts)
        ids = self._cut(whole, split.length)
        return GroupLengths(
            prompt=split.length,
            responses=tuple(map(len, ids)),
            cut=sum(len(a) > len(b) for a, b in zip(whole, ids, strict=True)),
            equal_to=tuple(ids.index(r) for r in ids),
            header=split.header,
            unlike=split.unlike,
        )

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of a row's prompt, as the chat template writes it up to the answer, with one mark per image."""
        return plain_prompt(row) if row.get("form") == "plain" else self.template.prompt(row)

    def _texts(self, row: Mapping[str, Any]) -> GroupTexts:
        if row.get("form") != "plain":
            return self.template.write(row)
        if not self.tokenizer.eos_token:
            raise TemplateMismatch(
                "the tokenizer has no end-of-sequence token, which ends a response of plain text",
                "Set `tokenizer.eos_token`, or string_rows='template'",
            )
        return plain_texts(row, self.tokenizer.eos_token)

    def tokens_after(self, text: str, shared: int, n_images: int) -> list[int] | None:
        """The tokens of a rendered prompt behind the last special token within its first `shared` characters; those
        before depend on these characters alone. All tokens where there is no such token, None where images follow."""
        start, _, ids, special = self.splitter.last_special(GroupTexts(prompt=text, conversations=[], shared=shared))
        before = text[: start + len(self.splitter.special_texts[ids[0]])] if special else ""
        if n_images and before.count(self._image_mark) != n_images:
            return None
        return ids[1:] if special else ids

    @cached_property
    def _image_mark(self) -> str:
        """What the chat template writes for an image; empty where there is no template."""
        if not getattr(self.processor, "chat_template", None):
            return ""
        text = {"type": "text", "text": "x"}
        alone, both = (
            self.render({"prompt": [{"role": "user", "content": content}]})
            for content in ([text], [{"type": "image"}, text])
        )
        before = len(common_prefix([alone, both]))
        return both[before : len(both) - len(alone) + before]

    def facts(self) -> dict[str, Any]:
        """Everything that decides the tokens, by name: tokenizer, its special tokens (templates write them), template
        and its variables, settings of the processor, limits."""
        return {
            "tokenizer": _tokenizer_facts(self.tokenizer),
            "special_tokens": self.tokenizer.special_tokens_map,
            "template": getattr(self.processor, "chat_template", None),
            "template_kwargs": dict(self.template.kwargs),
            "processor": self.processor.to_dict() if hasattr(self.processor, "to_dict") else None,
            "limits": [self.max_length, self.max_response_length, self.response_end, self.text_tokens.rule],
        }

    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _ended(self, responses: list[list[int]], texts: GroupTexts) -> list[list[int]]:
        """Responses as `response_end` wants them to end."""
        if texts.plain or self.response_end == "template":
            return responses
        assert self._end is not None  # a chat template has written the responses
        token, times = self._end
        return [_up_to(ids, token, times) for ids in responses]

    def _cut(self, responses: list[list[int]], prompt_length: int) -> list[list[int]]:
        room = min(
            self.max_response_length if self.max_response_length is not None else 1 << 30,
            self.max_length - prompt_length if self.max_length is not None else 1 << 30,
        )
        return [ids[: max(room, 0)] for ids in responses]

    def _end_of_turn(self) -> tuple[int, int]:
        """The first special token that the chat template writes after an answer, and how often it comes there; the
        end-of-sequence token and 0 where it writes none."""
        ids = self.tokenizer(self.template.suffix(), add_special_tokens=False)["input_ids"]
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        known = {*self.tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
        special = [token for token in ids if token in known]
        if special:
            return special[0], ids.count(special[0])
        ending = "nothing more" if self.response_end == "template" else repr(self.tokenizer.eos_token)
        logger.warning(
            "The chat template does not end an assistant turn with a special token; responses end with %s.", ending
        )
        return self.tokenizer.eos_token_id, 0


def _is_per_token(value: Any, input_ids: Tensor) -> bool:
    """Whether a processor's output has one whole number per token; everything else describes images."""
    return isinstance(value, Tensor) and value.shape == input_ids.shape and not value.is_floating_point()


def row_name(row: Mapping[str, Any]) -> str:
    """How an error names a row: its number in the dataset and its id."""
    parts = [f"row {row['row']}"] if row.get("row") is not None else []
    if row.get("id"):
        parts.append(f"id {row['id']!r}")
    return ", ".join(parts) or "row without id"


def _up_to(ids: list[int], token: int, times: int) -> list[int]:
    """`ids` up to the `times`-th last `token`; with `times` 0, all of them and the token."""
    if not times:
        return [*ids, token]
    places = [i for i, each in enumerate(ids) if each == token]
    return ids[: places[-times] + 1] if len(places) >= times else ids


def _tokenizer_facts(tokenizer: Any) -> Any:
    """What a tokenizer is, without the padding and truncation that its last call left in it."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.get_vocab()
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in facts.items() if name not in ("padding", "truncation")}
