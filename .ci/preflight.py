"""Say in one line, before pip starts, what would stop an installation.

Standard library and Python 3.6 syntax only, since whatever Python there is runs it:

preflight.py machine VENV NEED_GB   this Python's version, its venv module, free disk where VENV will be
preflight.py index [URL]            pip finds its package index, or torch on the index at URL
"""

import os
import subprocess
import sys

OLDEST = (3, 11)
TESTED = "3.11, 3.12 and 3.13"


def machine(venv: str, need_gb: str) -> "str | None":
    """Why this Python on this disk cannot hold the environment, or None."""
    if sys.version_info < OLDEST:
        found = ".".join(map(str, sys.version_info[:2]))
        return f"Python {found} is too old: silkie runs on {TESTED}. Name another: make PYTHON=python3.12 ..."
    import importlib.util
    import shutil

    if importlib.util.find_spec("ensurepip") is None:
        return f"{sys.executable} cannot make virtual environments: install its venv package (Debian: python3-venv)."
    folder = os.path.abspath(venv)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / 1e9
    if free < float(need_gb):
        return f"Too little disk at {folder}: {free:.1f} GB free, {need_gb} GB needed (TORCH=cpu, without CUDA: 4)."
    return None


def index(url: "str | None" = None) -> "str | None":
    """Why pip cannot get packages, or None. pip itself is asked: it knows its mirrors, proxies and certificates."""
    package = "torch" if url else "transformers"
    ask = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    ask += ["index", "versions", package] + (["--index-url", url] if url else [])
    answer = subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if answer.returncode == 0:
        return None
    words = (answer.stdout.strip().splitlines() or ["no answer"])[-1]
    if url:
        return f"No torch at {url} ({words}). Name a mirror that has the CPU build: make TORCH=cpu TORCH_INDEX=URL ..."
    return (
        f"No network: pip reaches no package index ({words}). A proxy or mirror is set by PIP_PROXY or PIP_INDEX_URL."
    )


if __name__ == "__main__":
    problem = {"machine": machine, "index": index}[sys.argv[1]](*sys.argv[2:])
    if problem:
        sys.exit("silkie cannot be installed: " + problem)
