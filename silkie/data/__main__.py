"""Command line: `python -m silkie.data inspect SOURCE`."""

from __future__ import annotations

import json
import logging
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import datasets
from annotated_types import Ge

from silkie.data import SOURCES, DataError
from silkie.data.inspect import inspect_preferences
from silkie.data.rendering import to_text
from silkie.io.console import complain
from silkie.io.options import Command, argument, command_parser, option, parse_command

FORMATS = ", ".join(sorted(SOURCES))


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `inspect`."""

    source: str = argument("a file, a directory, a zip archive or a dataset name on the hub", metavar="SOURCE")
    image_root: str | None = option(None, "directory or zip archive with the images", metavar="DIR")
    split: str = option("train", "split of the data")
    format: str | None = option(None, f"one of {FORMATS}; default: detected", metavar="NAME")
    pairs: str = option("all", "how pairs are built: all, best_vs_worst, best_vs_rest, random, longest, model:NAME")
    on_error: Literal["skip", "raise"] = option("skip", "broken rows: list them, or stop")
    allow_remote_images: bool = option(False, "fetch images that are http(s) addresses")
    tokenizer: str | None = option(
        None, "measure lengths in the tokens of this tokenizer instead of in words", metavar="DIR"
    )
    no_images: bool = option(False, "do not read image headers")
    num_proc: Annotated[int, Ge(1)] | None = option(None, "worker processes", metavar="N")
    json: bool = option(False, "print the figures as JSON")
    html: str | None = option(None, "write a page with figures and random groups", metavar="FILE")
    groups: Annotated[int, Ge(0)] = option(24, "groups on the page", metavar="N")
    seed: int = option(0, "seed of the random groups")


def run_inspect(options: InspectOptions) -> int:
    logging.basicConfig(level=logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        inspection = inspect_preferences(
            options.source,
            image_root=options.image_root,
            split=options.split,
            format=options.format,
            pairs=options.pairs,
            on_error=options.on_error,
            allow_remote_images=options.allow_remote_images,
            tokenizer=load_tokenizer(options.tokenizer),
            read_images=not options.no_images,
            num_proc=options.num_proc,
        )
        if options.html:
            from silkie.report.gallery import write_gallery  # the report room stands beside data and imports it

            write_gallery(inspection, options.html, groups=options.groups, seed=options.seed)
    except (DataError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        return complain(error, 1)
    print(json.dumps(inspection.to_json(), indent=2) if options.json else to_text(inspection))
    if options.html:
        print(f"page: {options.html}", file=sys.stderr)
    return 0


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of `--tokenizer`; None without one."""
    if name is None:
        return None
    from transformers import AutoTokenizer  # takes seconds to import, and few calls need it

    return AutoTokenizer.from_pretrained(name)


COMMANDS = (
    Command("inspect", "figures of a preference dataset, and a gallery of its groups", InspectOptions, run_inspect),
)


ABOUT = "Preference data: look at it before training on it."


def make_parser(prog: str) -> ArgumentParser:
    return command_parser(prog, ABOUT, COMMANDS)


def main(argv: Sequence[str] | None = None, prog: str = "python -m silkie.data") -> int:
    """Run the command line; the return value is the exit status."""
    command, options = parse_command(make_parser(prog), COMMANDS, argv)
    return command.run(options)


if __name__ == "__main__":
    sys.exit(main())
