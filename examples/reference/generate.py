"""Write the reference pages from the code that they describe.

    python examples/reference/generate.py            # writes the pages beside this file
    python examples/reference/generate.py --check    # status 1 where a page is out of date

config.md: every field of SilkieDPOConfig. commands.md: every command's options. metrics.md: every logged metric.
errors.md: every error class. `tests/unit/test_reference.py` runs the check, and a training that must log what
metrics.md says.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

MADE = "Made by `python examples/reference/generate.py`; edit the code, not this page."


def wrap(text: str, indent: str = "") -> str:
    """One paragraph at 120 columns."""
    settings: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(" ".join(text.split()), 120, subsequent_indent=indent, **settings)


def bullet(text: str) -> str:
    return wrap("- " + text, "  ")


# ---- config.md


def config_page() -> str:
    from transformers import TrainingArguments
    from trl import DPOConfig

    from silkie import SilkieDPOConfig
    from silkie.losses.options import LossFields

    fields = {field.name: field for field in dataclasses.fields(SilkieDPOConfig) if field.init}
    trl = {field.name: field for field in dataclasses.fields(DPOConfig)}
    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    loss_names = {field.name for field in dataclasses.fields(LossFields)}
    own = [name for name in fields if name not in trl and name not in loss_names]
    of_trl = [name for name in fields if name in trl and name not in base]
    differ = [name for name in fields if name in trl and default(fields[name]) != default(trl[name])]
    refused = [name for name in fields if name in trl and refusal(name)]
    readers = read_by()
    parts = [
        "# Every option of a run",
        wrap(
            "`SilkieDPOConfig` is TRL's `DPOConfig` with silkie's fields. On a command line the same names are options"
            ' (`--layout packed`), in a YAML file keys. "Read by" names the silkie modules that use a field; one that'
            " nothing would read is refused, not ignored. " + MADE
        ),
        "## silkie's own",
        *(entry(fields[name], readers) for name in own),
        "## Of the losses",
        wrap("An option that no selected loss reads is an error. Which loss to take: [losses.md](../losses.md)."),
        *(entry(fields[name], readers) for name in sorted(loss_names)),
        "## Other than in TRL",
        wrap("Defaults that silkie changes:"),
        "\n".join(bullet(f"`{n}`: `{default(fields[n])}`, in TRL `{default(trl[n])}`.") for n in differ),
        wrap("Refused with an error where they would ask for something that silkie does not do:"),
        "\n".join(bullet(f"`{name}`: {refusal(name)}") for name in refused),
        "## TRL's",
        *(entry(fields[name], readers, "TRL") for name in of_trl),
        "## transformers'",
        *(entry(fields[name], readers, "transformers") for name in fields if name in base),
    ]
    return "\n\n".join(parts) + "\n"


def default(field: dataclasses.Field) -> str:
    """The default as it would be written in Python."""
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    if field.default is dataclasses.MISSING:
        return "required"
    value = getattr(field.default, "value", field.default)  # an enum's text
    return repr(value).replace(str(Path.home()), "~")


def entry(field: dataclasses.Field, readers: dict[str, list[str]], inherited: str = "") -> str:
    """One field: its name and default, what it means, and who reads it."""
    about = str(field.metadata.get("help") or "")
    who = [f"`{module}`" for module in readers.get(field.name, [])]
    used = losses_that_read(field.name)
    if used:
        who.append(f"the losses {used}")
    if inherited and not who:
        who = [inherited]
    reading = f" Read by {', '.join(who)}." if who else ""
    return bullet(f"**`{field.name}`** (`{default(field)}`): {sentence(about)}{reading}")


def sentence(text: str) -> str:
    """Help text as a sentence; `<` would be read as HTML."""
    text = " ".join(text.split()).replace("<", "&lt;").replace("|", "/")
    return text + ("" if not text or text[-1] in ".!?:)" else ".")


def losses_that_read(option: str) -> str:
    from silkie.losses.catalogue import SPECS
    from silkie.losses.options import LossOptions, option_users

    if option not in {field.name for field in dataclasses.fields(LossOptions)}:
        return ""
    users = option_users(option)
    others = set(SPECS) - users
    if len(others) < len(users) and others:
        return f"except {', '.join(f'`{name}`' for name in sorted(others))}"
    return ", ".join(f"`{name}`" for name in sorted(users))


def refusal(name: str) -> str:
    """Why a field of TRL's or transformers' is refused: the words of the config's own error."""
    from silkie import SilkieDPOConfig
    from silkie.config.checks import NOT_READ

    if name in NOT_READ:
        neutral, instead = NOT_READ[name]
        return f"leave it at `{neutral[0]!r}`. {instead}"
    if name in ("padding_free", "torch_compile"):
        settings: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "report_to": "none", name: True}
        try:
            SilkieDPOConfig(**settings)
        except ValueError as error:
            return str(error)
    return ""


_HOLDERS = {"args", "config", "training_args", "options", "self.args"}


