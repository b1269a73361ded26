"""`silkie train`: its options in groups, and the run in this process or, through accelerate, in several."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import TrainingArguments
from trl import DPOConfig, ModelConfig, TrlParser

from silkie import SilkieDPOConfig
from silkie.io.console import alike, guarded, log_to_stderr, rank
from silkie.losses.options import LossFields, LossOptions
from silkie.run import RunArguments, run
from silkie.run.launch import LAUNCHED, launch, launch_options, launch_words, several_devices

__all__ = ["make_parser", "start", "train"]

ABOUT = (
    "Preference-train a vision-language model on --dataset_name, from --model_name_or_path. --config FILE.yaml takes"
    " any option by its name, and the command line wins over it. --num_processes N, --config_file FILE and every other"
    " option of `accelerate launch` start the run in several processes; so do several visible GPUs. --dry_run loads"
    " everything, runs one optimizer step and prints the plan."
)
# What nearly every run sets, of TRL's and transformers' options: shown by --help. The rest is behind --help-all.
COMMON = """output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps
lr_scheduler_type warmup_steps weight_decay optim bf16 tf32 use_cpu gradient_checkpointing seed
precompute_ref_log_probs logging_steps report_to run_name eval_strategy eval_steps save_steps save_total_limit
dataloader_num_workers dataset_num_proc deepspeed resume_from_checkpoint""".split()  # noqa: SIM905


def start(argv: Sequence[str], prog: str = "silkie train") -> int:
    """`silkie train`: launches processes where several are asked for, else trains in this one."""
    return guarded(lambda: _start(list(argv), prog))


def train(argv: Sequence[str], prog: str = "silkie train") -> int:
    """Trains in this process, which is one of a launcher's or alone. What `recipes/dpo_silkie.py` calls."""
    return guarded(lambda: _train(list(argv), prog))


def _start(argv: list[str], prog: str) -> int:
    asked = read_command(argv, prog)
    words = launch_words(asked.launch)
    if "WORLD_SIZE" not in os.environ and (words or (several_devices() and not asked.use_cpu)):
        return launch(words, argv, use_cpu=asked.use_cpu)
    return _train(argv, prog)


def check_command(argv: Sequence[str], prog: str = "silkie train") -> int:
    """Reads the options of a run, all checks of theirs included, and loads nothing.

    Raises:
        ValueError: an option is unknown, or a value cannot work.
    """
    read_command(argv, prog)
    _parsed(argv, prog)
    return 0


def _train(argv: list[str], prog: str) -> int:
    log_to_stderr()
    with alike():
        asked = read_command(argv, prog)
        if asked.launch and LAUNCHED not in os.environ:
            raise ValueError(
                f"{', '.join(asked.launch)}: launcher options, but this process does not launch others. Start with"
                " `silkie train`."
            )
        run_args, args, model_args = _parsed(argv, prog)
    run(run_args, args, model_args)
    return 0


def _parsed(argv: Sequence[str], prog: str) -> Any:
    parser = make_parser(prog)
    parser.set_defaults(**precision(read_command(argv, prog).use_cpu))
    return parser.parse_args_and_config(_two_words(argv), return_remaining_strings=True)[:3]


def precision(use_cpu: bool) -> dict[str, bool | None]:
    """Defaults of `bf16` and `tf32` on this machine's device: on where the GPU computes in them (compute capability 8),
    which the recipes then need not say; a command line or YAML that sets them wins."""
    fits = not use_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return {"bf16": fits, "tf32": True if fits else None}


@dataclass(frozen=True, slots=True)
class Asked:
    """What a command line and its YAML ask for. `launch`: options of the launcher -> their value."""

    launch: dict[str, Any]
    use_cpu: bool


def read_command(argv: Sequence[str], prog: str = "silkie train") -> Asked:
    """Sorts the options of the command line and of the YAML file into those of a run and those of the launcher.

    Raises:
        ValueError: an option or a key that neither knows, or a YAML file that is none.
    """
    words, parser, known = _two_words(argv), make_parser(prog), launch_options()
    config = _config(words)
    unused = parser.set_defaults_with_config(**{key: value for key, value in config.items() if key != "env"})
    launcher = {word.removeprefix("--"): config[word.removeprefix("--")] for word in unused[::2]}
    namespace, rest = parser.parse_known_args(_without_config(words))
    unknown = [f"`{name}` of the config file" for name in launcher if name not in known]
    name = ""
    for word in rest:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").replace("-", "_").partition("=")
            launcher[name] = value if equals else True
            unknown += [f"`{word.partition('=')[0]}`"] if name not in known else []
        elif launcher.get(name) is True and known.get(name):
            launcher[name] = word
        elif name in known or not name:
            unknown.append(f"`{word}`")
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}{_meant(unknown[0], parser, known)}")
    return Asked(launch=launcher, use_cpu=bool(namespace.use_cpu))


