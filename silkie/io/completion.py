"""Shell completion: a script with the words that can follow, taken from the commands' parsers when it is printed.

The script is static, because asking the program at every key would import torch at every key.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

__all__ = ["SHELLS", "script"]

_TOP = ("--help", "--version", "--debug")


@dataclass(frozen=True, slots=True)
class _Branch:
    """What can follow a command or subcommand: flags, with the values of those that name them, and subcommands.

    Attributes:
        values: flag -> its choices; empty: any word or file.
        switches: flags that take no value.
    """

    path: str
    values: dict[str, list[str]]
    switches: set[str]
    names: list[str]

    @property
    def flags(self) -> list[str]:
        return list(self.values)


# Flags are offered for a word that begins with a dash, else subcommands, the values of the flag before, or files.
_BASH = """_silkie() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" flags="" names="" values=""
  case "${{COMP_WORDS[*]:1:$((COMP_CWORD-1))}} " in
{cases}
    " ") flags="{top}" names="{commands}";;
  esac
  if [[ "$word" == -* ]]; then names="$flags"; elif [[ -n "$values" ]]; then names="$values"; fi
  COMPREPLY=($(compgen -W "$names" -- "$word"))
}}
complete -o bashdefault -o default -F _silkie silkie"""

# zsh's own completion first, where nothing has started it
_ZSH = """(( $+functions[compdef] )) || { autoload -U +X compinit && compinit -u; }
autoload -U +X bashcompinit && bashcompinit"""

_FISH = """function __silkie_at
  set -l words (commandline -opc)
  set -e words[1]
  string match -q -- "$argv *" "$words "
end
function __silkie_ends
  set -l words (commandline -opc)
  set -e words[1]
  test "$words" = "$argv"
end
{lines}"""


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser | None]) -> str:
    """The script of a shell. `parsers`: command -> its parser; None completes files."""
    branches = [branch for name, parser in parsers.items() if parser for branch in _branches(name, parser)]
    branches.sort(key=lambda branch: -len(branch.path.split()))  # `data inspect` before `data`
    return _WRITERS[shell](branches, [*parsers, "completion"])


def _bash(branches: list[_Branch], commands: list[str]) -> str:
    cases = []
    for branch in branches:
        chosen = "".join(f' {flag}) values="{" ".join(of)}";;' for flag, of in branch.values.items() if of)
        inner = f' case "$before" in{chosen} esac;' if chosen else ""
        names = " ".join(branch.names)
        cases.append(f'    "{branch.path} "*) flags="{" ".join(branch.flags)}" names="{names}";{inner};')
    cases.append(f'    "completion "*) names="{" ".join(SHELLS)}";;')
    return _BASH.format(cases="\n".join(cases), commands=" ".join(commands), top=" ".join(_TOP))


def _zsh(branches: list[_Branch], commands: list[str]) -> str:
    return f"{_ZSH}\n{_bash(branches, commands)}"


def _fish(branches: list[_Branch], commands: list[str]) -> str:
    lines = [f"complete -c silkie -f -n __silkie_ends -a '{' '.join(commands)}'"]
    lines += [f"complete -c silkie -n __silkie_ends -l {flag.removeprefix('--')}" for flag in _TOP]
    lines.append(f"complete -c silkie -f -n '__silkie_ends completion' -a '{' '.join(SHELLS)}'")
    for branch in branches:
        if branch.names:
            lines.append(f"complete -c silkie -f -n '__silkie_ends {branch.path}' -a '{' '.join(branch.names)}'")
        for flag, choices in branch.values.items():
            takes = "" if flag in branch.switches else f" -x -a '{' '.join(choices)}'" if choices else " -r"
            lines.append(f"complete -c silkie -n '__silkie_at {branch.path}' -l {flag.removeprefix('--')}{takes}")
    return _FISH.format(lines="\n".join(lines))


_WRITERS: dict[str, Callable[[list[_Branch], list[str]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS = tuple(_WRITERS)


def _branches(path: str, parser: argparse.ArgumentParser) -> Iterator[_Branch]:
    """What can follow a command, and its subcommands."""
    values, switches, names = {}, set(), []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names += list(action.choices)
            for name, own in action.choices.items():
                yield from _branches(f"{path} {name}", own)
        elif flag := next((f for f in action.option_strings if f.startswith("--")), None):
            values[flag] = [str(choice) for choice in action.choices or ()]
            if action.nargs == 0:
                switches.add(flag)
    yield _Branch(path, values, switches, names)