def read_by() -> dict[str, list[str]]:
    """Field -> modules of silkie that read it from an object of options: `args.NAME`, `self.args.NAME`."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "silkie").rglob("*.py")):
        module = path.relative_to(ROOT / "silkie").as_posix()
        if module.startswith(("config/", "demo/", "feedback/", "evaluation/__main__", "data/__main__")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in _HOLDERS:
                found.setdefault(node.attr, set()).add(module)
    for name, fields in of_properties().items():  # who reads a property of the config reads its fields
        for field in fields:
            found.setdefault(field, set()).update(found.get(name, set()))
    return {name: sorted(modules) for name, modules in found.items()}


def of_properties() -> dict[str, set[str]]:
    """Property of the config -> fields that it is made of."""
    tree = ast.parse((ROOT / "silkie" / "config" / "options.py").read_text(encoding="utf-8"))
    return {
        node.name: {a.attr for a in ast.walk(node) if isinstance(a, ast.Attribute) and ast.unparse(a.value) == "self"}
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "property" for d in node.decorator_list)
    }


# ---- commands.md

RECIPES = {"python recipes/studies/iterative.py": ("recipes.studies.iterative", "main")}


class Captured(BaseException):  # no handler of errors on the way catches it
    """Carries the parser that a program has built."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command of `silkie`, as its shell completion finds them, and the recipes."""
    from silkie.__main__ import PROGRAMS

    for name, program in PROGRAMS.items():
        if program.parser:
            yield f"silkie {name}", getattr(importlib.import_module(program.module), program.parser)(f"silkie {name}")
            continue
        parser = captured_parser(program.module, program.function)
        for word in program.before:
            parser = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[word]
        yield f"silkie {name}", parser
    for name, (module, function) in RECIPES.items():
        yield name, captured_parser(module, function)


def captured_parser(module: str, function: str) -> argparse.ArgumentParser:
    """The parser of a program, caught where it would read its arguments; the program itself does not run."""

    def caught(self: argparse.ArgumentParser, *_: Any, **__: Any) -> Any:
        raise Captured(self)

    with mock.patch.object(sys, "argv", ["program", "--help"]):
        program = getattr(importlib.import_module(module), function)
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", caught):
            try:
                program()
            except Captured as stopped:
                return stopped.parser
    raise RuntimeError(f"{module}.{function} read no arguments")


def commands_page() -> str:
    parts = [
        "# Every command",
        wrap("`--like-this` and `--like_this` are the same option. A command's `--help` prints the same. " + MADE),
    ]
    for name, parser in parsers():
        parts += [f"## `{name}`", wrap(sentence((parser.description or "").strip().partition("\n\n")[0]))]
        parts += list(of_parser(name, parser))
    return "\n\n".join(part for part in parts if part) + "\n"


