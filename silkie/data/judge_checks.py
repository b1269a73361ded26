"""Signs that a judge mixed up the texts it rated.

A judge sees all responses of a group at once and writes one block per text. When it swaps two texts or repeats one, the
ratings land on the wrong response, and the pairs are wrong without anything failing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from silkie.data.pairs import same_text

NUMBERED = re.compile(
    r"\b(?:text|response|answer|output|assistant|completion)\s*(?:no\.?|number|#)?\s*<?(\d{1,2})>?\b", re.IGNORECASE
)
SHORT_RATIONALE = 25  # characters: "Accurate and helpful." is written twice without anything being wrong


def judge_flags(group: Mapping[str, Any]) -> Iterator[str]:
    """The suspicious findings in one group, each at most once.

    - "one response, two ratings": the same text got different ratings.
    - "one rationale for two responses": a long rationale is repeated for a different text on the same aspect.
    - "rationale of another response": a rationale names the number of another text and not its own.
    """
    responses, ratings, rationales = group["responses"], group.get("ratings"), group.get("rationales")
    if ratings and _contradicts(responses, ratings):
        yield "one response, two ratings"
    if rationales:
        if _repeats(responses, rationales):
            yield "one rationale for two responses"
        if any(
            _names_another(text, index, len(responses))
            for index, texts in enumerate(rationales)
            for text in (texts or {}).values()
        ):
            yield "rationale of another response"


def _contradicts(responses: list[str], ratings: list[Mapping[str, Any]]) -> bool:
    return any(
        same_text(responses[i], responses[j]) and ratings[i] != ratings[j]
        for i in range(len(responses))
        for j in range(i)
    )


def _repeats(responses: list[str], rationales: list[Mapping[str, str | None] | None]) -> bool:
    seen: dict[tuple[str, str], int] = {}
    for index, texts in enumerate(rationales):
        for aspect, text in (texts or {}).items():
            key = (aspect, " ".join((text or "").split()).casefold())
            first = seen.setdefault(key, index)
            if len(key[1]) >= SHORT_RATIONALE and first != index and not same_text(responses[first], responses[index]):
                return True
    return False


def _names_another(text: str | None, index: int, count: int) -> bool:
    """True where a rationale speaks of exactly one numbered text of this group (counted from 1), and it is another
    one."""
    named = {int(number) for number in NUMBERED.findall(text or "")}
    return len(named) == 1 and (number := named.pop()) != index + 1 and 1 <= number <= count
