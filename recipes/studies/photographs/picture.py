"""One picture of a run: metrics of every policy with intervals, and boards with the base's and the trained answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from photographs.boards import check
from photographs.results import SHOWN
from silkie.evaluation import Score

BARS = (
    ("chair_sampled/invented", "sampled: invented things per caption"),
    ("chair_sampled/covered", "sampled: covered, by name or group"),
    ("chair_sampled/recall", "sampled: named (recall)"),
    ("chair/invented", "greedy: invented things per caption"),
)
BOARDS = 6


def write_picture(
    out: Path,
    summary: Mapping[str, Any],
    titles: Mapping[str, str],
    scores: Mapping[str, Mapping[int, Mapping[str, Score]]],
    images: Path,
    trained: str = "dpo",
) -> Path:
    """`photographs.png` in `out`. Boards are the first of the held-out set, not chosen; answers are sampled."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 6.8))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    bars = [(key, title) for key, title in BARS if key in summary["base"]]
    for axis, (key, title) in zip(upper.subplots(1, len(bars), squeeze=False)[0], bars, strict=True):
        names = [name for name in summary if key in summary[name]]
        rows = [summary[name][key] for name in names]
        means = [row["mean"] for row in rows]
        # the interval is that of the difference to the base, drawn around the policy's own mean
        low = [row.get("difference", 0) - row.get("low", 0) for row in rows]
        high = [row.get("high", 0) - row.get("difference", 0) for row in rows]
        colours = ["tab:grey" if name == "base" else "tab:blue" if name == trained else "tab:cyan" for name in names]
        axis.barh([titles[name] for name in names], means, xerr=[low, high], color=colours, capsize=2)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        if axis is not upper.axes[0]:
            axis.set_yticklabels([])
    upper.subplots_adjust(left=0.16, right=0.98, top=0.88, bottom=0.1)
    first, then = (next(iter(scores[name].values()))[SHOWN].items[:BOARDS] for name in ("base", trained))
    for axis, a, b in zip(lower.subplots(1, BOARDS), first, then, strict=True):
        axis.imshow(Image.open(images / Path(a.image).name))
        axis.axis("off")
        texts = [f"{who}: {_marked(item)}" for who, item in ((titles["base"], a), (titles[trained], b))]
        axis.set_title(
            "\n\n".join(textwrap.fill(text, 25) for text in texts), fontsize=7, loc="left", y=-0.06, va="top"
        )
    lower.subplots_adjust(left=0.01, right=0.99, top=1.0, bottom=0.42, wspace=0.05)
    file = out / "photographs.png"
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return file


def _marked(item: Any) -> str:
    """An answer, with what it invents or how many things it leaves out."""
    things = [name.strip() for name in str(item.label).split(",")]
    found = check(item.answer, things)
    if found.invented:
        return f"{item.answer} [invented: {', '.join(found.invented)}]"
    left = len(things) - found.hits - found.grouped
    return item.answer + (f" [{left} left out]" if left else " [true]")
