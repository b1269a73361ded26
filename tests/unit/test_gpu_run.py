"""`make gpu`: a stage that hangs, fails or writes nonsense never loses the others."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_run.py"
# Leaves a process behind that outlives it, and writes that process's number into the folder.
HANGS = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1], "child").write_text(str(child.pid))
time.sleep(600)
"""


@pytest.fixture
def gpu_run(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)
    spec.loader.exec_module(module)
    return module


def stage(module, folder, name, code, **more):
    script = folder / f"{name}.py"
    script.write_text(code)
    return module.Stage(name, "", f"{script} OUT", 60, **more)


def alive(process):
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_stage_that_hangs_ends_with_all_that_it_started(gpu_run, tmp_path):
    outcome = gpu_run.run_stage(stage(gpu_run, tmp_path, "hangs", HANGS), tmp_path, 3, rehearse=True)
    assert outcome.state == "cut off after 3 s"
    child, ends = int((tmp_path / "child").read_text()), time.monotonic() + 10
    while alive(child) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not alive(child)


def test_every_stage_is_saved_and_shown(gpu_run, tmp_path, monkeypatch, capsys):
    stages = (
        stage(gpu_run, tmp_path, "fails", "raise SystemExit(3)"),
        stage(gpu_run, tmp_path, "nonsense", "print('{')", writes=None),
        stage(gpu_run, tmp_path, "works", "print('{\"peak GiB\": 2.5}')"),
    )
    monkeypatch.setattr(gpu_run, "STAGES", stages)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--rehearse", "--out", str(tmp_path)])
    assert gpu_run.main() == 1
    saved = {s.name: json.loads((tmp_path / f"gpu_{s.name}.json").read_text()) for s in stages}
    assert saved["fails"]["state"] == "failed (exit code 3)"
    assert saved["nonsense"]["state"] == "done" and saved["nonsense"]["figures"] is None
    assert saved["works"]["figures"] == {"peak GiB": 2.5}
    table = (tmp_path / "gpu.md").read_text()
    assert "peak GiB 2.5" in table and "seconds in all" in table and "s in all" in capsys.readouterr().out


def test_no_time_left_is_said(gpu_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "STAGES", (stage(gpu_run, tmp_path, "late", "print(1)"),))
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--rehearse", "--budget", "1", "--out", str(tmp_path)])
    assert gpu_run.main() == 1
    assert json.loads((tmp_path / "gpu_late.json").read_text())["state"] == "not begun: no time left"
