"""Shell completion: a script with the words that can follow, taken from the commands' parsers when it is printed.

The script is static, because asking the program at every key would import torch at every key.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

__all__ = ["SHELLS", "script"]

SHELLS = ("bash", "zsh")

_SCRIPT = """_silkie() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words
  case "${{COMP_WORDS[*]:1:COMP_CWORD-1}} " in
{cases}
    *) words={commands};;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o bashdefault -o default -F _silkie silkie"""


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser | None]) -> str:
    """The script of a shell. `parsers`: command -> its parser; None completes files."""
    branches = [branch for name, parser in parsers.items() if parser for branch in _branches(name, parser)]
    branches += [(name, []) for name, parser in parsers.items() if parser is None]
    branches.sort(key=lambda branch: -len(branch[0].split()))  # `data inspect` before `data`
    cases = "\n".join(f'    "{path} "*) words="{" ".join(words)}";;' for path, words in branches)
    text = _SCRIPT.format(cases=cases, commands=f'"{" ".join(parsers)}"')
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _branches(path: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Words that can follow a command, and those of its subcommands."""
    words = [flag for action in parser._actions for flag in action.option_strings[:1] if flag.startswith("--")]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            words += list(action.choices)
            for name, own in action.choices.items():
                yield from _branches(f"{path} {name}", own)
    yield path, words
