"""`python -m silkie.report RUN_DIR [OTHER]`: write the page of a run, or of two side by side."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass

from silkie.io.console import complain
from silkie.io.options import argument, option, optional_argument, options_parser, parse_options
from silkie.report import build_report, build_side_by_side


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    run_dir: str = argument("the run's output directory: report.json and / or trainer_state.json")
    other: str | None = optional_argument("a second run, to set beside the first", metavar="OTHER_DIR")
    out: str | None = option(None, "the page (default: RUN_DIR/report.html, or RUN_DIR/report_vs_OTHER.html)")


ABOUT = "One self-contained HTML page for a run."


def make_parser(prog: str) -> ArgumentParser:
    return options_parser(prog, ABOUT, ReportOptions)


def main(argv: Sequence[str] | None = None, prog: str = "python -m silkie.report") -> int:
    options = parse_options(make_parser(prog), ReportOptions, argv)
    try:
        if options.other:
            page = build_side_by_side(options.run_dir, options.other, options.out)
        else:
            page = build_report(options.run_dir, options.out)
    except (OSError, ValueError) as error:
        return complain(error)
    print(f"{page} ({page.stat().st_size / 1024:.0f} KiB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
