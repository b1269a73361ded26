"""`silkie demo`, `python -m silkie.demo`: the embedded demo."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from silkie.io.console import guarded, log_to_stderr
from silkie.io.options import option, options_parser, parse_options

ABOUT = "The whole preference loop on a small embedded world: sample, rate, train, evaluate, compare with controls."


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Options of the demo."""

    output_dir: str = option("outputs/demo", "where data, adapter, tables, pictures and the report go", metavar="DIR")
    seed: int = option(0, "seed of sampling and training", metavar="N")
    controls: bool = option(
        True,
        "leave out the controls: SFT on the best response, shuffled preferences, longest-as-best",
        flag="--no-controls",
    )
    dry_run: bool = option(False, "sample and rate a few prompts, run one optimizer step, print the plan and stop")


def make_parser(prog: str) -> argparse.ArgumentParser:
    return options_parser(prog, ABOUT, DemoOptions)


def main(argv: Sequence[str] | None = None, prog: str = "python -m silkie.demo") -> int:
    """Run the demo; the return value is the exit status."""
    options = parse_options(make_parser(prog), DemoOptions, argv)
    log_to_stderr(logging.INFO)

    def run() -> int:
        from silkie.demo.run import run_demo  # imports torch: after the options were read

        print(run_demo(options.output_dir, options.seed, options.controls, options.dry_run))
        if not options.dry_run:
            out = Path(options.output_dir)
            print(f"page: {out / 'demo.html'} (open it in a browser)")
            print(f'next: silkie infer {out / "adapter"} {first_image(out)} "Describe the image." --compare')
        return 0

    return guarded(run)


def first_image(output: Path) -> Path:
    """An image of the demo's, to ask about."""
    return min((output / "data" / "images").iterdir(), default=Path("IMAGE"))


if __name__ == "__main__":
    sys.exit(main())
