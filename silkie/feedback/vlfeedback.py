"""Write ratings in the schema of VLFeedback: parquet shards with embedded images, which `datasets` and `silkie.data`
load as they are.

    id, prompt, image, models [K],
    completions: {"annotations": [K x {aspect: {"Rating": "4", "Rationale": "..."}}], "model": [K], "response": [K]}

Ratings are strings, as in the original; a rating that is not a number is "N/A".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from silkie.endpoint.media import image_bytes
from silkie.feedback.rubric import default_rubric, number_text

SCALE = (1.0, 5.0)  # of VLFeedback's ratings


def vlfeedback_features(aspects: Sequence[str], scale: Sequence[float] = SCALE) -> Features:
    """Column types of a VLFeedback table whose ratings carry `aspects`. Ratings on another scale than VLFeedback's have
    it beside them in a column `rating_scale`, for the reader would refuse them otherwise."""
    annotation = {aspect: {"Rating": Value("string"), "Rationale": Value("string")} for aspect in aspects}
    declared = {} if tuple(scale) == SCALE else {"rating_scale": List(Value("float64"))}
    return Features(
        {
            **declared,
            "id": Value("string"),
            "prompt": Value("string"),
            "image": Image(),
            "models": List(Value("string")),
            "completions": {
                "annotations": List(annotation),
                "model": List(Value("string")),
                "response": List(Value("string")),
            },
        }
    )


def vlfeedback_row(
    *,
    id: str,
    prompt: str,
    image: Any,
    models: Sequence[str],
    responses: Sequence[str],
    ratings: Sequence[Mapping[str, float | None]],
    rationales: Sequence[Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """One record. `image` is a path, bytes, {"bytes", "path"}, a PIL image or None; the three sequences hold one entry
    per response.

    Raises ValueError where their lengths differ, ItemError("image") where the image cannot be read.
    """
    rationales = rationales if rationales is not None else [{} for _ in responses]
    counts = {
        "models": len(models),
        "responses": len(responses),
        "ratings": len(ratings),
        "rationales": len(rationales),
    }
    if len(set(counts.values())) != 1:
        raise ValueError(f"record {id!r}: expected one entry per response in each of {list(counts)}, found {counts}")
    annotations = [
        {
            aspect: {
                "Rating": "N/A" if value is None or math.isnan(value) else number_text(value),
                "Rationale": why.get(aspect, ""),
            }
            for aspect, value in row.items()
        }
        for row, why in zip(ratings, rationales, strict=True)
    ]
    return {
        "id": id,
        "prompt": prompt,
        "image": None if image is None else {"bytes": image_bytes(image, where=f"record {id!r}"), "path": None},
        "models": list(models),
        "completions": {"annotations": annotations, "model": list(models), "response": list(responses)},
    }


def write_vlfeedback(
    records: Iterable[Mapping[str, Any]],
    directory: str | Path,
    *,
    aspects: Sequence[str] | None = None,
    scale: Sequence[float] = SCALE,
    split: str = "train",
    shard_bytes: int = 500_000_000,
    rows_per_group: int = 100,
) -> list[Path]:
    """Write records (the keyword arguments of `vlfeedback_row`) as `directory/data/SPLIT-00000.parquet`, ... and return
    the paths.

    Rows are consumed one by one and written in groups of `rows_per_group`, so memory does not grow with their number. A
    new shard begins once one holds `shard_bytes` of encoded images. Every file is complete when it gets its name.
    Raises FileExistsError rather than mix with shards that are already there.
    """
    folder = Path(directory) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    existing = sorted(folder.glob(f"{split}-*.parquet"))
    if existing:
        raise FileExistsError(f"{folder} already holds {existing[0].name}; choose another directory or remove it")
    features = vlfeedback_features(aspects if aspects is not None else default_rubric().aspect_names, scale)
    schema = features.arrow_schema
    paths: list[Path] = []
    writer: pq.ParquetWriter | None = None
    group: list[dict[str, Any]] = []
    group_bytes = in_shard = 0

    def partial() -> Path:
        return folder / f".{split}-{len(paths):05d}.parquet.partial"

    def flush() -> None:
        nonlocal writer, group, group_bytes, in_shard
        if group:
            writer = writer or pq.ParquetWriter(partial(), schema)
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            in_shard += group_bytes
            group, group_bytes = [], 0

    def finish() -> None:
        nonlocal writer, in_shard
        if writer is not None:
            writer.close()
            path = folder / f"{split}-{len(paths):05d}.parquet"
            partial().rename(path)
            paths.append(path)
            writer, in_shard = None, 0

    try:
        for record in records:
            row = vlfeedback_row(**record)
            if "rating_scale" in features:
                row["rating_scale"] = [float(bound) for bound in scale]
            group.append(row)
            group_bytes += len(row["image"]["bytes"]) if row["image"] else 0
            if len(group) >= rows_per_group or in_shard + group_bytes >= shard_bytes:
                flush()
                if in_shard >= shard_bytes:
                    finish()
        flush()
        finish()
    finally:
        if writer is not None:  # an error on the way: leave no half-written shard behind
            writer.close()
            partial().unlink(missing_ok=True)
    return paths
