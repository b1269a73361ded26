"""How an answer is read as yes or no: each benchmark's own published rule, as a pure function. The rules differ, and so
do the scores they give."""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["YesNo", "read_exact", "read_first_word", "read_mme", "read_pope"]

YesNo = Literal["yes", "no", "other"]


def read_mme(answer: str) -> YesNo:
    """MME: the first four characters, lower-cased; they contain "yes", else "no", else the answer is wrong.
    Leading spaces use up characters."""
    head = answer.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def read_pope(answer: str) -> YesNo:
    """POPE: up to the first full stop, commas removed; "No", "no" or "not" as a space-separated word -> no; everything
    else, "NO" too, -> yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def read_exact(answer: str) -> YesNo:
    """AMBER: exactly "Yes" or "No"; its official scorer counts anything else as wrong."""
    return "yes" if answer == "Yes" else "no" if answer == "No" else "other"


def read_first_word(answer: str) -> YesNo:
    """The first word, whatever its case and punctuation: the rule for custom yes/no sets."""
    word = re.search(r"[A-Za-z]+", answer)
    head = word.group().lower() if word else ""
    return "yes" if head == "yes" else "no" if head == "no" else "other"
