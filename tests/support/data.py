"""Small preference data over the vocabulary of the tiny tokenizer."""

from __future__ import annotations

import io
from typing import Any

from datasets import Dataset
from PIL import Image

from silkie.data.schema import group_features
from tests.support.tiny import conversation, image

ASPECTS = ("Helpfulness", "Visual Faithfulness")


def png(picture: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def group(
    images: list[Image.Image], question: str, responses: list[str], pairs: list[list[int]], **extra: Any
) -> dict[str, Any]:
    prompt = [
        {
            "role": turn["role"],
            "content": [{"type": part["type"], "text": part.get("text")} for part in turn["content"]],
        }
        for turn in conversation(question, len(images))
    ]
    row = {"images": [png(i) for i in images], "prompt": prompt, "responses": responses, "pairs": pairs}
    return {**row, "pair_weights": [1.0] * len(pairs), "id": None, "models": None, **extra}


def mixed_groups() -> list[dict[str, Any]]:
    """Groups of 4, 2, 3 and 4 responses: one image, two images of different sizes, none, one."""
    return [
        group(
            [image(0)],
            "what is in image ?",
            ["a red cat", "yes", "no not a dog on the table", "is it ?"],
            [[0, 1], [2, 3]],
            id="one",
        ),
        group(
            [image(1, 84, 56), image(2)],
            "how many cat are there in the image ?",
            ["two cat", "one"],
            [[0, 1]],
            id="two",
        ),
        group([], "is there a dog", ["no", "yes yes", "one two three"], [[0, 1]], id="none"),
        group(
            [image(5)],
            "what is in image ?",
            ["a red dog", "yes", "no not a dog on the table", "is it ?"],
            [[0, 1], [2, 3], [0, 3]],
            id="last",
        ),
    ]


def dataset(rows: list[dict[str, Any]] | None = None, aspects: tuple[str, ...] = ()) -> Dataset:
    return Dataset.from_list(rows if rows is not None else mixed_groups(), features=group_features(aspects))
