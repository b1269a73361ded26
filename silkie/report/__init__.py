"""One self-contained HTML page for a run: configuration, data, curves, benchmarks with intervals, and a gallery of
answers before and after.

    python -m silkie.report RUN_DIR [OTHER_RUN_DIR]
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from silkie.report.schema import Report

if TYPE_CHECKING:
    from silkie.evaluation.compare import Comparison

__all__ = ["Report", "build_report", "build_side_by_side", "write_comparison"]


def build_report(run: str | Path | Report, out: str | Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: a run directory (see `silkie.report.schema` for its `report.json`), or the pieces themselves.
        out: the page. Default: `report.html` in the run directory.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError, ValueError: what `silkie.report.collect.collect` says.
    """
    from silkie.report.collect import collect
    from silkie.report.render import render

    if isinstance(run, Report):
        if out is None:
            raise ValueError("Name the page to write: build_report(report, out=...).")
        report = run
    else:
        report = collect(run)
    page = Path(out) if out is not None else Path(str(run)) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(report), encoding="utf-8")
    return page


def build_side_by_side(a: str | Path, b: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of two runs. `out`: default `report_vs_B.html` in A's directory. Raises as `build_report` does."""
    from silkie.report.side_by_side import side_by_side

    return build_report(side_by_side(a, b), out or Path(a) / f"report_vs_{Path(b).resolve().name}.html")


def write_comparison(
    comparison: Comparison,
    out: str | Path,
    *,
    image_root: str | Path | None = None,
    names: tuple[str, str] = ("base", "trained"),
) -> Path:
    """Write the page of a comparison: differences with intervals, and the flipped questions with their images."""
    from silkie.report.collect import comparison_report

    return build_report(comparison_report(comparison, image_root, names), out)