def _meant(word: str, parser: argparse.ArgumentParser, known: Iterable[str]) -> str:
    names = {action.dest for action in parser._actions} | set(known)
    wrong = word.split("`")[1].removeprefix("--").replace("-", "_")
    close = difflib.get_close_matches(wrong, names, n=1)
    return f": did you mean `{close[0]}`?" if close else ": --help-all lists what there is"


def _two_words(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` as two words, which is how TRL wants it."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def _without_config(words: Sequence[str]) -> list[str]:
    if "--config" not in words:
        return list(words)
    at = words.index("--config")
    return [*words[:at], *words[at + 2 :]]


def _config(words: Sequence[str]) -> dict[str, Any]:
    if "--config" not in words:
        return {}
    at = words.index("--config") + 1
    if at == len(words):
        raise ValueError("--config wants a YAML file.")
    file = Path(words[at])
    if not file.is_file():
        raise FileNotFoundError(f"--config {file}: no such file.")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--config {file} must hold `option: value` lines, not {type(config).__name__}.")
    return config


def make_parser(prog: str = "silkie train") -> TrainParser:
    """The parser of all options of a run."""
    return TrainParser((RunArguments, SilkieDPOConfig, ModelConfig), prog=prog, description=ABOUT, allow_abbrev=False)


class TrainParser(TrlParser):
    """TRL's parser with a help in groups, and errors without a thousand lines of usage."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.add_argument(
            "--help-all", "--help_all", action=_HelpAll, help="show every option, also TRL's and transformers'"
        )
        # TRL's parser adds this to options that are on or off; silkie's has a third word
        self.add_argument(
            "--no_gradient_checkpointing",
            "--no-gradient-checkpointing",
            dest="gradient_checkpointing",
            action="store_const",
            const=False,
            default=argparse.SUPPRESS,
        )

    def format_help(self, everything: bool = False) -> str:
        formatter = _Lines(prog=self.prog, max_help_position=34, width=118)
        formatter.add_text(f"{self.prog} [--config FILE.yaml] [option ...]")
        formatter.add_text(self.description)
        actions = {action.dest: action for action in reversed(self._actions)}  # the first of `--x` and `--no_x`
        for title, names in option_sections(everything):
            formatter.start_section(title)
            formatter.add_arguments([actions[name] for name in names if name in actions])
            formatter.end_section()
        if not everything:
            formatter.add_text("--help-all shows all options, also the rest of TRL's and transformers'.")
        return formatter.format_help()

    def error(self, message: str) -> Any:
        if rank() == 0:
            self._print_message(f"error: {message}. {self.prog} --help lists the options.\n")
        self.exit(2)


def option_sections(everything: bool) -> list[tuple[str, list[str]]]:
    """Title and option names of the sections of the help, in their order."""
    trl, transformers = (_names(DPOConfig) - _names(TrainingArguments)), _names(TrainingArguments)
    losses = ["loss_type", "loss_weights", *(f.name for f in fields(LossOptions)), "corruption", "corruption_strength"]
    own = [name for name in SilkieDPOConfig.__annotations__ if not name.startswith("_") and name not in losses]
    common = [name for name in COMMON if name not in own]
    shown = [
        ("data and run", [f.name for f in fields(RunArguments)]),
        ("model and adapter", [f.name for f in fields(ModelConfig)]),
        ("losses", list(dict.fromkeys(losses))),
        ("silkie's training options", own),
        ("often used options of TRL and transformers", common),
    ]
    if not everything:
        return [*shown, ("help", ["help", "help_all"])]
    placed = {name for _, names in shown for name in names} | {f.name for f in fields(LossFields)}
    return [
        *shown,
        ("other options of TRL's DPOConfig", sorted(trl - placed)),
        ("other options of transformers' TrainingArguments", sorted(transformers - placed)),
        ("launcher: options of `accelerate launch` (accelerate launch --help says what they do)", []),
    ]


def _names(config: type) -> set[str]:
    return {option.name for option in fields(config)}


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_help(everything=True))
        parser.exit()


class _Lines(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of an option a line: `--max_groups`, not also `--max-groups` and its value twice."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs != 0:
            return f"{action.option_strings[0]} {self._value(action)}".rstrip()
        return action.option_strings[-1] if action.dest == "help" else action.option_strings[0]

    def _value(self, action: argparse.Action) -> str:
        if action.choices and len(words := ",".join(map(str, action.choices))) < 70:
            return "{" + words + "}"
        if action.const is True:
            return "[BOOL]"
        kind = getattr(action.type, "__name__", "value")
        named = {"int": "N", "float": "X", "str": "TEXT"}.get(kind, "VALUE")
        return f"{named} ..." if action.nargs == "+" else named

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").strip()
        shown = action.default is not None and action.default is not argparse.SUPPRESS and action.default != ""
        return f"{text} (default: %(default)s)" if shown and "%(default)" not in text else text
