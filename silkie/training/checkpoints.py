"""Crash-safe checkpoints: each one is either complete or ignored, whatever killed the run while it was written.

A checkpoint is complete once it holds `silkie_complete.json`, which lists every file with its size and hash, is written
last and is put in place by a rename. Older checkpoints are deleted only after that. Checkpoints of later steps that are
already in the directory belong to a killed run, or to another run that is not being resumed: they never cause a new one
to be deleted, and they are marked unusable as soon as there is one."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

COMPLETE = "silkie_complete.json"
STATE = "silkie_state.json"
_STATE_TYPES = {"objective": dict, "train_tokens": int, "processes": int, "identity": dict}
_HASHED_AT_ONCE = 8  # hashing releases the interpreter's lock; more readers than this only make a disk seek


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read."""


def clear_place(checkpoint: str | Path) -> None:
    """Removes what is in the place of a checkpoint about to be written: what a killed run left, or an older checkpoint
    of the same step. Its completeness marker goes first, so that a kill in between leaves nothing that looks whole."""
    path = Path(checkpoint)
    (path / COMPLETE).unlink(missing_ok=True)
    if path.exists():
        shutil.rmtree(path)


def mark_complete(checkpoint: str | Path) -> None:
    """Flushes a checkpoint to the disk and declares it complete. Call it once every rank has written its part."""
    path = Path(checkpoint)
    names = [str(f.relative_to(path)) for f in sorted(path.rglob("*")) if f.is_file() and f.name != COMPLETE]

    def seal(name: str) -> dict[str, Any]:
        _flush(path / name)
        return {"bytes": (path / name).stat().st_size, "sha256": _sha256(path / name)}

    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        files = dict(zip(names, pool.map(seal, names), strict=True))
    # A rename is atomic, so the marker is there whole or not at all.
    part = path / (COMPLETE + ".part")
    with part.open("w") as file:
        json.dump({"files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / COMPLETE)
    _flush(path)


def _flush(path: Path) -> None:
    """Forces a file to the disk, so that a power loss cannot keep the marker and lose a file that it lists."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(slots=True, frozen=True)
class _Sealed:
    """A file as the manifest lists it; no hash in manifests of silkie 0.1."""

    name: str
    size: int
    sha256: str | None

    def problem(self, checkpoint: Path, *, hashes: bool) -> str | None:
        """What is wrong with the file, or None."""
        path = checkpoint / self.name
        try:
            if not path.is_file():
                return f"its file {self.name} is missing"
            if (found := path.stat().st_size) != self.size:
                return f"its file {self.name} has {found} bytes, not {self.size}"
            if hashes and self.sha256 is not None and _sha256(path) != self.sha256:
                return f"its file {self.name} has changed since it was written (its hash differs)"
        except OSError as error:
            return f"its file {self.name} cannot be read ({error})"
        return None


def _manifest(checkpoint: Path) -> list[_Sealed]:
    """The files that a checkpoint was complete with.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError: the manifest is damaged.
    """
    entries = json.loads((checkpoint / COMPLETE).read_text())["files"]
    files = []
    for name, entry in entries.items():
        size, sha256 = (entry, None) if isinstance(entry, int) else (entry["bytes"], entry["sha256"])
        if not isinstance(size, int) or not isinstance(sha256, str | None):
            raise TypeError(f"the entry of {name} is {entry!r}")
        files.append(_Sealed(name, size, sha256))
    return files


def damage(checkpoint: str | Path, *, hashes: bool = True) -> str | None:
    """Why a checkpoint is unusable, or None: it was declared complete, and all its files are as they were then.

    Args:
        hashes: read every file to compare its hash; False compares sizes only, which is enough to tell a complete
            checkpoint from one that was cut off.
    """
    path = Path(checkpoint)
    if not (path / COMPLETE).is_file():
        return f"it has no {COMPLETE}: the run was killed while writing it, or another trainer wrote it"
    try:
        files = _manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {COMPLETE} is damaged ({error!r})"
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        problems = pool.map(lambda file: file.problem(path, hashes=hashes), files)
        if problem := next(filter(None, problems), None):
            return problem
    try:
        read_state(path)
    except CheckpointError as error:
        return str(error)
    return None


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end; whether its files have changed since is not looked at."""
    return damage(checkpoint, hashes=False) is None


def check_chosen(checkpoint: str | Path) -> None:
    """Checks a checkpoint that the user names, before the run resumes from it: transformers would silently start with a
    fresh optimizer where its file is missing.

    Raises:
        CheckpointError: there is no such directory, or a file that the checkpoint was complete with is missing, cut or
            changed.
    """
    if not Path(checkpoint).is_dir():
        raise CheckpointError(
            f"There is no checkpoint {checkpoint}: expected a directory such as OUTPUT_DIR/checkpoint-500."
        )
    if not (problem := damage(checkpoint)):
        return
    if (Path(checkpoint) / COMPLETE).exists():
        raise CheckpointError(f"{checkpoint} is damaged: {problem}. Resume from another checkpoint.")
    logger.warning("%s: %s; cannot verify that it is complete", checkpoint, problem)


def _by_step(output_dir: str | Path) -> dict[Path, int]:
    """Checkpoint -> step of all checkpoints in a directory, complete or not, in ascending order of steps."""
    found = {
        path: re.fullmatch(r"checkpoint-(\d+)", path.name)
        for path in Path(output_dir).glob("checkpoint-*")
        if path.is_dir()
    }
    return dict(sorted(((path, int(match[1])) for path, match in found.items() if match), key=lambda item: item[1]))


def last_complete_checkpoint(output_dir: str | Path, *, hashes: bool = True) -> str | None:
    """The usable checkpoint with the highest step in a directory, or None. Unusable later ones are named in the log
    with the file and the reason.

    Args:
        hashes: as in `damage`; False also says nothing in the log.
    """
    for path in reversed(_by_step(output_dir)):
        if not (problem := damage(path, hashes=hashes)):
            return str(path)
        if hashes:
            logger.warning("%s is not resumed from: %s", path, problem)
    return None


def agreed(paths: list[str | None], output_dir: str) -> str | None:
    """The checkpoint that all ranks found.

    Raises:
        CheckpointError: they found different ones: their machines do not share a disk.
    """
    if len(set(paths)) > 1:
        raise CheckpointError(
            f"The processes find different last checkpoints in {output_dir}: {sorted(set(map(str, paths)))}. It must be"
            " on a disk that all machines share."
        )
    return paths[0]


def finish_checkpoint(checkpoint: Path, state: dict[str, Any], *, keep: int | None, best: str | None) -> None:
    """On the main process, after all ranks have written: saves silkie's own state, declares the checkpoint complete,
    deletes old ones."""
    (checkpoint / STATE).write_text(json.dumps(state))
    # Before this one is complete: a kill in between leaves an earlier checkpoint to resume from, never one of the other
    # run.
    _retire_later(checkpoint)
    mark_complete(checkpoint)
    if keep and keep > 0:
        _rotate(checkpoint.parent, keep, {checkpoint.name, Path(best or checkpoint).name})


def _retire_later(checkpoint: Path) -> None:
    """Marks checkpoints of later steps unusable: they belong to an earlier run in the same directory, and resuming this
    run must not pick them."""
    steps = _by_step(checkpoint.parent)
    for path in (path for path, step in steps.items() if step > steps[checkpoint] and (path / COMPLETE).exists()):
        logger.warning("%s belongs to an earlier run that is not being resumed; marking it unusable for resuming", path)
        (path / COMPLETE).unlink()


def _rotate(output_dir: Path, keep: int, protected: set[str]) -> None:
    """Deletes all but `keep` checkpoints: unusable ones first, then the oldest."""
    found = sorted(_by_step(output_dir), key=is_complete)
    spare = [path for path in found if path.name not in protected]
    for path in spare[: max(0, len(found) - max(keep, len(protected)))]:
        # A file that cannot be deleted must not end the run; the checkpoint is tried again at the next rotation.
        shutil.rmtree(path, ignore_errors=True)


def load_weights(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """Puts a checkpoint's weights into a model that is trained in full.

    `save_pretrained` writes weights under the names of the family's published files, which differ from the modules'
    names; only `from_pretrained` maps them back. transformers' trainer looks for the modules' names, finds none, and
    merely warns.

    Raises:
        CheckpointError: the files lack weights of the model, or hold others.
    """
    kind: Any = type(model)
    loaded, info = kind.from_pretrained(
        checkpoint,
        config=copy.deepcopy(model.config),
        dtype=model.dtype,
        attn_implementation="eager",
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    if wrong := [f"{what} {', '.join(sorted(map(str, names))[:5])}" for what, names in info.items() if names]:
        raise CheckpointError(
            f"The weights in {checkpoint} are not those of this model: {'; '.join(wrong)}. Resume with the model that"
            " the run began with."
        )
    model.load_state_dict(loaded.state_dict())


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """What `finish_checkpoint` saved; {} for a checkpoint that another trainer wrote.

    Raises:
        CheckpointError: the file is damaged, or holds something else than a run's state.
    """
    file = Path(checkpoint) / STATE
    if not file.exists():
        return {}
    try:
        state = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}. Resume from an earlier checkpoint.") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not the state of a run.")
    for name, kind in _STATE_TYPES.items():
        if name in state and (not isinstance(state[name], kind) or isinstance(state[name], bool)):
            raise CheckpointError(f"{file}: {name!r} is a {type(state[name]).__name__}; expected {kind.__name__}.")
    return dict(state)
