"""The processes that prepare data: how many there are, how they fail, what ends them."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from silkie import SilkieDPOConfig
from silkie.batch import workers
from silkie.batch.workers import BatchError, Named, WorkerDied, explained_deaths, worker_options
from silkie.data.images import open_image


@pytest.fixture
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(workers, "cores", lambda: 16)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize("ranks, expected", [(None, 8), ("2", 7), ("4", 3), ("8", 1), ("16", 0), ("32", 0)])
def test_ranks_share_the_cores(sixteen_cores, monkeypatch, ranks, expected):
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert workers.data_workers() == expected


def test_the_number_is_chosen_unless_it_is_given(sixteen_cores, tmp_path):
    def number(**options):
        return SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options).dataloader_num_workers

    assert (number(), number(dataloader_num_workers=3), number(dataloader_num_workers=0)) == (8, 3, 0)


def test_preparation_takes_no_process_for_a_few_groups(sixteen_cores):
    assert [workers.preparation_processes(n, None) for n in (0, 1000, 4096, 80_000)] == [1, 1, 8, 16]
    assert workers.preparation_processes(80_000, 3) == 3


@pytest.mark.parametrize(
    "limits, expected", [({}, None), ({"": "max 100000"}, None), ({"a/b": "250000 100000", "a": "max 1"}, 2.5)]
)
def test_a_container_quota_bounds_the_cores(tmp_path, limits, expected):
    (tmp_path / "cgroup").write_text("0::/a/b\n")
    for place, text in limits.items():
        (tmp_path / "fs" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / place / "cpu.max").write_text(text)
    assert workers._quota(tmp_path / "fs", tmp_path / "cgroup") == expected


def test_a_quota_of_version_1_bounds_the_cores(tmp_path):
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/job\n3:memory:/other\n0::/\n")
    for place, quota in (("", -1), ("job", 150000)):
        (tmp_path / "cpu,cpuacct" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "cpu,cpuacct" / place / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu,cpuacct" / place / "cpu.cfs_period_us").write_text("100000\n")
    assert workers._quota(tmp_path, tmp_path / "cgroup") == 1.5


def test_cores_are_those_of_this_process():
    assert 1 <= workers.cores() <= len(os.sched_getaffinity(0))


def loader(rows, collate, number):
    args = SimpleNamespace(dataloader_num_workers=number, dataloader_prefetch_factor=None)
    return DataLoader(rows, batch_size=1, collate_fn=Named(collate), **worker_options(args, len(rows)))


def decode(rows):
    return [open_image({"path": row["path"], "bytes": None}, where=f"row {row['row']}").size for row in rows]


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_names_row_and_file(tmp_path, number):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [{"row": 7, "path": str(tmp_path / "broken.png")}]
    with pytest.raises(BatchError) as caught:
        list(loader(rows, decode, number))
    assert str(caught.value).startswith(f"row 7: '{tmp_path}/broken.png' is not an image")
    assert "\n" not in str(caught.value)
    assert bool(getattr(caught.value, "__notes__", [])) == bool(number)  # the worker's traceback


def test_an_unforeseen_error_names_its_rows():
    with pytest.raises(BatchError, match=r"^row 3, id 'x': cannot be encoded: ZeroDivisionError: "):
        Named(lambda rows: 1 // 0)([{"row": 3, "id": "x"}])


def test_no_more_workers_than_batches():
    args = SimpleNamespace(dataloader_num_workers=8, dataloader_prefetch_factor=4)
    assert worker_options(args, 3)["num_workers"] == 3 and worker_options(args, 0) == {}


def die(rows):
    if rows[0]["row"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows[0]["row"]


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_no_hang():
    with pytest.raises(WorkerDied, match="ended from outside.*dataloader_num_workers"), explained_deaths():
        list(loader([{"row": n} for n in range(6)], die, 2))


def whose(rows):
    time.sleep(0.3)  # the signal comes while a batch is being made
    return rows[0]["row"], os.getpid()


@pytest.mark.timeout(60)
def test_signals_of_a_job_do_not_end_a_worker_but_its_main_process_does():
    """A preempted job gets SIGTERM in every process, and the step under way needs its batches."""
    batches = iter(loader([{"row": n} for n in range(6)], whose, 1))
    _, worker = next(batches)
    other = os.fork()  # a process that is not the worker's parent
    if not other:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
        os._exit(0)
    os.waitpid(other, 0)
    assert [row for row, _ in batches] == [1, 2, 3, 4, 5]

    batches = iter(loader([{"row": n} for n in range(6)], whose, 1))
    _, worker = next(batches)
    os.kill(worker, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while batches._workers[0].is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)
