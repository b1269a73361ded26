"""How a run ends before its last step: a signal or the stop file asks for it, a checkpoint is saved, the script leaves.

A script that continues after `train()` would save, evaluate and report a half-trained model as the final one. So
`train()` ends the process with exit code 75, unless `on_preempt="return"` says that the script handles it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_FILE = "stop"  # a file in output_dir that asks a run to save and stop, for launchers that pass signals on too late
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: start the same command again to resume
ECHO = 5.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # a preempted job, Ctrl-C


@contextmanager
def on_signals(ask: Callable[[str], None]) -> Iterator[None]:
    """Within the context, the first SIGTERM or Ctrl-C calls `ask` with the signal's name. One more within `ECHO`
    seconds is the same request: a launcher passes on what its processes have received as well. A later one ends the
    process as usual.

    Only the main thread can set signal handlers; elsewhere the context does nothing.
    """
    previous: dict[int, Any] = {}
    asked: list[float] = []

    def put_back() -> None:
        while previous:
            number, handler = previous.popitem()
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        if not asked:
            asked.append(time.monotonic())
            ask(signal.Signals(number).name)
        elif time.monotonic() > asked[0] + ECHO:
            put_back()
            signal.raise_signal(number)

    try:
        for number in SIGNALS:
            former = signal.getsignal(number)
            signal.signal(number, handle)
            previous[number] = former if former is not None else signal.SIG_DFL  # None: set outside Python
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        put_back()
