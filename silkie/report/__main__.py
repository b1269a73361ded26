"""`python -m silkie.report RUN_DIR`: write the page of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from silkie.report import build_report


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m silkie.report", description="One self-contained HTML page for a run."
    )
    parser.add_argument("run_dir", help="the run's output directory: report.json and / or trainer_state.json")
    parser.add_argument("--out", help="the page (default: RUN_DIR/report.html)")
    arguments = parser.parse_args(argv)
    try:
        page = build_report(arguments.run_dir, arguments.out)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{page} ({page.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
