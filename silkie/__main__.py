"""The console command: `silkie train | loop | data | feedback | eval | report | plan | check | infer | merge | ...`.

Every command is a module's `main(argv, prog)`, named here and imported when called: `silkie --help` imports nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from silkie import __version__
from silkie.io.console import guarded


@dataclass(frozen=True, slots=True)
class Program:
    """A command: one line about it, the module and function that run it, and words put before the caller's.

    Attributes:
        parser: function of the module that makes the parser, for completion; "" completes files.
        waits: it imports torch, so a line says at once that something happens.
    """

    help: str
    module: str
    function: str = "main"
    before: tuple[str, ...] = ()
    parser: str = "make_parser"
    waits: bool = True


GROUPS: dict[str, dict[str, Program]] = {
    "train": {
        "train": Program("preference-train a model; launches itself on several GPUs", "silkie.run.command", "start"),
        "loop": Program("on-policy rounds: sample, rate, train on, evaluate; again", "silkie.run.rounds.command"),
        "plan": Program("which launch configuration fits a model, and why", "silkie.plan.__main__", waits=False),
        "check": Program("can silkie train this model, and how", "silkie.model.__main__", before=("check",), parser=""),
        "demo": Program("the whole loop on a small embedded world, on a CPU", "silkie.demo.__main__"),
    },
    "data": {
        "data": Program("look at preference data before training on it", "silkie.data.__main__", waits=False),
        "feedback": Program("sample responses, have judges rate them", "silkie.feedback.__main__", waits=False),
    },
    "use and measure": {
        "infer": Program("ask a trained policy about an image", "silkie.inference", "infer", parser="infer_parser"),
        "merge": Program("fold an adapter into its base model", "silkie.inference", "merge", parser="merge_parser"),
        "convert": Program(
            "make safetensors of pickled weights", "silkie.inference", "convert_weights", parser="convert_parser"
        ),
        "eval": Program("run, judge, score and compare benchmarks", "silkie.evaluation.__main__", waits=False),
        "report": Program("one HTML page for a run, or two side by side", "silkie.report.__main__", waits=False),
    },
}
PROGRAMS = {name: program for group in GROUPS.values() for name, program in group.items()}


def usage() -> str:
    """The text of `silkie --help`."""
    lines = [f"silkie {__version__}: preference training (DPO) of vision-language models", ""]
    lines += ["usage: silkie COMMAND [option ...]        silkie COMMAND --help lists a command's options"]
    for title, programs in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10} {program.help}" for name, program in programs.items())]
    lines += [
        "",
        "  --debug     with any command: show the traceback of an error",
        "  --version   print the version",
        "  completion bash|zsh|fish   print a script that completes commands and options",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the return value is the exit status."""
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    words = _debug(words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    name, rest = words[0], words[1:]
    if name == "--version":
        print(f"silkie {__version__}")
        return 0
    if name == "completion":
        return _completion(rest)
    if name not in PROGRAMS:
        print(f"error: no command `{name}`{_meant(name)}", file=sys.stderr)
        return 2
    return _run(name, PROGRAMS[name], rest)


def _run(name: str, program: Program, rest: list[str]) -> int:
    helps = bool({"-h", "--help", "--help-all", "--help_all"} & set(rest))
    if program.waits and not helps and int(os.environ.get("RANK", "0")) == 0:
        print(f"silkie {name}: loading torch and transformers ...", file=sys.stderr, flush=True)
    function = getattr(importlib.import_module(program.module), program.function)
    return function([*program.before, *rest], prog="silkie" if program.before else f"silkie {name}") or 0


def _debug(words: list[str]) -> list[str]:
    """Takes `--debug` off the words. `--debug WORD` of `silkie train` is an option of transformers and stays."""
    for at, word in enumerate(words):
        of_transformers = words[0] == "train" and at + 1 < len(words) and not words[at + 1].startswith("-")
        if word == "--debug" and not of_transformers:
            os.environ["SILKIE_DEBUG"] = "1"  # read by silkie.io.console, also in processes that a launcher starts
            return [*words[:at], *words[at + 1 :]]
    return words


def _meant(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, PROGRAMS, n=1)
    return f": did you mean `{close[0]}`?" if close else f". Commands: {', '.join(PROGRAMS)}."


_INSTALL = {
    "bash": "silkie completion bash > ~/.local/share/bash-completion/completions/silkie",
    "zsh": 'in ~/.zshrc: eval "$(silkie completion zsh)", or source a file of it',
    "fish": "silkie completion fish > ~/.config/fish/completions/silkie.fish",
}


def _completion(rest: list[str]) -> int:
    from silkie.io.completion import SHELLS, script

    if len(rest) != 1 or rest[0] not in SHELLS:
        print(f"error: silkie completion takes one of {', '.join(SHELLS)}", file=sys.stderr)
        return 2
    parsers = {}
    for name, program in PROGRAMS.items():
        maker = getattr(importlib.import_module(program.module), program.parser) if program.parser else None
        parsers[name] = maker(f"silkie {name}") if maker else None
    print(f"# of silkie {__version__}; {_INSTALL[rest[0]]}\n{script(rest[0], parsers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
