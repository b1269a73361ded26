"""`silkie loop FILE.yaml`."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from silkie.io.console import complain, guarded
from silkie.io.options import argument, option, options_parser, parse_options
from silkie.run.rounds import settings

ABOUT = (
    "On-policy rounds: sample from the policy, have a judge rate the answers, train on from it, evaluate; again. The"
    " same command resumes, whatever ended it. examples/on_policy.md shows a whole file."
)


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Options of `silkie loop`; everything else stands in the file."""

    file: str = argument("YAML file of the loop", metavar="FILE.yaml")
    rounds: Annotated[int, Ge(1)] | None = option(None, "instead of the file's; more may be asked for later")
    output_dir: str | None = option(None, "instead of the file's", metavar="DIR")


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options_parser(prog, ABOUT, LoopOptions)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = inspect.getdoc(settings)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "silkie loop") -> int:
    """The command; the return value is its exit status."""
    options = parse_options(make_parser(prog), LoopOptions, argv)

    def run() -> int:
        loop = settings.read_loop_file(options.file, rounds=options.rounds, output_dir=options.output_dir)
        from silkie.run.rounds.loop import StageFailed, run_loop

        try:
            return run_loop(loop)
        except StageFailed as error:
            return complain(error, error.status)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
