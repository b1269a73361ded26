"""The demo's report: a Markdown table, a picture and an HTML sheet with the answers of base and trained model side by side."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silkie.demo import oracle
from silkie.demo.data import DemoItem
from silkie.demo.metrics import METRICS, Metric
from silkie.demo.scenes import render
from silkie.evaluation.stats import Estimate

if TYPE_CHECKING:
    from silkie.demo.loop import Summary

Answers = Mapping[str, Mapping[str, Sequence[str]]]  # policy -> decoding -> answer per held-out item
BARS = ("mme_acc", "chair_s", "exact", "pope_accuracy", "pope_yes_rate", "refusal", "over_refusal")


def write_sheets(summary: Summary, test: Sequence[DemoItem], answers: Answers, output: Path) -> None:
    """`table.md`, `demo.html`, and `demo.png` where matplotlib is installed. Sets `summary.table`."""
    summary.table = markdown(summary)
    (output / "table.md").write_text(summary.table, encoding="utf-8")
    shown = examples(test)
    (output / "demo.html").write_text(page(summary, test, answers, shown), encoding="utf-8")
    picture(summary, test, answers, shown[:6], output / "demo.png")


def markdown(summary: Summary) -> str:
    """One table per decoding: a row per metric, a column per policy, 95 % intervals in brackets."""
    lines = [
        f"# The demo, seed {summary.seed}",
        "",
        f"{summary.groups} preference groups, {summary.pairs} pairs. Held-out scenes; 95 % bootstrap intervals over images.",
    ]
    for mode in next(iter(summary.scores.values())):
        policies = list(summary.scores)
        lines += ["", f"## {mode}", "", "| | " + " | ".join(summary.titles[p] for p in policies) + " |", "|---" * (1 + len(policies)) + "|"]
        for metric in METRICS:
            cells = [_cell(summary.scores[p][mode][metric.key], metric) for p in policies]
            lines.append(f"| {metric.title}{_arrow(metric)} | " + " | ".join(cells) + " |")
    lines += ["", "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in summary.seconds.items()) + ".", ""]
    return "\n".join(lines)


def _arrow(metric: Metric) -> str:
    return {1: " ↑", -1: " ↓", 0: ""}[metric.better]


def _cell(value: Estimate, metric: Metric) -> str:
    digits = 0 if metric.key in ("mme_perception", "mme_cognition") else 2
    return f"{value.mean:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def examples(test: Sequence[DemoItem], per_kind: int = 4) -> list[int]:
    """Indices of items to show: evenly spaced over every benchmark's items, chosen without looking at the answers; kinds alternate."""
    columns = []
    for benchmark in ("chair", "mme", "redteam", "pope"):
        own = [k for k, item in enumerate(test) if item.benchmark == benchmark]
        columns.append([own[(2 * j + 1) * len(own) // (2 * per_kind)] for j in range(per_kind)] if own else [])
    return [column[j] for j in range(per_kind) for column in columns if column]


def _right(item: DemoItem, answer: str) -> bool:
    rating = oracle.rate(item.scene, item.question, answer)
    return min(int(entry["Rating"]) for entry in rating.values()) >= 4


def page(summary: Summary, test: Sequence[DemoItem], answers: Answers, shown: Sequence[int]) -> str:
    """A self-contained HTML page: the tables, then images with the answers of every policy (greedy)."""
    head = "".join(f"<th>{html.escape(summary.titles[p])}</th>" for p in summary.scores)
    parts = [_STYLE, "<h1>silkie: what preference training changed</h1>"]
    for mode in next(iter(summary.scores.values())):
        rows = [
            f"<tr><td>{html.escape(metric.title)}{_arrow(metric)}</td>"
            + "".join(f"<td>{_cell(scores[mode][metric.key], metric)}</td>" for scores in summary.scores.values())
            + "</tr>"
            for metric in METRICS
        ]
        parts.append(f"<h2>Held-out scenes, {mode}</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>")
    rows = []
    for k in shown:
        item = test[k]
        cells = "".join(
            f"<td class='{'good' if _right(item, answers[p]['greedy'][k]) else 'bad'}'>{html.escape(answers[p]['greedy'][k])}</td>"
            for p in answers
        )
        rows.append(f"<tr><td><img src='{_data_url(item)}' alt=''></td><td>{html.escape(item.prompt)}</td>{cells}</tr>")
    parts.append(f"<h2>Answers, greedy</h2><table><tr><th></th><th>Prompt</th>{head}</tr>{''.join(rows)}</table>")
    parts.append("<p>Examples are evenly spaced over the held-out sets. Green: the oracle finds no fault.</p>")
    return "<!doctype html><meta charset='utf-8'><title>silkie demo</title>" + "".join(parts) + "\n"


_STYLE = (
    "<style>body{font:15px/1.4 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.35rem .6rem;text-align:left;vertical-align:top}"
    "img{width:112px;image-rendering:pixelated}.good{background:#e6f4e6}.bad{background:#fbe6e3}</style>"
)


def _data_url(item: DemoItem) -> str:
    buffer = io.BytesIO()
    render(item.scene).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(summary: Summary, test: Sequence[DemoItem], answers: Answers, shown: Sequence[int], path: Path) -> None:
    """Bars of base and trained model above images with both answers. Left out, with a line that says so, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is left out (pip install 'silkie[report]').")
        return
    titles = {metric.key: metric.title.split(" (")[0] + _arrow(metric) for metric in METRICS}
    figure = Figure(figsize=(13, 7.0), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=[1.5, 1.0])
    top, bottom = rows
    for axis, mode in zip(top.subplots(1, 2, sharey=True), ("greedy", "T=1"), strict=True):
        for offset, (policy, color) in enumerate((("base", "#b9bcc2"), ("dpo", "#2f6fb0"))):
            values = [summary.scores[policy][mode][key] for key in BARS]
            errors = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
            places = [k + 0.38 * offset for k in range(len(BARS))]
            axis.barh(places, [v.mean for v in values], 0.36, xerr=errors, color=color, label=summary.titles[policy], error_kw={"lw": 1})
        axis.set_yticks([k + 0.19 for k in range(len(BARS))], [titles[key] for key in BARS])
        axis.invert_yaxis()
        axis.set(title=mode, xlim=(0, 1))
        handles = axis.get_legend_handles_labels()
    top.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    for axis, k in zip(bottom.subplots(2, 3).flat, shown, strict=False):
        item = test[k]
        axis.imshow(render(item.scene), extent=(0, 1, 0, 1))
        axis.set(xlim=(0, 4.2), ylim=(0, 1))
        axis.axis("off")
        axis.text(1.12, 1.0, item.prompt, va="top", weight="bold", fontsize=8.5, wrap=True)
        for line, policy in enumerate(("base", "dpo")):
            answer = answers[policy]["greedy"][k]
            color = "#1d7a33" if _right(item, answer) else "#b3261e"
            axis.text(1.12, 0.76 - 0.42 * line, f"{summary.titles[policy]}: {_wrapped(answer)}", va="top", color=color, fontsize=7.5)
    figure.savefig(path, dpi=130)


def _wrapped(text: str, width: int = 56) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or "(nothing)"
