"""Command lines from option dataclasses: one declaration gives a flag, its type and range, its default and its help.

    @dataclass(frozen=True, kw_only=True)
    class Rate:
        responses: str = argument("JSONL of responses")
        votes: Annotated[int, Ge(1)] = option(1, "answers per item")
        quiet: bool = option(False, "no progress line")

    commands = [Command("rate", "rate responses with a judge", Rate, run_rate)]
    parser = command_parser("python -m silkie.feedback", "what it does", commands)
    command, options = parse_command(parser, commands, argv)
    status = command.run(options)

Why not transformers' `HfArgumentParser`: its import takes half a second, it has no positional arguments, and it reads
the word behind a switch as the switch's value (`--json FILE` would fail).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from silkie.io.console import Parser

__all__ = [
    "Command",
    "argument",
    "command_parser",
    "option",
    "optional_argument",
    "options_parser",
    "parse_command",
    "parse_options",
]

_NAMES = {int: "a whole number", float: "a number"}
_BOUNDS = ((Ge, "at least", "ge"), (Gt, "more than", "gt"), (Le, "at most", "le"), (Lt, "less than", "lt"))


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its name, one line of help, the dataclass of its options, and the function that takes them."""

    name: str
    help: str
    options: type
    run: Callable[[Any], int]
    epilog: str | None = None


def argument(help: str, *, metavar: str | None = None) -> Any:
    """A positional argument that must be given. `metavar`: its name in the help."""
    return dataclasses.field(metadata={"help": help, "metavar": metavar, "positional": True})


def optional_argument(help: str, *, metavar: str | None = None) -> Any:
    """An optional positional argument; None where it is absent."""
    return dataclasses.field(default=None, metadata={"help": help, "metavar": metavar, "positional": True})


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    metavar: str | None = None,
    aliases: Sequence[str] = (),
    flag: str | None = None,
) -> Any:
    """An option `--like-this` (`--like_this` is read too); without a default it must be given.

    A `bool` is a switch that negates its default, a `Literal` lists its choices, and a `tuple` takes one or more
    values. The help ends with the default, unless it says "default" itself. `flag`: its name on the command line,
    where the function that takes the options calls it something else (`progress` is turned off by `--quiet`).
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "metavar": metavar, "aliases": tuple(aliases), "flag": flag, "positional": False},
    )


def parse_command(
    parser: argparse.ArgumentParser, commands: Sequence[Command], argv: Sequence[str] | None = None
) -> tuple[Command, Any]:
    """The subcommand that was called and its options. A wrong use ends the process with status 2, as argparse does.
    `parser`: from `command_parser`."""
    arguments = vars(parser.parse_args(argv))
    name = arguments.pop("command")
    command = next(command for command in commands if command.name == name)
    return command, _made(command.options, arguments)


def command_parser(prog: str, description: str, commands: Sequence[Command]) -> argparse.ArgumentParser:
    """The parser of a program with subcommands."""
    parser = _Parser(prog=prog, description=description)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in commands:
        own = subparsers.add_parser(
            command.name,
            help=command.help,
            description=command.help,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_fields(own, command.options)
    return parser


def parse_options(parser: argparse.ArgumentParser, options: type, argv: Sequence[str] | None = None) -> Any:
    """The options of a program without subcommands. `parser`: from `options_parser`."""
    return _made(options, vars(parser.parse_args(argv)))


def options_parser(prog: str, description: str, options: type) -> argparse.ArgumentParser:
    """The parser of a program without subcommands."""
    parser = _Parser(prog=prog, description=description)
    _add_fields(parser, options)
    return parser


def _made(options: type, arguments: dict[str, Any]) -> Any:
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()})


class _Parser(Parser):
    """Reads `--like_this` as `--like-this`, so that a flag can be written as its name in Python."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        for index, word in enumerate(words[:end]):
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                words[index] = name.replace("_", "-") + equals + value
        return super().parse_known_args(words, namespace)


def _add_fields(parser: argparse.ArgumentParser, options: type) -> None:
    hints = get_type_hints(options, include_extras=True)
    for field in fields(options):
        about, hint = field.metadata, _without_none(hints[field.name])
        settings: dict[str, Any] = {"help": _help(field), "metavar": about["metavar"]}
        if get_origin(hint) is Literal:
            settings["choices"] = get_args(hint)
        elif get_origin(hint) is tuple:
            settings |= {"type": _reader(get_args(hint)[0]), "nargs": "+"}
        else:
            settings["type"] = _reader(hint)
        if about["positional"]:
            settings |= {"nargs": "?"} if field.default is None else {}
            parser.add_argument(field.name, **settings)
            continue
        flags = [about["flag"] or f"--{field.name.replace('_', '-')}", *about["aliases"]]
        settings["dest"] = field.name
        if hint is bool:
            action = "store_false" if field.default is True else "store_true"
            parser.add_argument(*flags, action=action, help=settings["help"], dest=field.name)
        else:
            required = field.default is MISSING
            parser.add_argument(*flags, **settings, required=required, default=None if required else field.default)


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"].replace("%", "%%")
    shown = field.default is not MISSING and field.default is not None and not isinstance(field.default, bool)
    return f"{text} (default: {field.default})" if shown and "default" not in text else text


def _without_none(hint: Any) -> Any:
    """`T | None` -> `T`: None is the default of an option that was not given, never something to type."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    kept = [part for part in get_args(hint) if part is not type(None)]
    return kept[0] if len(kept) == 1 else Union[tuple(kept)]  # noqa: UP007


def _reader(hint: Any) -> Callable[[str], Any]:
    """What turns the text of an argument into its type; pydantic checks the range that the annotation names."""
    if hint is str:
        return str
    adapter, expected = TypeAdapter(hint), _expected(hint)

    def read(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}") from None

    return read


def _expected(hint: Any) -> str:
    """`Annotated[int, Ge(1)]` -> "a whole number of at least 1"."""
    kind, *bounds = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    named = [
        f"{words} {getattr(bound, name):g}"
        for bound in bounds
        for kind_of, words, name in _BOUNDS
        if isinstance(bound, kind_of)
    ]
    return _NAMES.get(kind, kind.__name__) + (f" of {' and '.join(named)}" if named else "")
