"""One preference group -> token ids and image tensors. The prompt is encoded once, each response on its own.

Legend: L prompt tokens (image tokens included), K responses.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from silkie.data.images import open_image
from silkie.data.schema import to_messages

logger = logging.getLogger(__name__)

ResponseEnd = Literal["template", "end_of_turn"]

_MARK = "silkieresponse"


@dataclass(slots=True, kw_only=True)
class EncodedGroup:
    """Token ids of one group.

    Attributes:
        prompt_ids: [L] prompt with its image tokens expanded and the assistant header at the end.
        responses: K tensors of token ids, each ending with the end-of-turn token unless its tail was cut.
        token_inputs: [L] what else the processor returns per token (`mm_token_type_ids`, ...), by name.
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

    @property
    def fits(self) -> bool:
        """False where the prompt leaves no room for a response."""
        return all(n > 0 for n in self.responses)


class GroupEncoder:
    """Encodes groups with a processor.

    Args:
        processor: VLM processor with a chat template.
        max_length: limit on prompt + response tokens; only response tails are cut to hold it. None: no limit.
        max_response_length: limit on the tokens of a response. None: no limit.
        response_end: "template" scores what the chat template writes after an answer (for Qwen `<|im_end|>` and a line
            break), as TRL does; "end_of_turn" stops at the end-of-turn token.

    Raises:
        ValueError: the processor has no chat template.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        max_response_length: int | None = None,
        response_end: ResponseEnd = "template",
    ) -> None:
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{type(processor).__name__} has no chat template. Pass the processor of an instruction-tuned model, or"
                " set `processor.chat_template`."
            )
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.max_response_length = max_response_length
        self.response_end = response_end
        self.suffix = self._turn_suffix()

    def encode(self, row: Mapping[str, Any]) -> EncodedGroup:
        """Encodes a row of a preference-group dataset.

        Raises:
            silkie.data.DataError: an image cannot be decoded.
            ValueError: the prompt leaves no room for the responses (such rows are dropped before training starts).
        """
        images = [
            open_image(image, where=f"{describe(row)}, image {i}") for i, image in enumerate(row.get("images") or [])
        ]
        text = self.render(row)
        arguments: dict[str, Any] = {"images": [images]} if images else {}
        # The template already holds the special tokens, so the tokenizer must not add them again.
        out = self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **arguments)
        prompt_ids = out["input_ids"][0]
        per_token = {name for name, value in out.items() if _is_per_token(value, out["input_ids"])}
        responses = self._cut(self._tokenize(row["responses"]), len(prompt_ids))
        if not all(len(r) for r in responses):
            raise ValueError(
                f"{describe(row)}: the prompt has {len(prompt_ids)} tokens and max_length is {self.max_length}: no room"
                " for a response."
            )
        return EncodedGroup(
            prompt_ids=prompt_ids,
            responses=[torch.tensor(r, dtype=torch.long) for r in responses],
            token_inputs={k: out[k][0] for k in sorted(per_token - {"input_ids", "attention_mask", "labels"})},
            vision={k: v for k, v in out.items() if k not in per_token},
            n_images=len(images),
        )

    def measure(self, row: Mapping[str, Any], image_sizes: Sequence[tuple[int, int]]) -> GroupLengths:
        """Token counts of a row, from its text and the (height, width) of its images, without decoding them where the
        processor can count."""
        images = len(image_sizes)
        if images and not hasattr(self.processor.image_processor, "get_number_of_image_patches"):
            prompt = len(self.encode(row).prompt_ids)
        else:
            prompt = len(self.tokenizer(self.render(row), add_special_tokens=False)["input_ids"]) - images
            if images:
                prompt += sum(
                    self.processor._get_num_multimodal_tokens(image_sizes=[list(s) for s in image_sizes])[
                        "num_image_tokens"
                    ]
                )
        whole = self._tokenize(row["responses"])
        ids = self._cut(whole, prompt)
        cut = sum(len(a) > len(b) for a, b in zip(whole, ids, strict=True))
        return GroupLengths(
            prompt=prompt, responses=tuple(map(len, ids)), cut=cut, equal_to=tuple(ids.index(r) for r in ids)
        )

    def render(self, row: Mapping[str, Any]) -> str:
        """The text of a row's prompt, as the chat template writes it up to the answer, with one mark per image."""
        return self.processor.apply_chat_template(
            to_messages(row["prompt"]), tokenize=False, add_generation_prompt=True
        )

    @property
    def media_tokens(self) -> tuple[str, ...]:
        """The texts that stand for an image or a video in the model's input, which no prompt or response may hold."""
        tokens = (getattr(self.processor, name, None) for name in ("image_token", "video_token"))
        return tuple(token for token in tokens if isinstance(token, str))

    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens: tokenizer, its special tokens (templates write them), template,
        settings of the processor, limits."""
        state = {
            "tokenizer": (
                self.tokenizer.backend_tokenizer.to_str()
                if hasattr(self.tokenizer, "backend_tokenizer")
                else self.tokenizer.get_vocab()
            ),
            "special_tokens": self.tokenizer.special_tokens_map,
            "template": self.processor.chat_template,
            "processor": self.processor.to_dict(),
            "limits": [self.max_length, self.max_response_length, self.suffix],
        }
        return hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _tokenize(self, responses: Sequence[str]) -> list[list[int]]:
        # A leading line break would follow the assistant header's own and is not what the model writes.
        return self.tokenizer([r.lstrip("\n") + self.suffix for r in responses], add_special_tokens=False)["input_ids"]

    def _cut(self, responses: list[list[int]], prompt_length: int) -> list[list[int]]:
        room = min(
            self.max_response_length if self.max_response_length is not None else 1 << 30,
            self.max_length - prompt_length if self.max_length is not None else 1 << 30,
        )
        return [ids[: max(room, 0)] for ids in responses]

    def _turn_suffix(self) -> str:
        """What the chat template writes after an assistant turn's text."""
        user = {"role": "user", "content": [{"type": "text", "text": "x"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
        rendered = self.processor.apply_chat_template([user, answer], tokenize=False)
        suffix = rendered.rsplit(_MARK, 1)[-1] if _MARK in rendered else ""
        ids = self.tokenizer(suffix, add_special_tokens=False)["input_ids"]
        special = [i for i, token in enumerate(ids) if token in self.tokenizer.all_special_ids]
        if not special:
            logger.warning(
                "The chat template does not end an assistant turn with a special token; responses end with %r.",
                self.tokenizer.eos_token,
            )
            return self.tokenizer.eos_token
        if self.response_end == "end_of_turn":
            return self.tokenizer.convert_ids_to_tokens(ids[special[0]])
        return suffix


def _is_per_token(value: Any, input_ids: Tensor) -> bool:
    """Whether a processor's output has one whole number per token; everything else describes images."""
    return isinstance(value, Tensor) and value.shape == input_ids.shape and not value.is_floating_point()


def describe(row: Mapping[str, Any]) -> str:
    """How an error names a row: its number in the dataset and its id."""
    parts = [f"row {row['row']}"] if row.get("row") is not None else []
    if row.get("id"):
        parts.append(f"id {row['id']!r}")
    return ", ".join(parts) or "row without id"
