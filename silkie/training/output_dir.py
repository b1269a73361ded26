"""The directory that a run writes to: held by one run at a time, and known to take its checkpoints before it starts."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from silkie.io.posix import fcntl, resource
from silkie.training.checkpoints import CheckpointError, last_complete_checkpoint

logger = logging.getLogger(__name__)

# A name that transformers does not upload: closing a second handle of the file would give the lock up
LOCK = "_silkie_run.lock"
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# What libraries write into errors that carry no errno
_FULL_SIGNS = (
    "no space left on device",
    "disk quota exceeded",
    "file too large",
    "enforce fail at inline_container",
    "file write failed",
    "unexpected pos",
)


class OutputDirInUse(CheckpointError):
    """Another run writes to this directory."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The run that holds a directory: machine, process number, and when it took the directory."""

    host: str
    boot: str  # equal for the containers of one machine, whose host names differ
    pid: int
    since: str

    @classmethod
    def me(cls) -> Holder:
        boot = Path("/proc/sys/kernel/random/boot_id")
        named = boot.read_text().strip() if boot.exists() else ""
        return cls(platform.node(), named, os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def read(cls, handle: int) -> Holder | None:
        """Who wrote an open lock file; None where nobody has, or a kill came in between."""
        try:
            found = json.loads(os.pread(handle, 4096, 0))
            return cls(str(found["host"]), str(found["boot"]), int(found["pid"]), str(found["since"]))
        except (ValueError, KeyError, TypeError):
            return None

    def shares_machine(self, other: Holder) -> bool:
        """Whether the locks of one are visible to the other."""
        return self.host == other.host or bool(self.boot and self.boot == other.boot)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


class OutputLock:
    """Makes one run the only writer of a directory, by a lock on the file `_silkie_run.lock` in it.

    The kernel drops the lock when its process ends, however it ends. So a lock file that nobody has locked was left by
    a killed run of this machine, and is taken over. Not every file system shows the locks of other machines: a lock
    file that another machine has written is believed as it is.
    """

    held: ClassVar[set[Path]] = set()  # by this process, whose own locks the kernel does not hold against it

    def __init__(self, directory: str | Path) -> None:
        self.file = Path(directory).absolute() / LOCK
        self._handle: int | None = None

    def take(self, *, largest_file: int = 0, checkpoint: int = 0) -> None:
        """Takes the directory, makes it where there is none, and checks that it has room.

        Args:
            largest_file, checkpoint: as in `check_writable`.

        Raises:
            OutputDirInUse: another run holds it, or a run on another machine may; nothing was written.
            CheckpointError: it cannot be written, or is too small.
        """
        if self.file in self.held:
            raise self._in_use(Holder.me())
        with clear_disk_errors(self.file.parent):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lock()
        try:
            check_writable(self.file.parent, largest_file=largest_file, checkpoint=checkpoint)
        except CheckpointError:
            self.release()
            raise

    def _lock(self) -> None:
        while self._handle is None:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._claim(handle)
                # the run that held it may have removed the file after it was opened here
                if self.file.exists() and os.path.samestat(os.fstat(handle), self.file.stat()):
                    self._handle = handle
                    self.held.add(self.file)
            finally:
                if self._handle is None:
                    os.close(handle)

    def _claim(self, handle: int) -> None:
        """Locks the open file and writes this run into it."""
        me, visible = Holder.me(), True
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the data loader's processes
        except OSError as error:
            if error.errno not in (*_NO_LOCKS_HERE, errno.EACCES, errno.EAGAIN):
                raise
            if error.errno not in _NO_LOCKS_HERE:
                raise self._in_use(Holder.read(handle)) from None
            visible = False
        before = Holder.read(handle)
        if before is not None and not before.shares_machine(me):
            raise OutputDirInUse(
                f"{self.file.parent} is held by {before}. Where that run has ended without a word (a kill, a crash),"
                f" remove {self.file} and start again; otherwise choose another output_dir."
            )
        if before is not None and not visible and before.pid != me.pid and _alive(before.pid):
            raise self._in_use(before)
        if before is not None and before.pid != me.pid:
            logger.warning("%s: taking over from %s, which was killed", self.file.parent, before)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(me)).encode(), 0)

    def _in_use(self, holder: Holder | None) -> OutputDirInUse:
        return OutputDirInUse(
            f"{self.file.parent} is in use: {holder or 'another process'} writes its checkpoints there. Choose another"
            " output_dir, or end that run first."
        )

    def release(self) -> None:
        """Gives the directory back and removes the lock file."""
        if self._handle is not None:
            with suppress(OSError):  # a disk gone read-only; closing is what frees the directory
                self.file.unlink()
            os.close(self._handle)
            self._handle = None
            self.held.discard(self.file)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def check_free(directory: str | Path) -> None:
    """Checks, before anything is loaded, that a run can have the directory; makes it where there is none.

    Raises:
        CheckpointError: it cannot be written, or another run holds it.
    """
    lock = OutputLock(directory)
    lock.take()
    lock.release()


def check_writable(directory: str | Path, *, largest_file: int = 0, checkpoint: int = 0) -> None:
    """Checks that a checkpoint can be written to a directory.

    Args:
        largest_file: bytes of the largest file that the run is certain to write.
        checkpoint: bytes that a checkpoint takes at the least.

    Raises:
        CheckpointError: it cannot be written, is full, or is too small for one checkpoint.
    """
    directory = Path(directory)
    with clear_disk_errors(directory):
        probe = directory / f".silkie-probe-{os.getpid()}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        if limit != resource.RLIM_INFINITY and limit < largest_file:
            raise CheckpointError(
                f"This shell limits files to {_size(limit)} (`ulimit -f`), and a checkpoint in {directory} needs one of"
                f" {_size(largest_file)}. Raise the limit before you train."
            )
        if (free := shutil.disk_usage(directory).free) < checkpoint:
            raise CheckpointError(
                f"{directory} has {_size(free)} free, and a checkpoint takes {_size(checkpoint)} at the least. Free"
                " some space, or choose another output_dir, before you train."
            )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


@contextmanager
def clear_disk_errors(output_dir: str | Path) -> Iterator[None]:
    """Within the context, errors of a full or read-only disk are reported as such, with the last usable checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not (reason := _reason(error, Path(output_dir))):
            raise
        place = getattr(error, "filename", None) or output_dir
        last = last_complete_checkpoint(output_dir)
        kept = f"The last complete checkpoint is {last}" if last else "There is no complete checkpoint yet"
        raise CheckpointError(f"Cannot write to {place}: {reason[0]} ({error}). {kept}; {reason[1]}") from error


def _reason(error: Exception, output_dir: Path) -> tuple[str, str] | None:
    """Why nothing can be written, and the remedy; None for an error of another kind or another place."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG:
        return (
            "the disk is full, or this shell limits files",
            "free space or raise `ulimit -f`, then start the same command again.",
        )
    if number in _FULL or any(sign in str(error).lower() for sign in _FULL_SIGNS):
        return "the disk is full", "free some space and start the same command again."
    place = Path(str(getattr(error, "filename", None) or "")).absolute()
    if not (place.is_relative_to(output_dir.absolute()) or output_dir.absolute().is_relative_to(place)):
        return None
    if number in _READ_ONLY:
        return "it is read-only, or belongs to someone else", "choose an output_dir that this user can write to."
    if number in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        return "there is a file in the way, or no such place", "choose a directory as output_dir."
    return None
