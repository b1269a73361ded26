"""Special tokens in the text of the data: which of them a text may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from silkie.batch.template import plain_prompt

SpecialTokens = Literal["refuse", "parse"]


class TextTokens:
    """Finds the special tokens that stand in texts of the data.

    Args:
        processor: VLM processor, or the tokenizer of a text-only model.
        rule: "refuse" those of the tokenizer, or "parse" them as TRL does.
    """

    def __init__(self, processor: Any, rule: SpecialTokens) -> None:
        self.processor, self.rule = processor, rule
        self.tokenizer = getattr(processor, "tokenizer", processor)

    def control(self, text: str) -> str | None:
        """A token in a text of the data that no text may hold; None where there is none.

        A tokenizer reads the text of a special token as the token itself, wherever it stands: a response could end its
        own turn and open another one. What stands for an image or a video is refused even where the rule is
        "parse": the model would look for the features of an image that is not there.
        """
        found = self._control_tokens.search(text)
        return found and found[0]

    def media(self, text: str) -> str | None:
        """A token in a text that stands for an image or a video. Rows of strings may hold any other: their prompts are
        often written with a chat template already, as TRL wants them."""
        found = self._media_tokens.search(text)
        return found and found[0]

    def places_images(self, row: Mapping[str, Any]) -> bool:
        """Whether the text of a row of strings itself says where its images go, in the model's own tokens."""
        names = ("image_token", "boi_token")
        tokens = [token for name in names if isinstance(token := getattr(self.processor, name, None), str)]
        return any(plain_prompt(row).count(token) == len(row.get("images") or []) for token in tokens)

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        if self.rule == "parse":
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


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """Finds the longest of some texts."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")
