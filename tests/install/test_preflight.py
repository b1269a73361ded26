"""What stops an installation is said in one line before pip starts, and `make` asks for what was chosen."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "preflight.py"


@pytest.fixture
def preflight():
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(*args: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    env = clean | {"PIP_CONFIG_FILE": os.devnull} | env
    return subprocess.run([sys.executable, str(SCRIPT), *args], env=env, capture_output=True, text=True, timeout=120)


def simple_index(folder: Path, *packages: str) -> str:
    """A package index of files: one empty wheel per package."""
    for package in packages:
        (folder / package).mkdir(parents=True)
        wheel = folder / package / f"{package}-1.0-py3-none-any.whl"
        wheel.touch()
        (folder / package / "index.html").write_text(
            f'<!DOCTYPE html><html><body><a href="{wheel.as_uri()}">{wheel.name}</a></body></html>'
        )
    return folder.as_uri()


def test_an_old_python_reads_the_script_and_is_named(preflight, monkeypatch, tmp_path):
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    message = preflight.machine(str(tmp_path), "0")
    assert "Python 3.10 is too old" in message and "PYTHON=" in message and "\n" not in message


def test_the_oldest_python_is_that_of_pyproject(preflight):
    assert f'requires-python = ">={preflight.OLDEST[0]}.{preflight.OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_too_little_disk_is_named_with_both_figures(tmp_path):
    answer = ask("machine", str(tmp_path / "not" / "there"), "1000000")
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1
    assert f"Too little disk at {tmp_path}: " in answer.stderr and "1000000 GB needed" in answer.stderr


def test_a_python_without_its_venv_package_is_named(preflight, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find(name))
    assert "cannot make virtual environments" in preflight.machine(str(tmp_path), "0")


def test_a_machine_that_can_hold_it_passes_in_silence(tmp_path):
    answer = ask("machine", str(tmp_path / "venv"), "0.000001")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not (tmp_path / "venv").exists()


def test_no_network_is_one_line():
    answer = ask("index", PIP_INDEX_URL="http://127.0.0.1:9/simple")  # nothing listens on the discard port
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1
    assert "No network: pip reaches no package index" in answer.stderr


def test_an_index_that_has_the_packages_passes(tmp_path):
    url = simple_index(tmp_path, "transformers", "torch")
    assert ask("index", PIP_INDEX_URL=url).returncode == 0
    assert ask("index", url, PIP_INDEX_URL="http://127.0.0.1:9/simple").returncode == 0


def test_an_index_without_torch_is_named(tmp_path):
    url = simple_index(tmp_path, "transformers")
    answer = ask("index", url)
    assert answer.returncode == 1 and f"No torch at {url}" in answer.stderr and "TORCH_INDEX=" in answer.stderr


def dry_make(*args: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("TORCH", "TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", "-n", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_torch_cpu_takes_torch_from_its_own_index_and_nothing_else():
    for target in ("demo", "test"):
        lines = dry_make(
            target, "TORCH=cpu", "TORCH_INDEX=https://mirror.example/cpu", "VENV=.nowhere"
        ).stdout.splitlines()
        from_mirror = [line for line in lines if "--index-url https://mirror.example/cpu" in line]
        assert len(from_mirror) == 1 and "-c constraints.txt" in from_mirror[0] and "--no-deps" in from_mirror[0]
        assert from_mirror[0].endswith(" torch")
        assert lines.index(from_mirror[0]) < next(i for i, line in enumerate(lines) if " -e " in line)
        assert "--index-url" not in dry_make(target, "VENV=.nowhere").stdout


def test_another_torch_is_refused():
    answer = dry_make("demo", "TORCH=gpu")
    assert answer.returncode != 0 and "TORCH=cpu" in answer.stderr


def test_the_pins_name_no_index_and_no_local_build():
    pins = (ROOT / "constraints.txt").read_text()
    assert "://" not in pins and "+" not in pins and " @ " not in pins
