"""Where the prompt of a group ends and its responses start, in tokens.

The truth is the tokens of `apply_chat_template(prompt + [answer])`. The prompt is what these share, over all answers of
a group, with the tokens of the prompt alone; a response is the rest. TRL splits a pair of text rows in the same way.
Legend: K responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from silkie.batch.template import ChatTemplate, GroupTexts, TemplateMismatch, common_prefix

_MOST_APPENDED = 8  # tokens that a processor may write after a prompt (PaliGemma: a line break)


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
class Split:
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


class PromptSplitter:
    """Splits rendered groups with a processor and its tokenizer.

    Args:
        processor: VLM processor, or the tokenizer of a text-only model.
        template: writes the groups.
    """

    def __init__(self, processor: Any, template: ChatTemplate) -> None:
        self.processor, self.template = processor, template
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def process(self, text: str, images: Sequence[Image.Image], *, plain: bool = False) -> Any:
        """What the processor makes of a rendered text, or of plain text, for which TRL leaves special tokens to the
        tokenizer where there are no images."""
        arguments: dict[str, Any] = {"images": [images]} if images else {}
        if bool(images) if plain else self._holds_special_tokens(text):
            arguments["add_special_tokens"] = False
        return self.processor(text=[text], return_tensors="pt", **arguments)

    def split(self, texts: GroupTexts, ids: list[int], images: Sequence[Any] = ()) -> Split:
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

    def counted(self, texts: GroupTexts, image_sizes: Sequence[tuple[int, int]]) -> Split:
        """`split` without the images, where the processor can count their tokens."""
        tail = self._tail(texts)
        length = len(self._added(texts.prompt)[0]) + tail.before + tail.shared - len(image_sizes)
        if image_sizes:
            # Each image's own mark, counted in the text above, is replaced by that many.
            length += sum(self._image_tokens(image_sizes))
        return self._split_at(length, tail)

    def _image_tokens(self, image_sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens of each image of (height, width). Private in transformers: `counts_image_tokens` tries it out, and
        where it is wrong, or gone, images are processed to be counted."""
        found = self.processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in image_sizes])
        return list(found["num_image_tokens"])

    @cached_property
    def counts_image_tokens(self) -> bool:
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
            encoded = self.split(texts, self.process(texts.prompt, images)["input_ids"][0].tolist())
            if encoded.length != self.counted(texts, sizes).length:
                return False
        return True

    def last_special(self, texts: GroupTexts) -> tuple[int, int, list[int], bool]:
        """Where the last special token starts that prompt and conversations share: its character, its place in the
        tokens of the prompt, and the tokens from there on. 0, 0, all tokens and False where there is none."""
        if not getattr(self.tokenizer, "is_fast", False):  # gives no characters of tokens
            return 0, 0, self.tokenizer(texts.prompt, add_special_tokens=False)["input_ids"], False
        encoded = self.tokenizer(texts.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        for i in range(len(ids) - 1, -1, -1):
            start, end = spans[i]
            written = self.special_texts.get(ids[i])  # also the id of an unknown word, which is no split
            if written is not None and end <= texts.shared and written in texts.prompt[start:end]:
                return start, i, ids[i:], True
        return 0, 0, ids, False

    def _tail(self, texts: GroupTexts) -> _Tail:
        at, before, prompt, special = self.last_special(texts)
        after = self._added(texts.prompt)[1]
        ids = self.tokenizer([c[at:] for c in texts.conversations], add_special_tokens=False)["input_ids"]
        return _Tail(before=before, prompt=prompt, conversations=[[*c, *after] for c in ids], special=special)

    def _split_at(self, length: int, tail: _Tail) -> Split:
        shared = tail.shared
        return self._split_off(
            length,
            [ids[shared:] for ids in tail.conversations],
            header=tuple(_shared(tail.prompt, ids) - shared for ids in tail.conversations),
            unlike=len(tail.prompt) - shared,
        )

    def _split_off(self, length: int, responses: list[list[int]], **facts: Any) -> Split:
        if not all(responses):
            raise TemplateMismatch(
                "the chat template writes nothing for a response after the prompt",
                "Give the response a text, or set another chat template",
            )
        return Split(length=length, responses=responses, **facts)

    def _split_plain(self, texts: GroupTexts, ids: list[int], images: Sequence[Any]) -> Split:
        """Splits texts that no template wrote, as TRL does: at the end of the shared tokens; with images, the responses
        are tokenised apart."""
        if images:
            answers = [c[texts.shared :] for c in texts.conversations]
            responses = self.tokenizer(answers, add_special_tokens=False)["input_ids"]
            return Split(length=len(ids), responses=responses, header=(0,) * len(responses), unlike=0)
        whole = [self.process(c, [], plain=True)["input_ids"][0].tolist() for c in texts.conversations]
        shared = min(_shared(ids, conversation) for conversation in whole)
        if not shared:
            raise TemplateMismatch(
                "the tokens of the prompt are not the first ones of prompt and response",
                "Give the row a longer prompt, or set string_rows='template'",
            )
        return Split(
            length=shared,
            responses=[conversation[shared:] for conversation in whole],
            header=tuple(_shared(ids, conversation) - shared for conversation in whole),
            unlike=len(ids) - shared,
        )

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """The tokens, by id, at which the tokenizer splits a text before it does anything else."""
        decoder = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {i: token.content for i, token in decoder.items() if not token.single_word}

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


def _shared(first: list[int], second: list[int]) -> int:
    """Number of leading tokens that two sequences have in common."""
    return len(common_prefix([first, second]))


def _ends_with(ids: list[int], end: list[int]) -> bool:
    return len(ids) >= len(end) and ids[len(ids) - len(end) :] == end
