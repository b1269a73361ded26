"""Starting a run in several processes, through `accelerate launch`."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from silkie.io.console import debugging, say

__all__ = ["LAUNCHED", "launch", "launch_options", "launch_words", "several_devices"]

LAUNCHED = "SILKIE_LAUNCHED"  # set for the processes of `launch`: options of the launcher were read already
# Said by no one: accelerate then takes these values and warns that it did.
DEFAULTS = {"num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}


@cache
def _parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch_options() -> dict[str, bool]:
    """Options of `accelerate launch`, and whether they take a value. `accelerate_config` is TRL's name of
    `config_file`."""
    takes = {action.dest: action.nargs != 0 for action in _parser()._actions if action.option_strings}
    spellings = {
        word.removeprefix("--").replace("-", "_"): action.nargs != 0
        for action in _parser()._actions
        for word in action.option_strings
        if word.startswith("--")
    }
    return {**takes, **spellings, "accelerate_config": True} | {"help": False}


def launch_words(options: Mapping[str, Any]) -> list[str]:
    """Options of the launcher as its command line."""
    words = []
    for name, value in options.items():
        flag = "--config_file" if name == "accelerate_config" else f"--{name}"
        if value is True or value is False:
            words += [flag] * value
        else:
            words += [flag, str(value)]
    return words


def several_devices() -> bool:
    """Whether this process sees more than one GPU: it would train on them with DataParallel, which silkie cannot."""
    import torch

    return torch.cuda.device_count() > 1


def launch(words: Sequence[str], run: Sequence[str], *, use_cpu: bool) -> int:
    """Start a run in the processes that `words` ask for; the return value is the exit status.

    Args:
        words: options of `accelerate launch`.
        run: options of the run, which every process reads.
        use_cpu: the run is on CPUs, where accelerate must be told that several processes are one run.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[LAUNCHED] = "1"
    if not debugging():  # what it logs of a process that failed is the line below, in four
        logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    arguments = _parser().parse_args([*_with_defaults(words, use_cpu), "--module", "silkie.run", *run])
    say(f"starting the run through accelerate: {' '.join(words) or 'a process per GPU'}")
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        say(f"rank {rank} ended the run with status {failure.exitcode}; its message is above")
        return abs(failure.exitcode) or 1
    except subprocess.CalledProcessError as error:
        return abs(error.returncode)
    return 0


def _with_defaults(words: Sequence[str], use_cpu: bool) -> list[str]:
    given = _parser().parse_args([*words, "script"])
    if given.config_file is not None:
        return list(words)
    added = [f"--{name}={value}" for name, value in DEFAULTS.items() if getattr(given, name) is None]
    several = given.num_processes is not None and given.num_processes > 1
    if use_cpu and several and not (given.multi_gpu or given.use_deepspeed or given.use_fsdp):
        added.append("--multi_gpu")
    return [*words, *added]
