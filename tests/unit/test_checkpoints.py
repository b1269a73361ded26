"""A checkpoint counts when it is complete, and only then."""

import errno
import json
import os
import signal

import pytest
import torch

from silkie.training import checkpoints as c
from silkie.training import ending
from silkie.training.ending import on_signals
from silkie.training.output_dir import clear_disk_errors
from tests.support.families import FAMILIES, QWEN, family_model
from tests.support.tiny import tiny_model


def write(directory, step, complete=True, size=10):
    path = directory / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"x" * size)
    if complete:
        c.finish_checkpoint(path, {"train_tokens": step}, keep=None, best=None)
    return path


def test_the_last_complete_one_is_found_by_number(tmp_path):
    assert c.last_complete_checkpoint(tmp_path) is None
    write(tmp_path, 9), write(tmp_path, 10)
    write(tmp_path, 11, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert c.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert c.read_state(tmp_path / "checkpoint-10") == {"train_tokens": 10}
    assert c.read_state(tmp_path / "checkpoint-11") == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("same size", "model.safetensors has changed since it was written"),
        ("truncate", "model.safetensors has 9 bytes, not 10"),
        ("remove", "model.safetensors is missing"),
        ("marker", "silkie_complete.json is damaged"),
        ("other", "silkie_complete.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_does_not_count(tmp_path, caplog, damage, message):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    if damage == "same size":
        (bad / "model.safetensors").write_bytes(b"x" * 9 + b"y")
    elif damage == "truncate":
        (bad / "model.safetensors").write_bytes(b"x" * 9)
    elif damage == "remove":
        (bad / "model.safetensors").unlink()
    elif damage == "marker":
        (bad / c.COMPLETE).write_text((bad / c.COMPLETE).read_text()[:-3])
    else:
        (bad / c.COMPLETE).write_text("[]")
    assert c.last_complete_checkpoint(tmp_path) == str(good)
    assert f"checkpoint-2 is not resumed from: its {message}" in caplog.text.replace("its file", "its")
    with pytest.raises(c.CheckpointError, match=f"checkpoint-2 is damaged.*{message}"):
        c.check_chosen(bad)
    c.check_chosen(good)


def test_a_chosen_checkpoint_that_nobody_declared_complete_is_pointed_out(tmp_path, caplog):
    c.check_chosen(write(tmp_path, 1, complete=False))
    assert "checkpoint-1: it has no silkie_complete.json" in caplog.text
    with pytest.raises(c.CheckpointError, match="no checkpoint .*checkpoint-2: expected a directory"):
        c.check_chosen(tmp_path / "checkpoint-2")


def test_a_checkpoint_stops_counting_before_it_is_written_anew(tmp_path):
    good, again = write(tmp_path, 1), write(tmp_path, 2)
    c.clear_place(again)
    assert not again.exists() and c.last_complete_checkpoint(tmp_path) == str(good)
    c.clear_place(tmp_path / "checkpoint-3")  # nothing there


def test_old_checkpoints_go_after_the_new_one_is_complete(tmp_path, monkeypatch):
    write(tmp_path, 1), write(tmp_path, 2)
    new = write(tmp_path, 3, complete=False)
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    with pytest.raises(OSError):
        c.finish_checkpoint(new, {}, keep=1, best=None)
    assert c.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    c.finish_checkpoint(new, {}, keep=1, best=str(tmp_path / "checkpoint-1"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("keep", [None, 2])
def test_a_new_run_in_a_used_directory_keeps_its_own_checkpoints(tmp_path, caplog, keep):
    """By step number alone those of the earlier, longer run would be kept, the new ones deleted, and the earlier run
    resumed from."""
    write(tmp_path, 7), write(tmp_path, 8)
    for step in (1, 2, 3):
        c.finish_checkpoint(write(tmp_path, step, complete=False), {}, keep=keep, best=None)
        assert c.last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{step}")
    assert caplog.text.count("checkpoint-8 belongs to an earlier run") == 1
    assert len(list(tmp_path.iterdir())) == (keep or 5) and (not keep or c.is_complete(tmp_path / "checkpoint-2"))


def test_what_a_kill_left_pushes_out_no_complete_checkpoint(tmp_path):
    """Killed while writing step 5, resumed from 3, preempted at 4: the unfinished one goes first."""
    write(tmp_path, 3), write(tmp_path, 5, complete=False)
    c.finish_checkpoint(write(tmp_path, 4, complete=False), {}, keep=1, best=None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"] and c.is_complete(tmp_path / "checkpoint-4")


def test_a_damaged_state_is_named(tmp_path):
    (write(tmp_path, 1) / c.STATE).write_text("{")
    with pytest.raises(c.CheckpointError, match="damaged.*earlier checkpoint"):
        c.read_state(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("family", [*FAMILIES, *QWEN])
@pytest.mark.parametrize("tie", [False, True])
def test_saved_weights_are_loaded_back(tmp_path, family, tie):
    model = tiny_model(family, tie=tie) if family in QWEN else family_model(family)
    model.save_pretrained(tmp_path)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    c.load_weights(model, tmp_path)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [({"layers": 1}, "missing_keys"), ({"layers": 3}, "unexpected_keys"), ({"hidden": 64}, "mismatched_keys")],
)
def test_weights_of_another_model_are_refused(tmp_path, other, message):
    tiny_model(**other).save_pretrained(tmp_path)
    with pytest.raises(
        c.CheckpointError, match=f"not those of this model.*{message}.*the model that the run began with"
    ):
        c.load_weights(tiny_model(layers=2), tmp_path)


def test_ranks_that_see_different_checkpoints_are_stopped():
    assert c.agreed(["a", "a"], "out") == "a" and c.agreed([None], "out") is None
    with pytest.raises(c.CheckpointError, match="disk that all machines share"):
        c.agreed(["a", None], "out")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_named_with_what_is_left(tmp_path, error):
    write(tmp_path, 4)
    with (
        pytest.raises(c.CheckpointError, match=r"disk is full.*checkpoint-4.*start the same command again"),
        clear_disk_errors(tmp_path),
    ):
        raise error


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ValueError, match="as it was"), clear_disk_errors(tmp_path):
        raise ValueError("as it was")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_its_echo_is_ignored_and_a_later_one_ends(monkeypatch, number):
    """ATTACKS 15: `accelerate launch` passes on what the terminal has sent to its processes already."""
    ended, asked = [], []
    both = {n: signal.signal(n, lambda number, frame: ended.append(number)) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        before = [signal.getsignal(n) for n in both]
        with on_signals(asked.append):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [number.name] and not ended
            monkeypatch.setattr(ending, "ECHO", -1.0)
            os.kill(os.getpid(), number)
            assert asked == [number.name] and ended == [number]
        assert [signal.getsignal(n) for n in both] == before
    finally:
        for n, handler in both.items():
            signal.signal(n, handler)


def test_the_marker_lists_every_file(tmp_path):
    path = write(tmp_path, 1)
    assert json.loads((path / c.COMPLETE).read_text())["files"].keys() == {"model.safetensors", c.STATE}
