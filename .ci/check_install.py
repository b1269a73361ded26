"""The pinned set resolves from the package index alone, on every supported Python and platform.

A machine's own pip configuration (a local wheel, an extra index, a constraint) can hide a pin that resolves nowhere
else; uv reads none of it. pip's own dry run is not used: it downloads every wheel, 3 GB with CUDA; `make test-install`
installs with pip. Nothing is installed here. `--write` writes constraints.txt anew.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin", "x86_64-pc-windows-msvc")
EXTRAS = ("report", "dev")
SDIST_ONLY = "deepspeed"  # everything else must have a wheel for each of them
COMPILE = ["pip", "compile", "pyproject.toml", "--all-extras", "--universal", "--python-version", "3.11"]
COMPILE += ["--no-emit-index-url", "--no-annotate", "-o", "constraints.txt"]
IN_ITS_HEAD = ["--custom-compile-command", " ".join(["uv", *COMPILE])]
# The pin that resolved on one machine only, by its local wheel of torch: the check has to refuse it.
BAD_PIN = "triton==3.9.0 ; sys_platform == 'linux'"


def index_alone() -> dict[str, str]:
    """The environment less what configures uv locally; the index's mirror and certificates stay."""
    stays = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_CACHE_DIR", "UV_HTTP_TIMEOUT", "UV_NATIVE_TLS")
    env = {k: v for k, v in os.environ.items() if not k.startswith("UV_") or k in stays}
    # uv asks for macOS 13 otherwise, and torch's wheels begin at 14
    return env | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}


def uv(*arguments: str) -> str | None:
    """What uv said on failing, or None. This Python builds what has no wheel; no other is looked for, nor fetched."""
    command = [
        sys.executable,
        "-m",
        "uv",
        *arguments,
        "--no-config",
        "--no-python-downloads",
        "--python",
        sys.executable,
    ]
    done = subprocess.run(command, cwd=ROOT, env=index_alone(), capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}"


def resolves(extra: str, python: str, platform: str, constraints: Path) -> str | None:
    command = ["pip", "compile", "pyproject.toml", "--quiet", "--only-binary", ":all:"]
    command += ["--no-binary", SDIST_ONLY, "--extra", extra, "--python-version", python, "--python-platform", platform]
    return uv(*command, "-c", str(constraints), "-o", os.devnull)


def up_to_date(constraints: Path) -> str | None:
    """constraints.txt is what uv writes for pyproject.toml's dependencies, with the versions pinned there."""
    pins = constraints.read_text()
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder, "constraints.txt")
        again.write_text(pins)
        failed = uv(*COMPILE[:-1], str(again), *IN_ITS_HEAD)
        if failed is None and again.read_text() != pins:
            failed = "pyproject.toml's dependencies and constraints.txt have come apart: `make constraints`"
    return failed


def say(what: str, attempt: Callable[[], str | None]) -> bool:
    started = time.perf_counter()
    failed = attempt()
    print(f"{'ok' if failed is None else 'FAILED'}  {what}  {time.perf_counter() - started:.1f} s", flush=True)
    if failed:
        print("    " + failed.replace("\n", "\n    "), flush=True)
    return failed is None


def check(constraints: Path) -> bool:
    """Every extra on every supported Python and platform; side by side, as most of the time is the index's."""
    jobs: list[tuple[str, Callable[[], str | None]]] = []
    for extra, python, platform in itertools.product(EXTRAS, PYTHONS, PLATFORMS):
        jobs.append((f"{extra:6} {python} {platform}", partial(resolves, extra, python, platform, constraints)))
    jobs.append(("constraints.txt is what uv writes", partial(up_to_date, constraints)))
    jobs.append((f"control: {BAD_PIN} is refused", partial(refuses_bad_pin, constraints)))
    with ThreadPoolExecutor(4) as pool:
        return all([*pool.map(lambda job: say(*job), jobs)])


def refuses_bad_pin(constraints: Path) -> str | None:
    """The negative control: a pin that torch's own requirement rules out must not resolve."""
    with tempfile.TemporaryDirectory() as folder:
        bad = Path(folder, "constraints.txt")
        pins = [line for line in constraints.read_text().splitlines() if not line.startswith("triton==")]
        bad.write_text("\n".join([*pins, BAD_PIN, ""]))
        refused = resolves("report", "3.12", PLATFORMS[0], bad)
    return None if refused is not None and "triton" in refused else f"it was not: {refused}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt", help="check another file's pins")
    parser.add_argument("--write", action="store_true", help="write constraints.txt with uv; other options go to uv")
    args, others = parser.parse_known_args()
    if args.write:
        failed = uv(*COMPILE, *others, *IN_ITS_HEAD)
        sys.exit(failed)
    if others:
        parser.error(f"unknown: {' '.join(others)}")
    fine = check(args.constraints.resolve())
    sys.exit(None if fine else f"{args.constraints.name} does not resolve from the package index alone")


if __name__ == "__main__":
    main()
