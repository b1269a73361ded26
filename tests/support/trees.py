"""Rows that ask several questions about an image, in no particular order."""

from __future__ import annotations

from typing import Any

from tests.support.data import group
from tests.support.hybrid import words
from tests.support.tiny import image

DOCUMENT = words(40, 99)


def asked(images: list[Any], question: str, lengths: list[int], seed: int) -> dict[str, Any]:
    pairs = [[0, 1]] if len(lengths) > 1 else []
    return group(images, question, [words(n, seed + j) for j, n in enumerate(lengths)], pairs, id=f"group {seed}")


def tree_rows(family: str = "qwen2_5_vl") -> list[dict[str, Any]]:
    """Three questions about one image (two begin alike), two about two images, two about a document, one alone; none
    next to its company. Answers of unequal length, one of one word; questions from one word to 70."""
    one, two = [image(0)], [image(1, 112, 56), image(2)]
    rows = [
        asked(one, "what is in image ?", [3, 1, 20], 10),
        asked(two, words(70, 2), [2, 9], 20),
        asked(one, "what is on the left of the cat", [5, 6], 30),
        asked([], DOCUMENT + " " + words(12, 7), [4, 1], 40),
        asked(two, "no", [12, 2, 7], 50),
        asked([image(3)], "is there a dog", [2, 2], 60),
        asked([], DOCUMENT + " yes", [30, 5], 70),
        asked(one, "yes", [8], 80),
    ]
    return [row for row in rows if row["images"] or family != "paligemma"]


TREES = [(0, 2, 7), (1, 4), (3, 6), (5,)]  # of `tree_rows`, in the order of the batch


def album_rows() -> list[dict[str, Any]]:
    """Three questions about three images, two about three others, and two groups without company: long enough to be
    shared as they are."""
    one, two = [image(n) for n in range(3)], [image(n, 112, 56) for n in range(3, 6)]
    return [
        asked(one, "what is in image ?", [3, 1, 20], 10),
        asked(two, words(70, 2), [2, 9], 20),
        asked(one, "what is on the left of the cat", [5, 6], 30),
        asked([], "is there a dog", [4, 30, 5], 40),
        asked(two, "no", [12, 2, 7], 50),
        asked([image(7)], "is there a dog", [2, 2], 60),
        asked(one, "yes", [8, 3], 80),
    ]
