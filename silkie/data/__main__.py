"""Command line: `python -m silkie.data inspect SOURCE`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable

import datasets

from silkie.data import SOURCES, DataError
from silkie.data.gallery import write_gallery
from silkie.data.inspect import inspect_preferences
from silkie.data.rendering import to_text


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m silkie.data", description="Preference data: look at it before training on it."
    )
    commands = top.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="figures of a preference dataset, and a gallery of its groups")
    inspect.add_argument(
        "source", metavar="SOURCE", help="a file, a directory, a zip archive or a dataset name on the hub"
    )
    inspect.add_argument("--image-root", metavar="DIR", help="directory or zip archive with the images")
    inspect.add_argument("--split", default="train", help="default: %(default)s")
    inspect.add_argument(
        "--format",
        choices=sorted(SOURCES),
        metavar="NAME",
        help=f"one of {', '.join(sorted(SOURCES))}; default: detected",
    )
    inspect.add_argument(
        "--pairs",
        default="all",
        help="how pairs are built: all, best_vs_worst, best_vs_rest, random, longest, model:NAME",
    )
    inspect.add_argument(
        "--on-error", choices=("skip", "raise"), default="skip", help="broken rows: list them (default) or stop"
    )
    inspect.add_argument("--allow-remote-images", action="store_true", help="fetch images that are http(s) addresses")
    inspect.add_argument(
        "--tokenizer", metavar="DIR", help="measure lengths in the tokens of this tokenizer instead of in words"
    )
    inspect.add_argument("--no-images", action="store_true", help="do not read image headers")
    inspect.add_argument("--num-proc", type=at_least(1), metavar="N", help="worker processes")
    inspect.add_argument("--json", action="store_true", help="print the figures as JSON")
    inspect.add_argument("--html", metavar="FILE", help="write a page with figures and random groups")
    inspect.add_argument(
        "--groups", type=at_least(0), default=24, metavar="N", help="groups on the page (default: %(default)s)"
    )
    inspect.add_argument("--seed", type=int, default=0, help="of the random groups")
    return top


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, found {text!r}")
        return int(text)

    return parse


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the return value is the exit status."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    datasets.disable_progress_bars()
    try:
        inspection = inspect_preferences(
            args.source,
            image_root=args.image_root,
            split=args.split,
            format=args.format,
            pairs=args.pairs,
            on_error=args.on_error,
            allow_remote_images=args.allow_remote_images,
            tokenizer=load_tokenizer(args.tokenizer),
            read_images=not args.no_images,
            num_proc=args.num_proc,
        )
        if args.html:
            write_gallery(inspection, args.html, groups=args.groups, seed=args.seed)
    except (DataError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(inspection.to_json(), indent=2) if args.json else to_text(inspection))
    return 0


def load_tokenizer(name: str | None):
    """The tokenizer of `--tokenizer`; None without one."""
    if name is None:
        return None
    from transformers import AutoTokenizer  # takes seconds to import, and few calls need it

    return AutoTokenizer.from_pretrained(name)


if __name__ == "__main__":
    sys.exit(main())
