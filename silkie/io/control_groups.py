"""What the control groups of this process (containers, Slurm and systemd jobs) leave of a machine, on Linux."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MOUNT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# Version of control groups -> its files of the limit and the use of memory, and the name of the use that goes first
# when memory is short: pages of files that were read.
_MEMORY = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def memory_left(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> float:
    """Bytes that this process can still take before one of its groups, or of those around them, is full; infinite
    where none sets a limit."""
    left = float("inf")
    for version, folder in own_groups("memory", mount, membership):
        limit_file, used_file, cache_name = _MEMORY[version]
        try:
            limit = (folder / limit_file).read_text().strip()
            used = float((folder / used_file).read_text())
            if limit != "max":
                left = min(left, float(limit) - used + _cache(folder, cache_name))
        except (OSError, ValueError):
            continue  # the root of version 2 has no such files; a group may be out of sight from inside a container
    return max(left, 0.0)


def _cache(folder: Path, name: str) -> float:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def own_groups(controller: str, mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> Iterator[tuple[int, Path]]:
    """(version, folder) of the groups of this process that control `controller`, from its own up to the root."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        root = mount / controllers if version == 1 else mount
        folder = root / own.lstrip("/")
        for place in (folder, *folder.parents):
            yield version, place
            if place == root:
                break
