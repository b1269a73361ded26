"""The Dockerfile names what is in the repository and in the pinned set. No image is built here."""

import json
import re
import tomllib
from pathlib import Path

from silkie.__main__ import PROGRAMS

ROOT = Path(__file__).resolve().parents[2]
LINES = re.sub(r"\\\n\s*", " ", (ROOT / "recipes/docker/Dockerfile").read_text()).splitlines()


def _arguments(instruction: str) -> list[str]:
    return [line.partition(" ")[2] for line in LINES if line.startswith(instruction + " ")]


def test_what_is_copied_and_started_exists():
    sources = [word for copy in _arguments("COPY") for word in copy.split()[1:-1]]
    assert "pyproject.toml" in sources and all((ROOT / source).exists() for source in sources)
    program, name = json.loads(_arguments("CMD")[0])
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert program in scripts and name in PROGRAMS


def test_the_pinned_set_is_installed_with_extras_that_exist():
    (install,) = [run for run in _arguments("RUN") if "pip install" in run]
    extras = re.search(r'"\.\[([\w,]+)\]"', install)[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "-c constraints.txt" in install and set(extras) <= set(known)


def test_cuda_is_that_of_the_pinned_torch():
    (base,) = _arguments("FROM")
    pinned = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert base.startswith(f"nvidia/cuda:{pinned}.")


def test_the_container_does_not_run_as_root():
    users = [index for index, line in enumerate(LINES) if line.startswith("USER ")]
    assert LINES[users[-1]] == "USER silkie"
    assert not [line for line in LINES[users[-1] :] if "apt-get" in line or "sudo" in line]
