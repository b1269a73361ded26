"""Everything that only a GPU can tell, in one command, stage by stage: `make gpu`, or `make gpu REHEARSE=1` without one.

    python tests/benchmarks/gpu_run.py                 # one CUDA device, under nine minutes
    python tests/benchmarks/gpu_run.py --rehearse      # no device: tiny sizes on the CPU, the same stages
    python tests/benchmarks/gpu_run.py --only step tests

Each stage is a process with a time limit, which ends with all that it started, and is saved as it ends, into
`gpu_<stage>.json` of --out; `gpu.md` there is rewritten after each. A stage that fails, hangs or for which no time is
left is in the table with its reason, and the others run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUDGET = 520  # seconds, under nine minutes


@dataclass(slots=True, frozen=True)
class Stage:
    """A process of the run.

    Attributes:
        command, rehearsal: words after the interpreter, with a device and without one; OUT stands for the folder.
        seconds: its limit.
        writes: file of figures that it leaves in OUT, if any.
        interpreted: the rehearsal runs Triton's kernels under its interpreter.
    """

    name: str
    command: str
    rehearsal: str
    seconds: int
    writes: str | None = None
    interpreted: bool = False


PRECOMPUTED = "'packed + precomputed reference'"


def _step(name: str, shape: str, seconds: int) -> Stage:
    """A step against TRL, in bf16, of random weights of a size."""
    words = f"tests/benchmarks/bench_step.py --out OUT --name gpu_{name}_data --repeats 1 --image-tokens"
    return Stage(
        name,
        f"{words} 576 --device cuda --shape {shape} --ks 4 --timed 2 --contenders TRL packed {PRECOMPUTED}",
        f"{words} 16 --ks 2 --timed 1 --contenders TRL packed {PRECOMPUTED}",
        seconds,
        f"gpu_{name}_data.json",
    )


def _own(name: str, seconds: int) -> Stage:
    script = f"tests/benchmarks/gpu_stages.py {name}"
    return Stage(name, script, f"{script} --rehearse", seconds)


STAGES = (
    Stage("tests", "-m pytest tests/gpu -q -m gpu", "-m pytest tests/gpu -q -rs", 110),
    Stage(
        "logprob",
        "tests/benchmarks/bench_logprob.py --device cuda --repeats 5 --out OUT",
        "tests/benchmarks/bench_logprob.py --device cpu --n 64 --vocab 512 --dims 32 --dtypes float32 --repeats 1"
        " --no-memory --out OUT",
        70,
        "logprob_DEVICE.json",
        True,
    ),
    _step("step_3b", "3b", 110),
    _own("largest", 60),
    _own("planner", 45),
    _own("qlora", 50),
    _own("zero3", 50),
    _step("step_0.5b", "0.5b", 60),
)


@dataclass(slots=True)
class Outcome:
    """What came of a stage. `figures`: its own, as its process wrote or printed them."""

    stage: str
    state: str
    seconds: float
    command: str
    output: str
    figures: Any = None


def run_stage(stage: Stage, out: Path, limit: float, *, rehearse: bool) -> Outcome:
    """Runs one stage to its end or its limit, and saves what came of it."""
    words = [w.replace("OUT", str(out)) for w in shlex.split(stage.rehearsal if rehearse else stage.command)]
    shown = "python " + (stage.rehearsal if rehearse else stage.command)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if rehearse:
        env |= {"OMP_NUM_THREADS": "1"}
        env |= {"TRITON_INTERPRET": "1"} if stage.interpreted else {}
    began = time.monotonic()
    log = out / f"gpu_{stage.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            state = "done" if not code else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            state = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    text = log.read_text(errors="replace")
    log.unlink()
    outcome = Outcome(stage.name, state, time.monotonic() - began, shown, text[-4000:], _figures(stage, out, text))
    save(outcome, out)
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage with all that it started: a process that it left behind would hold memory of the device."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(stage: Stage, out: Path, text: str) -> Any:
    """A stage's own file, or the last line of JSON that it printed."""
    if stage.writes is not None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        file = out / stage.writes.replace("DEVICE", device)
        text = file.read_text().replace("\n", "") if file.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:  # cut off while it was written
        return None


def save(outcome: Outcome, out: Path) -> None:
    facts = {"date": date.today().isoformat(), "device": device(), "python": platform.python_version()}
    (out / f"gpu_{outcome.stage}.json").write_text(json.dumps({**facts, **asdict(outcome)}, indent=1) + "\n")


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: a rehearsal"


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a line per stage, and the seconds of all."""
    lines = [f"# {device()}, torch {torch.__version__}, {date.today().isoformat()}", ""]
    lines += ["| stage | state | seconds | what it says |", "|---|---|---|---|"]
    lines += [f"| {o.stage} | {o.state} | {o.seconds:.0f} | {says(o)} |" for o in outcomes]
    return "\n".join([*lines, "", f"{sum(o.seconds for o in outcomes):.0f} seconds in all."]) + "\n"


def says(outcome: Outcome) -> str:
    """A stage in a few words, from its figures; its last line of output where it has none."""
    figures = outcome.figures
    if outcome.stage.startswith("step") and figures:
        speed = {r["contender"]: r["pairs_per_second"] for r in figures["results"]}
        return "; ".join(f"{name} {value:.3g} pairs/s" for name, value in speed.items())
    if outcome.stage == "logprob" and figures:
        return "see its file"
    if isinstance(figures, dict):
        return "; ".join(f"{name} {value}" for name, value in figures.items())
    lines = [line for line in outcome.output.splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:200] if lines else "nothing"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="no device: tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="these stages")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all stages")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no CUDA device: --rehearse (make gpu REHEARSE=1) runs the same stages with tiny sizes")
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    ends, outcomes = time.monotonic() + args.budget, []
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        left = ends - time.monotonic()
        if left < 10:
            outcomes.append(Outcome(stage.name, "not begun: no time left", 0.0, "", ""))
            save(outcomes[-1], out)
        else:
            limit = left if args.rehearse else min(stage.seconds, left)
            outcomes.append(run_stage(stage, out, limit, rehearse=args.rehearse))
        print(f"{stage.name}: {outcomes[-1].state}, {outcomes[-1].seconds:.0f} s: {says(outcomes[-1])}", flush=True)
        (out / "gpu.md").write_text(table(outcomes))
    print(f"{sum(o.seconds for o in outcomes):.0f} s in all; {out / 'gpu.md'}")
    return int(any(o.state != "done" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
