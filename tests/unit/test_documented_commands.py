"""Every `silkie ...` command that a page shows is one that the programs accept."""

import re
import shlex
from functools import cache

import pytest

from silkie.__main__ import PROGRAMS
from silkie.run.launch import launch_options
from tests.unit.test_reference import PAGES, ROOT, reference

COMMAND = re.compile(r"^(?:[A-Z_]+=\S* )*silkie (?P<words>(?:[^\\\n]|\\\n)+)", re.M)


def shown_commands():
    for page in PAGES:
        for found in COMMAND.finditer(page.read_text(encoding="utf-8")):
            line = found["words"].replace("\\\n", " ")
            if re.match(r"\w+( |$)", line) and "..." not in line and line.split()[0] in [*PROGRAMS, "completion"]:
                words = shlex.split(line.partition(" &&")[0], comments=True)
                yield pytest.param(words, id=f"{page.relative_to(ROOT).as_posix()}: {' '.join(words)[:60]}")


@cache
def parsers():
    return dict(reference.parsers())


@pytest.mark.parametrize("words", shown_commands())
def test_a_command_of_a_page_is_accepted(words):
    name, rest = words[0], words[1:]
    if name == "completion":
        return
    assert name in PROGRAMS
    parser = parsers()[f"silkie {name}"]
    if name != "train":
        parser.parse_args(rest)  # ends with status 2 for what it does not know
        return
    known = {flag for action in parser._actions for flag in action.option_strings}
    known |= {"--config", *(f"--{option}" for option in launch_options())}
    unknown = [
        word for word in rest if word.startswith("--") and word.replace("-", "_").replace("__", "--") not in known
    ]
    assert not unknown


def test_the_readme_shows_the_commands():
    commands = [parameter.values[0][0] for parameter in shown_commands()]
    assert {"data", "train", "plan", "infer", "merge", "report", "feedback", "eval"} <= set(commands)
