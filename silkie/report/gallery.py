"""An inspection of preference data as one page: figures, and random groups with images, ratings and rationales.

python -m silkie.data inspect SOURCE --html FILE
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silkie.data.images import ImageError
from silkie.data.inspect import Inspection, sample_rows
from silkie.data.pairs import mean_ratings
from silkie.data.rendering import number, percent
from silkie.data.schema import prompt_text
from silkie.report.pictures import PictureBook
from silkie.report.render import page

__all__ = ["write_gallery"]


def write_gallery(inspection: Inspection, path: str | Path, *, groups: int = 24, seed: int = 0) -> None:
    """Write the page with `groups` random groups."""
    report, figures, book = inspection.report, inspection.figures, PictureBook()
    rows = sample_rows(inspection.dataset, groups, seed)
    summary = f"Format {report.format}, {report.rows:,} rows read."
    html = page(
        "gallery.html.j2",
        report.source,
        f"{summary} {report.regrouped.summary()}." if report.regrouped else summary,
        filters={"percent": percent, "number": number},
        report=report,
        figures=figures,
        rating_values=sorted({value for aspect in figures["ratings"].values() for value in aspect["share"]}, key=float),
        groups=[card(inspection.dataset[row], row, book) for row in rows],
        pictures=book.uris,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(html, encoding="utf-8")


def card(group: Mapping[str, Any], row: int, book: PictureBook) -> dict[str, Any]:
    """What the page shows of one group. Responses are ordered from best to worst; images go into `book`."""
    ratings, rationales = group.get("ratings"), group.get("rationales")
    wins = {index: sum(pair[0] == index for pair in group["pairs"]) for index in range(len(group["responses"]))}
    losses = {index: sum(pair[1] == index for pair in group["pairs"]) for index in range(len(group["responses"]))}
    means = mean_ratings(ratings) if ratings else []
    responses = []
    for index, text in enumerate(group["responses"]):
        mean = means[index] if means and not math.isnan(means[index]) else None
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
        "images": [picture(image, f"row {row}, image {number}", book) for number, image in enumerate(group["images"])],
        "responses": responses,
        "pairs": len(group["pairs"]),
    }


def _rank(response: dict[str, Any]) -> tuple[float, int]:
    """Sort key: the mean rating, then the record of wins, best first."""
    mean = response["mean"]
    return (math.inf if mean is None else -mean, response["losses"] - response["wins"])


def picture(value: Any, where: str, book: PictureBook) -> dict[str, str | None]:
    """The key of an image in `book`, or the error where the image cannot be decoded."""
    try:
        return {"key": book.add(value, where=where), "error": None}
    except ImageError as error:
        return {"key": None, "error": str(error)}
