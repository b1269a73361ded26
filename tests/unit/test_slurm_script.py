"""The Slurm script with stand-ins for Slurm's commands: what it launches, and what it does about a signal."""

import os
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
while [[ $1 = --* ]]; do [[ $1 = --cpus-per-task ]] && shift; shift; done
SLURM_NODEID=1 exec "$@"
"""
# The run ends when told to, with the code 1 that accelerate makes of any error, or by itself.
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" > "$LOG/launched"
for _ in $(seq "$TENTHS"); do [[ -e $OUT/stop && -z $DEAF ]] && exit 1; sleep 0.1; done
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
if [[ $1 = show ]]; then echo node1; echo node2; else echo "$@" >> "$LOG/calls"; fi
"""


def run(tmp_path, *, stale=False, told=False, **env):
    out = tmp_path / "out dir"
    out.mkdir()
    for name, text in (("srun", SRUN), ("accelerate", ACCELERATE), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    if stale:
        (out / "stop").touch()
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_PER_TASK": "64",
    }
    defaults = {
        "TENTHS": "1",
        "CODE": "0",
        "DEAF": "",
        "OUT": str(out),
        "LOG": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    command = ["bash", "recipes/slurm/train.sbatch", "--output_dir", str(out), "--name", "it's $x"]
    job = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **slurm, **defaults, **env})
    if told:
        while not (tmp_path / "launched").exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    code = job.wait(timeout=30)
    requeued = (tmp_path / "calls").exists() and (tmp_path / "calls").read_text() == "requeue 123456\n"
    assert not (out / "stop").exists()
    return code, requeued, (tmp_path / "launched").read_text().splitlines()


def test_one_launcher_per_machine_over_all_gpus(tmp_path):
    code, requeued, words = run(tmp_path, stale=True)  # a stop file that an earlier job left stops nothing
    assert (code, requeued) == (0, False)
    options = dict(pairwise(words))
    assert (
        options["--config_file"] == "recipes/accelerate/multinode_zero3.yaml"
        and options["--main_process_ip"] == "node1"
    )
    assert (options["--num_machines"], options["--num_processes"], options["--machine_rank"]) == ("2", "16", "1")
    assert options["--output_dir"].endswith("out dir") and options["--name"] == "it's $x"


@pytest.mark.parametrize(
    ("told", "env", "code", "requeued"),
    [
        (True, {"TENTHS": "200"}, 0, True),
        (True, {"TENTHS": "15", "DEAF": "1"}, 0, False),
        (False, {"CODE": "3"}, 3, False),
    ],
    ids=["preempted", "finished all the same", "failed"],
)
def test_only_a_preempted_job_is_put_back_in_the_queue(tmp_path, told, env, code, requeued):
    assert run(tmp_path, told=told, **env)[:2] == (code, requeued)


def test_it_needs_an_output_directory(tmp_path):
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "node1"}
    done = subprocess.run(
        ["bash", "recipes/slurm/train.sbatch", "--output_dir"], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == 2 and "pass --output_dir" in done.stderr
