"""One preference group -> token ids and image tensors, as the model's chat template and processor write them.

The truth is the tokens of `apply_chat_template(prompt + [answer])`. The prompt is what these share, over all answers of
a group, with the tokens of the prompt alone; a response is the rest. TRL splits a pair of text rows in the same way.
Legend: L prompt tokens (image tokens included), K responses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from silkie.batch.template import (
    ChatTemplate,
    GroupTexts,
    TemplateMismatch,
    common_prefix,
    plain_prompt,
    plain_texts,
)
from silkie.data.images import open_image

logger = logging.getLogger(__name__)

ResponseEnd = Literal["template", "end_of_turn"]
SpecialTokens = Literal["refuse", "parse"]

_MOST_APPENDED = 8  # tokens that a processor may write after a prompt (PaliGemma: a line break)


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


@dataclass(slots=True, frozen=True, kw_only=True)
class _Tail:
    """The tokens of a group after its last special token that prompt and conversations share.

    A tokenizer splits a text at special tokens first, so what follows one is tokenised in the same way whatever stands
    before it: the K conversations need not be tokenised whole, nor their images processed K times.

    Attributes:
        before: number of tokens of the prompt before the special token, images not expanded.
        prompt: the prompt's tokens from the special token on.
        conversations: the same of the K conversations.
        special: whether there is such a special token; without one the tail is the whole text.
    """

    before: int
    prompt: list[int]
    conversations: list[list[int]]
    special: bool

    @property
    def shared(self) -> int:
        """Number of leading tokens that the prompt and all conversations have in common."""
        return min(_shared(self.prompt, ids) for ids in self.conversations)


@dataclass(slots=True, frozen=True, kw_only=True)
class _Split:
    """Where the prompt of a group ends and its responses start.

    Attributes:
        length: tokens of the prompt, images expanded.
        responses: K responses, not cut.
        header, unlike: see `GroupLengths`.
    """

    length: int
    responses: list[list[int]]
    header: tuple[int, ...]
    unlike: int


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
        special_tokens: "refuse" rows whose own text holds a special token of the tokenizer (`check_row`), or "parse"
            them as TRL does.

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
        self.special_tokens = special_tokens
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
            out = self.process(texts.prompt, images, plain=texts.plain)
            prompt_ids = out["input_ids"][0]
            split = self._split(texts, prompt_ids.tolist(), images)
        except TemplateMismatch as error:
            raise ValueError(f"{row_name(row)}: {error}.") from error
        length, responses = split.length, self._cut(split.responses, split.length)
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
        texts = self._texts(row)
        if texts.plain or (image_sizes and not self._counts_image_tokens):
            images = [open_image(image, where=row_name(row)) for image in row.get("images") or []]
            ids = self.process(texts.prompt, images, plain=texts.plain)["input_ids"][0].tolist()
            split = self._split(texts, ids, images)
        else:
            split = self._counted_split(texts, image_sizes)
        ids = self._cut(split.responses, split.length)
        return GroupLengths(
            prompt=split.length,
            responses=tuple(map(len, ids)),
            cut=sum(len(a) > len(b) for a, b in zip(split.responses, ids, strict=True)),
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
        start, _, ids, special = self._last_split(GroupTexts(prompt=text, conversations=[], shared=shared))
        before = text[: start + len(self._split_tokens[ids[0]])] if special else ""
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

    def places_images(self, row: Mapping[str, Any]) -> bool:
        """Whether the text of a row of strings itself says where its images go, in the model's own tokens."""
        names = ("image_token", "boi_token")
        tokens = [token for name in names if isinstance(token := getattr(self.processor, name, None), str)]
        return any(plain_prompt(row).count(token) == len(row.get("images") or []) for token in tokens)

    def control_token(self, text: str) -> str | None:
        """A token in a text of the data that no text may hold; None where there is none.

        A tokenizer reads the text of a special token as the token itself, wherever it stands: a response could end its
        own turn and open another one. What stands for an image or a video is refused even where `special_tokens` is
        "parse": the model would look for the features of an image that is not there.
        """
        found = self._control_tokens.search(text)
        return found and found[0]

    def media_token(self, text: str) -> str | None:
        """A token in a text that stands for an image or a video. Rows of strings may hold any other: their prompts are
        often written with a chat template already, as TRL wants them."""
        found = self._media_tokens.search(text)
        return found and found[0]

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        if self.special_tokens == "parse":
            return self._media_tokens
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        own = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return _any_of({*self._media_texts, *own})

    @cached_property
    def _media_tokens(self) -> re.Pattern[str]:
        return _any_of(self._media_texts)

    @property
    def _media_texts(self) -> set[str]:
        return {
            token
            for name in ("image_token", "video_token")
            if isinstance(token := getattr(self.processor, name, None), str)
        }

    def facts(self) -> dict[str, Any]:
        """Everything that decides the tokens, by name: tokenizer, its special tokens (templates write them), template
        and its variables, settings of the processor, limits."""
        return {
            "tokenizer": _tokenizer_facts(self.tokenizer),
            "special_tokens": self.tokenizer.special_tokens_map,
            "template": getattr(self.processor, "chat_template", None),
            "template_kwargs": dict(self.template.kwargs),
            "processor": self.processor.to_dict() if hasattr(self.processor, "to_dict") else None,
            "limits": [self.max_length, self.max_response_length, self.response_end, self.special_tokens],
        }

    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    def process(self, text: str, images: Sequence[Image.Image], *, plain: bool = False) -> Any:
        """What the processor makes of a rendered text, or of plain text, for which TRL leaves special tokens to the
        tokenizer where there are no images."""
        arguments: dict[str, Any] = {"images": [images]} if images else {}
        if bool(images) if plain else self._holds_special_tokens(text):
            arguments["add_special_tokens"] = False
        return self.processor(text=[text], return_tensors="pt", **arguments)

    def _holds_special_tokens(self, text: str) -> bool:
        """Whether a rendered text has its special tokens already: the rule of transformers' `apply_chat_template`."""
        if self.tokenizer is self.processor:
            return True
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _added(self, text: str) -> tuple[list[int], list[int]]:
        """The special tokens that the processor adds before and after a rendered text."""
        return ([], []) if self._holds_special_tokens(text) else self._added_by_default

    @cached_property
    def _added_by_default(self) -> tuple[list[int], list[int]]:
        plain = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("x")["input_ids"]
        if whole == plain or self.process("x", [])["input_ids"][0].tolist() == plain:
            return [], []
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:start], whole[start + len(plain) :]

    @cached_property
    def _split_tokens(self) -> dict[int, str]:
        """The tokens, by id, at which the tokenizer splits a text before it does anything else."""
        decoder = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {i: token.content for i, token in decoder.items() if not token.single_word}

    def _tail(self, texts: GroupTexts) -> _Tail:
        at, before, prompt, special = self._last_split(texts)
        after = self._added(texts.prompt)[1]
        ids = self.tokenizer([c[at:] for c in texts.conversations], add_special_tokens=False)["input_ids"]
        return _Tail(before=before, prompt=prompt, conversations=[[*c, *after] for c in ids], special=special)

    def _last_split(self, texts: GroupTexts) -> tuple[int, int, list[int], bool]:
        """Where the last special token starts that prompt and conversations share: its character, its place in the
        tokens of the prompt, and the tokens from there on. 0, 0, all tokens and False where there is none."""
        if not getattr(self.tokenizer, "is_fast", False):  # gives no characters of tokens
            return 0, 0, self.tokenizer(texts.prompt, add_special_tokens=False)["input_ids"], False
        encoded = self.tokenizer(texts.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        for i in range(len(ids) - 1, -1, -1):
            start, end = spans[i]
            written = self._split_tokens.get(ids[i])  # also the id of an unknown word, which is no split
            if written is not None and end <= texts.shared and written in texts.prompt[start:end]:
                return start, i, ids[i:], True
        return 0, 0, ids, False

    def _split_plain(self, texts: GroupTexts, ids: list[int], images: Sequence[Any]) -> _Split:
        """Splits texts that no template wrote, as TRL does: at the end of the shared tokens; with images, the responses
        are tokenised apart."""
        if images:
            answers = [c[texts.shared :] for c in texts.conversations]
            responses = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
            return _Split(length=len(ids), responses=responses, header=(0,) * len(responses), unlike=0)
        whole = [self.process(c, [], plain=True)["input_ids"][0].tolist() for c in texts.conversations]
        shared = min(_shared(ids, conversation) for conversation in whole)
        if not shared:
            raise TemplateMismatch(
                "the tokens of the prompt are not the first ones of prompt and response",
                "Give the row a longer prompt, or set string_rows='template'",
            )
        return _Split(
            length=shared,
            responses=[conversation[shared:] for conversation in whole],
            header=tuple(_shared(ids, conversation) - shared for conversation in whole),
            unlike=len(ids) - shared,
        )

    def _split(self, texts: GroupTexts, ids: list[int], images: Sequence[Any] = ()) -> _Split:
        """Splits a group into its prompt and its responses.

        Args:
            ids: what the processor makes of the prompt.

        Raises:
            TemplateMismatch: its last tokens are not those of the text.
        """
        if texts.plain:
            return self._split_plain(texts, ids, images)
        tail, after = self._tail(texts), self._added(texts.prompt)[1]
        if after and ids[-len(after) :] == after:
            ids = ids[: -len(after)]
        # The special token itself may stand for an image, which the processor writes in its own way.
        text = tail.prompt[1:] if tail.special else tail.prompt
        if _ends_with(ids, text):
            return self._split_at(len(ids) - len(tail.prompt) + tail.shared, tail)
        # Or the processor ends every prompt in its own way (PaliGemma: a line break), and the response follows that.
        if texts.shared == len(texts.prompt):
            for appended in range(1, _MOST_APPENDED + 1):
                if _ends_with(ids[:-appended], text):
                    answers = [c[texts.shared :] for c in texts.conversations]
                    responses = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
                    return self._split_off(len(ids), responses, header=(0,) * len(responses), unlike=0)
        raise TemplateMismatch(
            f"{type(self.processor).__name__} writes other tokens for the end of the prompt than its tokenizer",
            "silkie cannot tell where the responses start: use a chat template with a special token after the images",
        )

    def _split_at(self, length: int, tail: _Tail) -> _Split:
        shared = tail.shared
        return self._split_off(
            length,
            [ids[shared:] for ids in tail.conversations],
            header=tuple(_shared(tail.prompt, ids) - shared for ids in tail.conversations),
            unlike=len(tail.prompt) - shared,
        )

    def _split_off(self, length: int, responses: list[list[int]], **facts: Any) -> _Split:
        if not all(responses):
            raise TemplateMismatch(
                "the chat template writes nothing for a response after the prompt",
                "Give the response a text, or set another chat template",
            )
        return _Split(length=length, responses=self._ended(responses), **facts)

    def _counted_split(self, texts: GroupTexts, image_sizes: Sequence[tuple[int, int]]) -> _Split:
        """`_split` without the images, where the processor can count their tokens."""
        tail = self._tail(texts)
        length = len(self._added(texts.prompt)[0]) + tail.before + tail.shared - len(image_sizes)
        if image_sizes:
            # Each image's own mark, counted in the text above, is replaced by that many.
            length += sum(self._image_tokens(image_sizes))
        return self._split_at(length, tail)

    def _image_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens of each image of (height, width). Private in transformers: `_counts_image_tokens` tries it out, and
        where it is wrong, or gone, images are processed to be counted."""
        found = self.processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in image_sizes])
        return list(found["num_image_tokens"])

    @cached_property
    def _counts_image_tokens(self) -> bool:
        """Whether the processor can count the tokens of images of a given size, and counts as it encodes. Tried on
        small images, alone and together."""
        if not hasattr(getattr(self.processor, "image_processor", None), "get_number_of_image_patches"):
            return False
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            return False
        shapes = [(56, 56), (84, 140), (300, 64)]
        for sizes in ([shapes[0]], [shapes[1]], shapes):
            images = [Image.new("RGB", (width, height)) for height, width in sizes]
            content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "x"}]
            texts = self.template.write({"prompt": [{"role": "user", "content": content}], "responses": ["x"]})
            encoded = self._split(texts, self.process(texts.prompt, images)["input_ids"][0].tolist())
            if encoded.length != self._counted_split(texts, sizes).length:
                return False
        return True

    def _ended(self, responses: list[list[int]]) -> list[list[int]]:
        """Responses as `response_end` wants them to end."""
        if self.response_end == "template":
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


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Finds the longest of some texts."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")


def _shared(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    return len(common_prefix([first, second]))


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return len(ids) >= len(end) and ids[len(ids) - len(end) :] == end


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
