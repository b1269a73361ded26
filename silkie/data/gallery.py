"""An inspection as one HTML file: figures, and random groups with images, ratings and rationales. It loads nothing from
elsewhere."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from silkie.data.images import ImageError, open_image
from silkie.data.inspect import Inspection, sample_rows
from silkie.data.rendering import number, percent
from silkie.data.schema import prompt_text
from silkie.data.statistics import mean_or_none

THUMBNAIL = 420  # pixels of the longer side


def write_gallery(inspection: Inspection, path: str | Path, *, groups: int = 24, seed: int = 0) -> None:
    """Write the HTML page with `groups` random groups."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=percent, number=number)
    rows = sample_rows(inspection.dataset, groups, seed)
    page = environment.get_template("gallery.html.j2").render(
        report=inspection.report,
        figures=inspection.figures,
        rating_values=sorted(
            {value for aspect in inspection.figures["ratings"].values() for value in aspect["share"]}, key=float
        ),
        groups=[card(inspection.dataset[row], row) for row in rows],
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def card(group: dict[str, Any], row: int) -> dict[str, Any]:
    """What the page shows of one group. Responses are ordered from best to worst."""
    ratings, rationales = group.get("ratings"), group.get("rationales")
    wins = {index: sum(pair[0] == index for pair in group["pairs"]) for index in range(len(group["responses"]))}
    losses = {index: sum(pair[1] == index for pair in group["pairs"]) for index in range(len(group["responses"]))}
    responses = []
    for index, text in enumerate(group["responses"]):
        mean = mean_or_none(ratings[index]) if ratings else None
        responses.append(
            {
                "index": index,
                "text": text,
                "model": group["models"][index] if group.get("models") else None,
                "mean": mean,
                "ratings": ratings[index] if ratings else {},
                "rationales": {
                    aspect: text for aspect, text in (rationales[index] if rationales else {}).items() if text
                },
                "wins": wins[index],
                "losses": losses[index],
            }
        )
    responses.sort(key=_rank)
    return {
        "row": row,
        "id": group["id"],
        "turns": [{"role": turn["role"], "text": prompt_text([turn])} for turn in group["prompt"]],
        "images": [thumbnail(image, f"row {row}, image {number}") for number, image in enumerate(group["images"])],
        "responses": responses,
        "pairs": len(group["pairs"]),
    }


def _rank(response: dict[str, Any]) -> tuple[float, int]:
    """Sort key: the mean rating, then the record of wins, best first."""
    mean = response["mean"]
    return (math.inf if mean is None else -mean, response["losses"] - response["wins"])


def thumbnail(value: Any, where: str) -> dict[str, str | None]:
    """A small JPEG as a data URI, or the error where the image cannot be decoded."""
    try:
        image = open_image(value, where=where)
    except ImageError as error:
        return {"uri": None, "error": str(error), "size": None}
    size = f"{image.width} x {image.height}"
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return {
        "uri": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "error": None,
        "size": size,
    }
