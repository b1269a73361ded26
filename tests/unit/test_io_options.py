"""Command lines from option dataclasses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le

from silkie.io.options import (
    Command,
    argument,
    command_parser,
    option,
    options_parser,
    parse_command,
    parse_options,
)


@dataclass(frozen=True, kw_only=True)
class Shared:
    seed: int = option(0, "of every draw")


@dataclass(frozen=True, kw_only=True)
class Draw(Shared):
    source: str = argument("what to draw from", metavar="SOURCE")
    out: str = option(help="where to write")
    max_items: Annotated[int, Ge(1)] | None = option(None, "at most so many", metavar="N")
    top_p: Annotated[float, Gt(0), Le(1)] = option(1.0, "share of 100 % of the mass")
    temperatures: tuple[float, ...] | None = option(None, "one or more")
    form: Literal["auto", "json"] = option("auto", "form of the answer")
    questions: str | None = option(None, "a file", aliases=("--annotations",))
    quiet: bool = option(False, "no progress line")
    colour: bool = option(True, "no colours", flag="--plain")


COMMANDS = [Command("draw", "draw items", Draw, lambda options: options.seed), Command("rate", "rate", Shared, id)]


def parse(*words: str) -> Draw:
    return parse_command(command_parser("prog", "about", COMMANDS), COMMANDS, ["draw", *words])[1]


def test_defaults_types_and_aliases():
    assert parse("a.jsonl", "--out", "b") == Draw(source="a.jsonl", out="b")
    got = parse("--quiet", "a", "--out=b_c", "--max-items", "3", "--temperatures", "0", "0.5", "--annotations", "q")
    assert got == Draw(source="a", out="b_c", max_items=3, temperatures=(0.0, 0.5), questions="q", quiet=True)
    assert isinstance(got.temperatures[0], float)
    parser = command_parser("prog", "about", COMMANDS)
    command, options = parse_command(parser, COMMANDS, ["draw", "a", "--out", "b", "--seed", "7"])
    assert command.run(options) == 7


def test_a_flag_may_have_another_name_than_its_field_and_turn_it_off():
    assert parse("a", "--out", "b").colour is True and parse("a", "--out", "b", "--plain").colour is False
    with pytest.raises(SystemExit):
        parse("a", "--out", "b", "--colour")


def test_a_flag_may_be_written_with_underscores_and_its_value_is_left_alone():
    assert parse("a", "--out", "b", "--max_items=2", "--top_p", "0.5") == Draw(
        source="a", out="b", max_items=2, top_p=0.5
    )
    assert parse("a_b", "--out=--x_y").out == "--x_y"
    assert parse("--out", "b", "--", "--a_b").source == "--a_b"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-items", "0"], "argument --max-items: expected a whole number of at least 1, found '0'"),
        (["--max-items", "1.5"], "argument --max-items: expected a whole number of at least 1, found '1.5'"),
        (["--top-p", "1.5"], "argument --top-p: expected a number of more than 0 and at most 1, found '1.5'"),
        (["--top-p", "nan"], "argument --top-p: expected a number of more than 0 and at most 1, found 'nan'"),
        (["--form", "xml"], "invalid choice: 'xml'"),
        (["--seed", "x"], "argument --seed: expected a whole number, found 'x'"),
        (["--no-such"], "unrecognized arguments: --no-such"),
    ],
)
def test_a_wrong_value_ends_with_status_2_and_says_what_was_expected(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse("a", "--out", "b", *words)
    assert message in capsys.readouterr().err


def test_what_must_be_given(capsys):
    for words, message in ((["--out", "b"], "required: SOURCE"), (["a"], "required: --out")):
        with pytest.raises(SystemExit, match="2"):
            parse(*words)
        assert message in capsys.readouterr().err


def test_help_shows_defaults_and_one_spelling(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help")
    text = capsys.readouterr().out
    assert "--max-items N" in text and "max_items" not in text
    assert "share of 100 % of the mass (default: 1.0)" in text and "(default: None)" not in text
    assert "(default: False)" not in text


def test_a_program_without_subcommands():
    assert parse_options(options_parser("prog", "about", Shared), Shared, ["--seed", "3"]) == Shared(seed=3)


def test_it_imports_nothing_heavy():
    code = "import sys, silkie.io.options; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
