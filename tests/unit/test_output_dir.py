"""One run writes to a directory, and knows before it trains that a checkpoint will fit."""

import errno
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from silkie.training import output_dir
from silkie.training.checkpoints import CheckpointError
from silkie.training.output_dir import LOCK, OutputDirInUse, OutputLock, check_free, check_writable

HOLD = """
import sys
from silkie.training.output_dir import OutputLock
OutputLock(sys.argv[1]).take()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("module", ["silkie.trainer", "silkie.run.rounds.loop"])
def test_a_system_without_posix_locks_is_named(module):
    """Windows: where to go instead, not a traceback about fcntl."""
    script = f"import sys; sys.modules['fcntl'] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr.splitlines()[-1].startswith("ImportError: silkie trains on Linux and macOS")


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path, other_run, caplog):
    """ATTACKS 13: two runs in one output_dir."""
    held = (tmp_path / LOCK).read_bytes()
    with pytest.raises(OutputDirInUse, match=rf"in use: process {other_run.pid} on .* \(since 2.*another output_dir"):
        check_free(tmp_path)
    assert (tmp_path / LOCK).read_bytes() == held and os.listdir(tmp_path) == [LOCK]
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    assert (tmp_path / LOCK).exists()  # nobody removed it
    check_free(tmp_path)
    assert f"taking over from process {other_run.pid}" in caplog.text and not os.listdir(tmp_path)


def test_a_lock_of_another_machine_is_believed(tmp_path):
    """ATTACKS 13: whether that run is alive cannot be seen from here."""
    (tmp_path / LOCK).write_text(json.dumps({"host": "node7", "boot": "b", "pid": 1, "since": "yesterday"}))
    with pytest.raises(
        OutputDirInUse, match=rf"process 1 on node7 \(since yesterday\).*remove .*{LOCK} and start again"
    ):
        check_free(tmp_path)
    assert "node7" in (tmp_path / LOCK).read_text()


def test_two_runs_of_one_process_do_not_share_a_directory(tmp_path):
    lock = OutputLock(tmp_path)
    lock.take()
    with pytest.raises(OutputDirInUse):
        OutputLock(tmp_path).take()
    lock.release()
    check_free(tmp_path)


@pytest.mark.parametrize("alive", [True, False])
def test_where_the_disk_knows_no_locks_the_process_is_looked_for(tmp_path, monkeypatch, alive):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    OutputLock(tmp_path).take()
    OutputLock.held.clear()
    me = json.loads((tmp_path / LOCK).read_text())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / LOCK).write_text(json.dumps({**me, "pid": os.getppid() if alive else gone.pid}))
    if alive:
        with pytest.raises(OutputDirInUse, match=str(os.getppid())):
            OutputLock(tmp_path).take()
    else:
        check_free(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_an_unreadable_lock_file_that_nobody_holds_stops_nothing(tmp_path, content, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / LOCK).write_text(content)
    check_free(tmp_path)
    assert not caplog.text and not os.listdir(tmp_path)


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch):
    """ATTACKS 21: raw errors for a read-only output_dir and a limit on file sizes."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="Cannot write to .*file.*choose a directory as output_dir"):
            check_free(place)

    original = output_dir.Path.open

    def read_only(self, *args, **kwargs):
        if "probe" in self.name:
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="read-only.*choose an output_dir"):
        patch.setattr(output_dir.Path, "open", read_only)
        check_free(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match=r"0\.00 MiB free.*takes 9\.54 MiB"):
        patch.setattr(output_dir.shutil, "disk_usage", lambda place: SimpleNamespace(free=100))
        check_writable(tmp_path, checkpoint=10_000_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(CheckpointError, match="limits files.*ulimit -f"):
            check_writable(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        check_writable(tmp_path, largest_file=8000)
        with pytest.raises(CheckpointError, match="limits files to .*ulimit -f"):
            check_writable(tmp_path, largest_file=8001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_of_someone_else(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="read-only, or belongs to someone else"):
        check_free(tmp_path)


def test_errors_of_other_places_pass_unchanged(tmp_path):
    with pytest.raises(PermissionError), output_dir.clear_disk_errors(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data.jsonl"))
