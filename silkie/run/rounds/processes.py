"""One stage at a time: a process of `silkie`, and the lock that it and the loop hold on the output directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from silkie.io.console import say
from silkie.io.posix import fcntl

__all__ = ["Stopped", "held", "run_stage"]

LOCK = "loop.lock"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A signal ended the loop; the stage has been told, has saved what it had, and has ended."""


@contextmanager
def held(directory: Path) -> Iterator[int]:
    """Within the context, this loop is the only one that writes to a directory; yields the lock's file descriptor.

    A stage inherits it. So a stage that outlives its loop (`kill -9`) still holds the directory, and the loop that is
    started next waits until it has ended, instead of doing the same work beside it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"{directory} is in use by another loop, or by a stage that a killed loop left running")
            say(f"({file.read().strip() or 'unknown'}). Waiting until it has ended ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        _note(file, f"process {os.getpid()}")
        yield file.fileno()


def run_stage(words: Sequence[str], lock: int) -> int:
    """Run `silkie WORDS` in a process of its own; the return value is its exit status.

    Signals that ask the loop to end are passed on; the stage saves what it has and ends.

    Raises:
        Stopped: that happened.
    """
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        command = [sys.executable, "-m", "silkie", *words]
        # a session of its own: a terminal's Ctrl-C would reach it twice
        process = subprocess.Popen(command, pass_fds=(lock,), start_new_session=True)
        with os.fdopen(os.dup(lock), "a+") as file:
            _note(file, f"process {process.pid}: silkie {' '.join(words[:2])}")
        if asked:
            process.send_signal(asked[0])
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Stopped(signal.Signals(asked[0]).name)
    return status


def _note(file: Any, text: str) -> None:
    """Who holds the lock, for whoever waits for it."""
    file.truncate(0)
    file.write(f"{text}\n")
    file.flush()
