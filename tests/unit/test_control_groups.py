"""The memory that a container's or a job's control groups leave to a process."""

import pytest
import torch

from silkie.io.control_groups import memory_left
from silkie.plan import checkpointing

GIB = 1 << 30


def tree(root, files, membership):
    for name, text in files.items():
        (root / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "fs" / name).write_text(f"{text}\n")
    (root / "cgroup").write_text(membership)
    return root / "fs", root / "cgroup"


def v2(folder, limit, used, cached=0):
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": used,
        f"{folder}memory.stat": f"anon 5\ninactive_file {cached}",
    }


def v1(folder, limit, used, cached=0):
    return {
        f"memory/{folder}memory.limit_in_bytes": limit,
        f"memory/{folder}memory.usage_in_bytes": used,
        f"memory/{folder}memory.stat": f"inactive_file 1\ntotal_inactive_file {cached}",
    }


@pytest.mark.parametrize(
    ("files", "membership", "left"),
    [
        ({}, "0::/\n", float("inf")),
        (v2("", 4 * GIB, GIB), "0::/\n", 3 * GIB),  # a container sees its own group as the root
        # a job of Slurm or systemd has a group inside others; the root has no files
        (v2("slurm/job_7/", 4 * GIB, GIB), "0::/slurm/job_7/step_0\n", 3 * GIB),
        (v2("a/b/", 8 * GIB, GIB) | v2("a/", 6 * GIB, 5 * GIB), "0::/a/b\n", GIB),  # the tightest of them
        (v2("a/b/", "max", GIB) | v2("a/", 6 * GIB, 2 * GIB), "0::/a/b\n", 4 * GIB),
        (v2("a/", 6 * GIB, 5 * GIB, cached=2 * GIB), "0::/a\n", 3 * GIB),  # pages of files are given back
        (v2("a/", GIB, 2 * GIB), "0::/a\n", 0.0),
        (v1("job/", 4 * GIB, 2 * GIB, cached=GIB), "4:memory:/job\n1:cpu:/\n0::/\n", 3 * GIB),
        (v1("", 4 * GIB, GIB), "4:memory:/docker/0a1b\n0::/\n", 3 * GIB),  # mounted at its own group
        (v2("other/", GIB, 0), "0::/a\n", float("inf")),
    ],
)
def test_what_the_groups_of_a_process_leave(tmp_path, files, membership, left):
    assert memory_left(*tree(tmp_path, files, membership)) == left


def test_a_system_without_control_groups_has_no_limit(tmp_path):
    assert memory_left(tmp_path / "fs", tmp_path / "cgroup") == float("inf")


def test_free_memory_is_that_of_the_job(monkeypatch):
    monkeypatch.setattr(checkpointing, "memory_left", lambda: 3.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert checkpointing.free_memory(torch.device("cpu")) == 3.0