def of_parser(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    from silkie import SilkieDPOConfig

    of_config = {field.name for field in dataclasses.fields(SilkieDPOConfig)}
    lines, seen, skipped = [], {"help", "help_all"}, 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for sub, own in action.choices.items():
                yield f"### `{name} {sub}`"
                yield wrap(sentence(helps.get(sub) or ""))
                yield from of_parser(f"{name} {sub}", own)
            continue
        if action.dest in seen or action.help == argparse.SUPPRESS:  # a switch of TRL's has a second flag, --no_x
            continue
        seen.add(action.dest)
        if action.dest in of_config and len(parser._actions) > 150:
            skipped += 1
            continue
        lines.append(bullet(option_line(action)))
    if lines:
        yield "\n".join(lines)
    if skipped:
        yield wrap(f"And the {skipped} fields of [SilkieDPOConfig](config.md), by their names.")


def option_line(action: argparse.Action) -> str:
    shown = [f"`{flag}`" for flag in action.option_strings if not flag.startswith("--no_")]
    # TrlParser adds the dashed form of every flag
    shown = [
        flag for flag in shown if "_" in flag or flag.replace("-", "_") not in [s.replace("-", "_") for s in shown]
    ]
    flags = ", ".join(dict.fromkeys(shown or [f"`{action.option_strings[0]}`" if action.option_strings else ""]))
    if not action.option_strings:
        flags = f"`{action.metavar or action.dest}`"
    choices = f" One of {', '.join(f'`{choice}`' for choice in action.choices)}." if action.choices else ""
    about = re.sub(r"\(default: [^()]*\)\s*$", "", (action.help or "").replace("%%", "%").replace("%(default)s", ""))
    given = action.default
    value = getattr(given, "value", given)
    told = value is not None and value is not argparse.SUPPRESS and (value is not False and action.nargs != 0)
    required = " Required." if action.required and action.option_strings else ""
    return f"{flags}: {sentence(about.strip())}{choices}{f' Default `{value}`.' if told else ''}{required}"


# ---- metrics.md

TRAINING = {
    "loss": "mean over all pairs (tokens, groups) since the last line; what is minimised",
    "loss/NAME": "the same of one loss of `loss_type`, before its weight",
    "grad_norm": "norm of the gradient before clipping",
    "learning_rate": "of the step",
    "epoch": "passes over the data, with fractions",
    "num_tokens": (
        "tokens trained on since the start of the run, counted as TRL does: prompt and response of both sides of every"
        " pair"
    ),
    "num_packed_tokens": (
        "tokens that went through the policy since the start of the run, prompts counted once per group when packed"
    ),
    "rewards/chosen": (
        "beta times the log-ratio of policy and reference of the chosen response (without a reference: beta times its"
        " log-prob; simpo: per token)"
    ),
    "rewards/rejected": "the same of the rejected response",
    "rewards/margins": "rewards/chosen - rewards/rejected",
    "rewards/accuracies": "share of pairs whose margin is above 0",
    "logps/chosen": "log-prob of the chosen response under the policy, summed over its tokens",
    "logps/rejected": "the same of the rejected response",
}
TOKEN_STATS = {
    "entropy": "entropy of the next-token distribution, in nats, over the tokens of both responses of every pair",
    "mean_token_accuracy": "share of the chosen responses' tokens that the policy ranks first",
    "logits/chosen": "mean logit over the vocabulary, over the tokens of the chosen responses",
    "logits/rejected": "the same of the rejected responses",
}
ROUTER = {"aux_loss": "load-balancing loss of the experts, where `router_aux_loss_coef` is above 0"}
AT_THE_END = {
    "train_runtime": "seconds of the whole training",
    "train_samples_per_second": "groups per second",
    "train_steps_per_second": "optimizer steps per second",
    "total_flos": "transformers' estimate of floating-point operations; it does not know about packing",
    "train_loss": "mean loss of the run",
}
EVALUATION = {
    "eval_loss": "the loss over the whole evaluation set, as one batch would give it",
    "eval_runtime": "seconds of the evaluation",
    "eval_samples_per_second": "groups per second",
    "eval_steps_per_second": "batches per second",
}


def metrics_page() -> str:
    def table(rows: dict[str, str]) -> str:
        return "\n".join(bullet(f"`{name}`: {meaning}.") for name, meaning in rows.items())

    parts = [
        "# Every logged metric",
        wrap(
            "Names are TRL's. Means are over all pairs of all ranks since the last line of the log, with one reduction"
            " per line; pairs of weight 0 are no part of a mean. They reach the console, `trainer_state.json`, the"
            " report page and every tracker of `report_to` ([trackers](../trackers.md)). " + MADE
        ),
        "## In training",
        table(TRAINING),
        "With `log_token_stats=True` also:",
        table(TOKEN_STATS),
        "For a mixture of experts also:",
        table(ROUTER),
        "## After training",
        table(AT_THE_END),
        "## In evaluation",
        wrap("`loss/NAME` and the metrics from `rewards/chosen` on, with the prefix `eval_`, and:"),
        table(EVALUATION),
        "## Benchmarks while training",
        wrap(
            "`eval_benchmarks` adds `eval_BENCHMARK_METRIC` for every metric of the benchmark's score, every"
            " `eval_benchmark_steps` steps."
        ),
    ]
    return "\n\n".join(parts) + "\n"


# ---- errors.md


def error_classes() -> dict[str, tuple[str, str, str]]:
    """Public exception class -> (module, base, docstring), read from the source."""
    found: dict[str, tuple[str, str, str]] = {}
    classes = [
        (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."), node)
        for path in sorted((ROOT / "silkie").rglob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and len(node.bases) == 1
    ]
    known = {"Exception", "ValueError", "RuntimeError", "TypeError", "KeyError", "OSError", "SystemExit"}
    for _ in range(4):  # a class may derive from one that is declared in a later file
        for module, node in classes:
            base = ast.unparse(node.bases[0])
            if base in known or base in found:
                found[node.name] = (module, base, " ".join((ast.get_docstring(node) or "").split()))
    return {name: about for name, about in sorted(found.items()) if not name.startswith("_")}


def errors_page() -> str:
    parts = [
        "# Every error class",
        wrap(
            "silkie's errors name the file, the row or the option, and a remedy. Options that cannot work are"
            " `ValueError`s. " + MADE
        ),
        "\n".join(
            bullet(f"**`{name}`** (`{base}`, in `{module}`): {sentence(about)}")
            for name, (module, base, about) in error_classes().items()
        ),
        "## Exit codes",
        "\n".join(
            [
                bullet("`0`: done."),
                bullet("`1`: an error; a judge or sampler that got no usable item."),
                bullet("`2`: wrong use, or input that cannot be used."),
                bullet(f"`{exit_code('PREEMPTED_EXIT_CODE')}`: training was asked to stop, saved, and can be resumed."),
                bullet("`3`: sampling or rating stopped early (budget, endpoint); the same command resumes it."),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def exit_code(name: str) -> int:
    from silkie.training import ending

    return getattr(ending, name)


PAGES = {
    "config.md": config_page,
    "commands.md": commands_page,
    "metrics.md": metrics_page,
    "errors.md": errors_page,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page is out of date")
    check = parser.parse_args().check
    stale = []
    for name, page in PAGES.items():
        text, file = page(), HERE / name
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}: run `python examples/reference/generate.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
