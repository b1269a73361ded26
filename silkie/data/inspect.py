"""Look at preference data before training on them: figures, dropped rows, and groups with their images."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np

from silkie.data.images import ImageError, image_digest, image_size
from silkie.data.loading import load_with_report
from silkie.data.registry import code_digest
from silkie.data.reports import LoadReport
from silkie.data.schema import aspects_of
from silkie.data.stamps import image_fingerprint
from silkie.data.statistics import Length, Statistics, as_json, count_words, histogram

BATCH = 1000  # groups read at a time, without their images


@dataclass(slots=True, kw_only=True)
class Inspection:
    """The dataset, how it was loaded, and its figures (plain JSON values)."""

    dataset: datasets.Dataset
    report: LoadReport
    figures: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The figures and the load report as plain JSON values."""
        loading = {
            "source": self.report.source,
            "format": self.report.format,
            "rows": self.report.rows,
            "dropped_rows": dict(self.report.reasons().most_common()),
            "left_out": dict(self.report.notes.most_common()),
            "problems": [asdict(problem) for problem in self.report.problems[:100]],
            "regrouped": None if self.report.regrouped is None else asdict(self.report.regrouped),
        }
        return {"loading": loading, **self.figures}


def inspect_preferences(
    source: str | os.PathLike | datasets.Dataset,
    *,
    tokenizer: Any = None,
    read_images: bool = True,
    num_proc: int | None = None,
    **load_options: Any,
) -> Inspection:
    """Load a source (broken rows are listed, not raised, unless `on_error` says otherwise) and compute its figures.

    Args:
        tokenizer: a transformers tokenizer, to measure lengths in its tokens; without it they are in words.
        read_images: read every image for the size histogram and to find equal ones. No pixel is decoded.
        load_options: as for `load_preferences`.
    """
    options = {"on_error": "skip", "keep_unpaired": True, **load_options}
    dataset, report = load_with_report(source, num_proc=num_proc, **options)
    statistics = Statistics(
        aspects=aspects_of(dataset.features),
        length=_token_length(tokenizer),
        unit="words" if tokenizer is None else "tokens",
    )
    columns = [column for column in dataset.column_names if column != "images"]
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=BATCH):
        statistics.add(batch.to_pylist())
    figures = statistics.figures()
    figures["image_sizes"] = image_figures(dataset, num_proc) if read_images else None
    return Inspection(dataset=dataset, report=report, figures=figures)


def _token_length(tokenizer: Any) -> Length:
    if tokenizer is None:
        return count_words
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def image_figures(dataset: datasets.Dataset, num_proc: int | None = None) -> dict[str, Any]:
    """Sizes of all images: histogram of the longer side in pixels, the most frequent sizes, images without a readable
    header, and how many groups ask about the same images."""
    sizes = dataset.select_columns(["images"]).map(
        _sizes,
        with_indices=True,
        remove_columns=["images"],
        features=datasets.Features(
            {
                "sizes": datasets.List(datasets.List(datasets.Value("int32"))),
                "key": datasets.Value("string"),
                "broken": datasets.Value("string"),
            }
        ),
        num_proc=num_proc,
        new_fingerprint=image_fingerprint(dataset, "images", "sizes and digests", code_digest()),
        desc="reading image headers",
    )
    counts: Counter[tuple[int, int]] = Counter()
    broken: list[str] = []
    asked: Counter[str] = Counter()  # images of a group -> groups that have them
    for batch in sizes.with_format("arrow").iter(batch_size=BATCH):
        counts.update(tuple(size) for group in batch["sizes"].to_pylist() for size in group)
        broken += [message for message in batch["broken"].to_pylist() if message]
        asked.update(key for key in batch["key"].to_pylist() if key)
    sides = np.repeat(np.array([max(size) for size in counts], dtype=np.int64), list(counts.values()))
    return {
        "images": counts.total(),
        "different_sizes": len(counts),
        "most_frequent": {f"{width} x {height}": count for (width, height), count in counts.most_common(5)},
        "longer_side": histogram(sides),
        "mean_megapixels": sum(w * h * count for (w, h), count in counts.items()) / 1e6 / counts.total()
        if counts
        else None,
        "questions_per_image": as_json(np.array(list(asked.values()), dtype=np.int64)),
        "unreadable": len(broken),
        "unreadable_examples": broken[:10],
    }


def _sizes(group: dict[str, Any], index: int) -> dict[str, Any]:
    sizes, digests, broken = [], [], None
    for number, image in enumerate(group["images"]):
        try:
            sizes.append(list(image_size(image, where=f"row {index}, image {number}")))
            digests.append(image_digest(image, where=f"row {index}, image {number}"))
        except ImageError as error:
            broken = str(error)
    return {"sizes": sizes, "key": None if broken else " ".join(digests), "broken": broken}


def sample_rows(dataset: datasets.Dataset, count: int, seed: int = 0) -> list[int]:
    """Row numbers of `count` random groups, in order."""
    return sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))
