"""Runs jobs of `tests.support.train_run` in forked processes: libraries are imported once, so that a two-process run
takes seconds.

`python -m tests.support.fork_run JOBS.json`: a list of {"mode": single | ddp | zero2 | zero3 | fsdp2, "spec": {...},
"kills": n, "paced_by": directory, "seed": s}. With `kills`, a job is killed with SIGKILL that many times and started
again; then it runs to its end. Each start is killed once up to two new checkpoints have begun, after a random part of
the time that a step of the undisturbed run in `paced_by` took: moments that a slow or busy machine meets as well. The
environment of a forked process is what `accelerate launch` sets for the config of that mode.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]


def environment(mode: str, rank: int, port: int) -> dict[str, str]:
    """What `accelerate launch --config_file recipes/accelerate/MODE.yaml --num_processes 2` sets for a process."""
    if mode == "single":
        return {}
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if mode.startswith("zero"):
        env |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / f"recipes/accelerate/deepspeed_{mode}.json"),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true" if mode == "zero3" else "false",
        }
    if mode == "fsdp2":
        config = yaml.safe_load((ROOT / "recipes/accelerate/fsdp2.yaml").read_text())["fsdp_config"]
        env |= {"ACCELERATE_USE_FSDP": "true", **{name.upper(): str(value) for name, value in config.items()}}
    return env


def start(mode: str, spec: dict[str, Any], log: Path) -> list[int]:
    """Forks the processes of a run; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(1 if mode == "single" else 2):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _child(mode, rank, port, spec, log)
        pids.append(pid)
    return pids


def _child(mode: str, rank: int, port: int, spec: dict[str, Any], log: Path) -> None:
    code = 1
    handle = os.open(f"{log}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment(mode, rank, port))
    try:
        from tests.support import train_run

        train_run.run(spec, use_cpu=True)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(pids: list[int], deadline: float, due: Callable[[], bool] = lambda: False) -> list[int]:
    """Waits for the processes, killing all once `due`, at the deadline, or once one of them has failed. Returns their
    exit codes."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.time() > deadline or due() or any(codes.values()):
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def newest(out: Path) -> int:
    """Step of the newest checkpoint, whether it is complete or not."""
    return max((int(p.name.removeprefix("checkpoint-")) for p in out.glob("checkpoint-*")), default=0)


def random_moment(out: Path, calm: Path, rng: random.Random) -> Callable[[], bool]:
    """Whether the moment to kill a run has come."""
    seconds = (calm / "result.json").stat().st_mtime - (calm / "training").stat().st_mtime
    target, delay = newest(out) + rng.randrange(3), rng.uniform(0, seconds / newest(calm))
    reached: list[float] = []

    def due() -> bool:
        if not reached and newest(out) >= target:
            reached.append(time.time())
        return bool(reached) and time.time() > reached[0] + delay

    return due


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one job to its end; returns {"codes": exit codes of the last start, "kills": how many starts were killed,
    "steps": steps at the kills}."""
    out = Path(job["spec"]["out"])
    out.mkdir(parents=True, exist_ok=True)
    rng, kills, points = random.Random(job.get("seed", 0)), 0, []
    while kills < job.get("kills", 0):
        started = out / "training"
        started.unlink(missing_ok=True)
        pids = start(job["mode"], job["spec"], out / "log")
        limit = time.time() + job.get("timeout", 120)
        while not started.exists() and time.time() < limit and os.waitpid(pids[0], os.WNOHANG)[0] == 0:
            time.sleep(0.005)
        if not started.exists():
            return {"codes": finish(pids[1:], time.time()), "kills": kills, "points": points}
        codes = finish(pids, limit, random_moment(out, Path(job["paced_by"]), rng))
        if not any(codes):
            break
        kills += 1
        points.append(sorted(p.name for p in out.glob("checkpoint-*")))
    codes = finish(start(job["mode"], job["spec"], out / "log"), time.time() + job.get("timeout", 120))
    return {"codes": codes, "kills": kills, "points": points}


def main() -> None:
    import accelerate  # noqa: F401
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401

    from tests.support import train_run  # noqa: F401

    path = Path(sys.argv[1])
    path.with_suffix(".out").write_text(json.dumps([run_job(job) for job in json.loads(path.read_text())]))


if __name__ == "__main__":
    main()
