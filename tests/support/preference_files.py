"""Files in the exact schemas of public preference datasets, with invented content."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")


def picture(seed: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def embedded(seed: int) -> dict[str, Any]:
    """An image as `datasets` stores it in parquet."""
    return {"bytes": png(seed), "path": f"{seed}.png"}


def write_images(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index}.png").write_bytes(png(index))
    return [f"{index}.png" for index in range(count)]


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records),
        encoding="utf-8",
    )
    return path


def annotations(*values: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"Rating": str(value), "Rationale": f"{name} is {value}"}
        for name, value in zip(ASPECTS, values, strict=True)
    }


def vlfeedback(
    index: int = 0, *, ratings=((4, 5, 3), (2, 5, 1), (3, 5, 2), (1, 5, 1)), dict_of_lists: bool = False
) -> dict[str, Any]:
    """One VLFeedback record; the JSONL has a list of objects, `datasets` an object of lists."""
    models = ["gpt4v", "fuyu-8b", "mmgpt", "otter"][: len(ratings)]
    answers = [
        {"annotations": annotations(*values), "model": model, "response": f"answer {index} of {model}"}
        for model, values in zip(models, ratings, strict=True)
    ]
    columns = {name: [answer[name] for answer in answers] for name in ("annotations", "model", "response")}
    return {
        "id": f"svit-{index}",
        "prompt": f"What is in picture {index}?",
        "models": models,
        "completions": columns if dict_of_lists else answers,
        "img_path": f"/somewhere/else/{index}.png",
    }


def group_record(**changes: Any) -> dict[str, Any]:
    record = {
        "id": "g",
        "images": ["0.png"],
        "prompt": "What?",
        "responses": ["good", "bad"],
        "ratings": [{"Help": 5}, {"Help": 1}],
    }
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}
