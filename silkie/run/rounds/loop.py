"""The loop: every stage that is not done yet, in order, and after each round the page of what there is so far."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from silkie.evaluation import __main__ as evaluation
from silkie.feedback import __main__ as feedback
from silkie.io.console import say
from silkie.run.rounds.overview import write_overview
from silkie.run.rounds.processes import Stopped, held, run_stage
from silkie.run.rounds.settings import LoopFile
from silkie.run.rounds.stages import Stage, Stages
from silkie.training.ending import PREEMPTED_EXIT_CODE

__all__ = ["OtherLoop", "StageFailed", "run_loop"]

STATE = "loop.json"


class OtherLoop(ValueError):
    """The output directory holds rounds that were made with other settings."""


class StageFailed(RuntimeError):
    """A stage ended with an error, which stands above; `status` is its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class State:
    """`loop.json`: the settings that the rounds were made with, and the stages that are done with their seconds."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.file = directory / STATE
        found = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        self.settings = json.loads(json.dumps(settings))
        before = found.get("settings", self.settings)
        if other := [key for key in {**before, **self.settings} if before.get(key) != self.settings.get(key)]:
            shown = "; ".join(f"{key}: {before.get(key)!r} then, {self.settings.get(key)!r} now" for key in other[:3])
            raise OtherLoop(
                f"{directory} holds rounds that were made with other settings ({shown}). Choose another output_dir, or"
                " take the change back."
            )
        self.done: dict[str, float] = found.get("done", {})
        self._write()

    def finish(self, key: str, seconds: float) -> None:
        self.done[key] = round(seconds, 1)
        self._write()

    def _write(self) -> None:
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({"settings": self.settings, "done": self.done}, indent=1) + "\n", "utf-8")
        partial.replace(self.file)


def run_loop(loop: LoopFile) -> int:
    """Run a loop, or what is left of it; the return value is the exit status.

    Returns:
        0: all rounds are there. 75: a signal ended the loop. In both cases and after an error the same call resumes
        with the stage that was not finished.

    Raises:
        ValueError: a setting, a prompt or an option of a section cannot work; found before any stage runs.
        OtherLoop: the output directory holds rounds of other settings.
        StageFailed: a stage ended with an error.
        silkie.endpoint.adapters.AdapterNotLoaded: the server did not load a round's adapter.
    """
    out = Path(loop.output_dir)
    stages = Stages(loop)
    with held(out) as lock:
        state = State(out, loop.shaping())
        todo_of = {n: [s for s in stages.of_round(n) if s.key not in state.done] for n in range(loop.rounds + 1)}
        if any(todo_of.values()):
            check_commands(loop, stages)
        for number, todo in todo_of.items():
            for stage in todo:
                try:
                    state.finish(stage.key, run_one(stage, lock))
                except Stopped as signal_name:
                    say(f"{signal_name}: {stage.title} saved what it had; start the same command again to resume")
                    return PREEMPTED_EXIT_CODE
            if number and (todo or number == loop.rounds):
                text, page = write_overview(loop, stages, number, state.done)
                print(f"\n{text}\npage: {page}", flush=True)
    last = stages.policies()[-1].adapter
    print(f'next: silkie infer {last} IMAGE "Describe the image." --compare; silkie merge {last} {out / "merged"}')
    return 0


def run_one(stage: Stage, lock: int) -> float:
    """Run a stage to its end; returns the seconds that this start of it took."""
    stage.prepare()
    words, began = stage.words(), time.monotonic()
    say(f"\n=== {stage.title}\n    silkie {' '.join(words)}")
    status = run_stage(words, lock)
    if status == PREEMPTED_EXIT_CODE:  # its stop file
        raise Stopped("stopped")
    if status:
        raise StageFailed(
            f"{stage.title}: `silkie {' '.join(words[:2])}` ended with status {status}, its message is above. Start the"
            " same command again to resume.",
            status,
        )
    stage.finish()
    return time.monotonic() - began


def check_commands(loop: LoopFile, stages: Stages) -> None:
    """Have every command's own parser read its options before the first stage runs.

    Raises:
        ValueError: an option that a command does not know, or a value that it cannot take.
    """
    parsers = {"feedback": feedback.make_parser("silkie feedback"), "eval": evaluation.make_parser("silkie eval")}
    for stage in stages.of_round(1):
        command, *rest = stage.words()
        if command in parsers:
            _parse(parsers[command], rest, stage.key.partition("/")[2])
    checked = [sys.executable, "-m", "silkie.run.rounds.check_train", str(stages.write_train(1))]
    # in a process of its own: making the options of a run takes hold of the GPU
    result = subprocess.run(checked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")] or [result.stderr]
        raise ValueError(f"section `train`: {lines[-1].removeprefix('error: ')}")


def _parse(parser: Any, words: list[str], name: str) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(words)
    except SystemExit:
        error = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise ValueError(f"section `{name.removesuffix('-judge').partition('-')[0]}`: {error}") from None
