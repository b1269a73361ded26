"""What the demo leaves behind: a Markdown table, a picture, and the report page with the answers of base and trained
model side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silkie.demo import oracle
from silkie.demo.data import DemoItem
from silkie.demo.page import demo_report
from silkie.demo.results import Summary
from silkie.demo.scenes import draw_scene
from silkie.demo.scores import METRICS, Metric
from silkie.report import build_report
from silkie.stats import Estimate

Answers = Mapping[str, Mapping[str, Sequence[str]]]  # policy -> decoding -> answer per held-out item
BARS = ("mme_acc", "chair_s", "exact", "pope_accuracy", "pope_yes_rate", "refusal", "over_refusal")


def write_outputs(
    summary: Summary,
    test: Sequence[DemoItem],
    answers: Answers,
    output: Path,
    log_history: Sequence[Mapping[str, Any]] = (),
    configuration: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    waiting: Sequence[str] = (),
) -> Path:
    """`table.md`, the report page `demo.html`, and `demo.png` where matplotlib is installed. Sets `summary.table`.

    `log_history` (of the DPO trainer) gives the page its curves, `configuration` (section -> option -> value) its table
    of options. `waiting`: what is still to be trained, which the page says. Returns the page's path."""
    summary.table = markdown(summary)
    (output / "table.md").write_text(summary.table, encoding="utf-8")
    page = build_report(
        demo_report(summary, test, answers, log_history=log_history, configuration=configuration, waiting=waiting),
        output / "demo.html",
    )
    if not (output / "demo.png").exists() or not waiting:  # of base and DPO: the controls change nothing in it
        draw_summary(summary, test, answers, examples(test)[:4], output / "demo.png")
    return page


def markdown(summary: Summary) -> str:
    """One table per decoding: a row per metric, a column per policy, 95 % intervals in brackets."""
    lines = [
        f"# The demo, seed {summary.seed}",
        "",
        (
            f"{summary.groups} preference groups, {summary.pairs} pairs. Held-out scenes; 95 % bootstrap intervals over"
            " images."
        ),
    ]
    for mode in next(iter(summary.scores.values())):
        policies = list(summary.scores)
        lines += [
            "",
            f"## {mode}",
            "",
            "| | " + " | ".join(summary.titles[p] for p in policies) + " |",
            "|---" * (1 + len(policies)) + "|",
        ]
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
    """Indices of items to show: evenly spaced over every benchmark's items, chosen without looking at the answers;
    kinds alternate."""
    columns = []
    for benchmark in ("chair", "mme", "redteam", "pope"):
        own = [k for k, item in enumerate(test) if item.benchmark == benchmark]
        columns.append([own[(2 * j + 1) * len(own) // (2 * per_kind)] for j in range(per_kind)] if own else [])
    return [column[j] for j in range(per_kind) for column in columns if column]


def _right(item: DemoItem, answer: str) -> bool:
    rating = oracle.rate(item.scene, item.question, answer)
    return min(int(entry["Rating"]) for entry in rating.values()) >= 4


def draw_summary(
    summary: Summary, test: Sequence[DemoItem], answers: Answers, shown: Sequence[int], path: Path
) -> None:
    """Bars of base and trained model above images with both answers, narrow enough for a phone. Left out, with a line
    that says so, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: {path.name} was not drawn (pip install 'silkie[report]').")
        return
    figure = Figure(figsize=(6.5, 7.3), layout="constrained")
    rows: Any = figure.subfigures(2, 1, height_ratios=[4.4, 0.72 * len(shown)])
    top, bottom = rows
    axes = top.subplots(2, 1, sharex=True)
    for axis, (mode, title) in zip(axes, (("greedy", "greedy"), ("T=1", "sampled at temperature 1")), strict=True):
        _draw_bars(axis, summary, mode)
        axis.set_title(title, fontsize=11)
    top.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10.5)
    for axis, k in zip(bottom.subplots(len(shown), 1, squeeze=False).flat, shown, strict=True):
        answered = {policy: answers[policy]["greedy"][k] for policy in ("base", "dpo")}
        _draw_answers(axis, test[k], {summary.titles[policy]: text for policy, text in answered.items()})
    figure.savefig(path, dpi=130)


def _draw_bars(axis: Any, summary: Summary, mode: str) -> None:
    titles = {metric.key: metric.title.split(" (")[0] + _arrow(metric) for metric in METRICS}
    for offset, (policy, color) in enumerate((("base", "#b9bcc2"), ("dpo", "#2f6fb0"))):
        values = [summary.scores[policy][mode][key] for key in BARS]
        axis.barh(
            [k + 0.38 * offset for k in range(len(BARS))],
            [v.mean for v in values],
            0.36,
            xerr=[[v.mean - v.low for v in values], [v.high - v.mean for v in values]],
            color=color,
            label=summary.titles[policy],
            error_kw={"lw": 1},
        )
    axis.set_yticks([k + 0.19 for k in range(len(BARS))], [titles[key] for key in BARS], fontsize=10.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=10.5)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_answers(axis: Any, item: DemoItem, answered: Mapping[str, str]) -> None:
    axis.imshow(draw_scene(item.scene), extent=(0, 1, 0, 1))
    axis.set(xlim=(0, 7.6), ylim=(0, 1))
    axis.axis("off")
    axis.text(1.15, 1.02, item.prompt, va="top", weight="bold", fontsize=10.5)
    below = 0.7
    for policy, answer in answered.items():
        text = _wrapped(f"{policy}: {answer or '(nothing)'}")
        color = "#1d7a33" if _right(item, answer) else "#b3261e"
        axis.text(1.15, below, text, va="top", color=color, fontsize=10.5)
        below -= 0.3 * (1 + text.count("\n"))


def _wrapped(text: str, width: int = 62) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
