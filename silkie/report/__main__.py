"""`python -m silkie.report RUN_DIR`: write the page of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from silkie.io.options import argument, option, parse_options
from silkie.report import build_report


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    run_dir: str = argument("the run's output directory: report.json and / or trainer_state.json")
    out: str | None = option(None, "the page (default: RUN_DIR/report.html)")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options("python -m silkie.report", "One self-contained HTML page for a run.", ReportOptions, argv)
    try:
        page = build_report(options.run_dir, options.out)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page} ({page.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
