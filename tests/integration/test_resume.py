"""Runs that are killed, preempted, starved of disk or fed NaN: they go on exactly, or stop with their last good
checkpoint."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from silkie.training import checkpoints, ending
from silkie.training.non_finite import NonFiniteError
from silkie.training.output_dir import LOCK
from tests.integration.test_distributed import ROOT
from tests.support import train_run

# bco_pair with a running mean: state outside the model that must survive; AdamW: state of the optimizer
LONG = {
    "num_train_epochs": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "loss_type": ["sigmoid", "bco_pair"],
    "bco_reward_shift": "running_mean",
}


def make(tmp_path, **args):
    return train_run.make({"out": str(tmp_path), "data": "mixed", "args": {"use_cpu": True, **args}}, {})


def log_of(path):
    result = json.loads((path / "result.json").read_text())
    keys = ("step", "loss", "grad_norm", "rewards/margins", "num_tokens", "learning_rate")
    return [{k: e[k] for k in keys} for e in result["log"] if "loss" in e], result["objective"]


def kill_matrix(tmp_path, mode, kills, timeout, epochs=4, lora=True, stream=None):
    """Kills a run at random moments, a checkpoint every step, and compares its log and weights bit for bit with those
    of an undisturbed run. `stream`: options of one that reads its data as a stream."""
    args = {**LONG, "num_train_epochs": epochs, "learning_rate": 0.01 if lora else 0.001, **(stream or {})}
    spec = {"lora": lora, "stream": stream is not None, "args": args}
    jobs = [
        {"mode": mode, "spec": {**spec, "out": str(tmp_path / "calm")}, "timeout": 300},
        {
            "mode": mode,
            "spec": {**spec, "out": str(tmp_path / "killed"), "resume": True},
            "kills": kills,
            "paced_by": str(tmp_path / "calm"),
            "timeout": 300,
        },
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.fork_run", str(tmp_path / "jobs.json")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    calm, killed = json.loads((tmp_path / "jobs.out").read_text())
    assert not any(calm["codes"] + killed["codes"]), (tmp_path / "killed" / "log.0").read_text()[-3000:]
    assert log_of(tmp_path / "calm") == log_of(tmp_path / "killed")
    a, b = (
        load_file(tmp_path / name / "final" / ("adapter_model.safetensors" if lora else "model.safetensors"))
        for name in ("calm", "killed")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    return killed


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["ddp", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("zero3", "fsdp2"))])
def test_a_killed_run_goes_on_exactly(tmp_path, mode):
    assert kill_matrix(tmp_path, mode, 2, 280)["kills"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["single", "ddp", "zero2", "zero3", "fsdp2"])
def test_a_killed_run_of_the_whole_model_goes_on_exactly(tmp_path, mode):
    assert kill_matrix(tmp_path, mode, 4, 580, epochs=6, lora=False)["kills"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_a_killed_run_on_a_stream_goes_on_exactly(tmp_path, mode):
    """SIGKILL in the middle of windows and over the end of the stream, which is read again from there."""
    stream = {"max_steps": 16, "stream_window": 4}
    assert kill_matrix(tmp_path, mode, 6, 880, stream=stream)["kills"] == 6
    state = json.loads((tmp_path / "killed" / "checkpoint-16" / "silkie_state.json").read_text())
    passes, window, _ = state["stream"]
    print(mode, "ended in pass", passes, "window", window)
    assert passes >= 1, "the stream did not end before the run"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", ["single", "ddp", "zero2", "zero3", "fsdp2"])
def test_twenty_random_kills_lose_nothing(tmp_path, mode):
    """The kills come from the first step to the third checkpoint of a start, many while one is being written; 40 steps
    are more than 20 killed starts get through."""
    killed = kill_matrix(tmp_path, mode, 20, 3500, epochs=20)
    print(mode, killed)
    assert killed["kills"] == 20


@pytest.mark.parametrize("moment", ["weights", "optimizer", "marker"])
def test_a_checkpoint_cut_off_while_it_is_written_does_not_count(tmp_path, monkeypatch, moment):
    calm = make(tmp_path / "calm", **LONG)
    calm.train()

    class Cut(Exception):
        pass

    def cut(*args, **kwargs):
        if trainer.state.global_step == 5:
            raise Cut
        return original(*args, **kwargs)

    trainer = make(tmp_path / "cut", **LONG)
    owner, name = {
        "weights": (trainer, "_save_optimizer_and_scheduler"),
        "optimizer": (trainer, "_save_rng_state"),
        "marker": (checkpoints, "mark_complete"),
    }[moment]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, cut)
    with pytest.raises(Cut):
        trainer.train()
    assert (tmp_path / "cut" / "checkpoint-5").exists() and checkpoints.last_complete_checkpoint(
        tmp_path / "cut"
    ).endswith("checkpoint-4")
    monkeypatch.undo()
    again = make(tmp_path / "cut", **LONG)
    again.train(resume_from_checkpoint=True)
    assert [e["loss"] for e in calm.state.log_history if "loss" in e] == [
        e["loss"] for e in again.state.log_history if "loss" in e
    ]
    assert (
        calm.objective.state_dict() == again.objective.state_dict()
        and calm._total_train_tokens == again._total_train_tokens
    )
    for (n, p), (_, q) in zip(calm.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, q), n


def test_a_run_of_the_whole_model_goes_on_with_its_weights(tmp_path):
    """Its files name weights otherwise than its modules do; transformers' own trainer would go on with the untrained
    ones."""
    spec = {
        "out": str(tmp_path),
        "data": "mixed",
        "lora": False,
        "args": {**LONG, "use_cpu": True, "learning_rate": 0.002, "save_total_limit": None},
    }
    calm, again = train_run.make(spec, {}), train_run.make(spec, {})
    calm.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [e["loss"] for e in calm.state.log_history if "loss" in e] == [
        e["loss"] for e in again.state.log_history if "loss" in e
    ]
    for (name, p), (_, q) in zip(calm.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    again.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    again._load_best_model()
    saved = type(again.model).from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), saved.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(again.model.parameters(), calm.model.parameters(), strict=True))


class AtStep(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "file"])
def test_a_preempted_run_saves_and_leaves(tmp_path, how):
    """ATTACKS 15: the script must not go on with the half-trained model."""
    ask = (tmp_path / ending.STOP_FILE).touch if how == "file" else lambda: os.kill(os.getpid(), getattr(signal, how))
    trainer = make(tmp_path, num_train_epochs=3, save_strategy="no")
    trainer.add_callback(AtStep(2, ask))
    with pytest.raises(SystemExit, match="75"):
        trainer.train()
    assert trainer.preempted and trainer.state.global_step == 3
    assert (
        checkpoints.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
        and not (tmp_path / ending.STOP_FILE).exists()
        and not (tmp_path / LOCK).exists()
    )
    again = make(tmp_path, num_train_epochs=3, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert not again.preempted and again.state.global_step == again.state.max_steps == 12


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on file sizes stands for the disk: the optimizer's file no longer fits."""
    trainer = make(tmp_path, **{**LONG, "max_steps": 4})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.add_callback(AtStep(2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))))
    try:
        with pytest.raises(
            checkpoints.CheckpointError, match=r"disk is full.*checkpoint-2.*start the same command again"
        ):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    again = make(tmp_path, **{**LONG, "max_steps": 4})
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_number_stops_before_it_is_saved(tmp_path, what):
    """Logging every 100 steps: the check before saving must find it."""
    trainer = make(tmp_path, **{**LONG, "logging_steps": 100, "save_steps": 3})
    compute = trainer.compute_loss

    def poisoned(model, inputs, **kwargs):
        loss = compute(model, inputs, **kwargs)
        if trainer.state.global_step == 5 and what == "loss":
            trainer.watch._seen[-1] = (torch.tensor(float("nan")), inputs["names"])
        if trainer.state.global_step == 5 and what == "gradient":
            loss = (
                loss + (next(p for p in model.parameters() if p.requires_grad) * 0).sum().sqrt()
            )  # value 0, gradient NaN
        return loss

    trainer.compute_loss = poisoned
    with pytest.raises(NonFiniteError, match="nan.*(one|two|none|last)"):
        trainer.train()
    assert checkpoints.last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_a_checkpoint_named_by_the_user_must_be_whole(tmp_path):
    make(tmp_path, **{**LONG, "max_steps": 2}).train()
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    with pytest.raises(
        checkpoints.CheckpointError, match=r"checkpoint-1 is damaged: its file optimizer\.pt is missing"
    ):
        make(tmp_path, **LONG).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_finished_run_says_that_nothing_is_left_and_trains_nothing(tmp_path, caplog):
    for _ in range(2):
        trainer = make(tmp_path, **{**LONG, "max_steps": 2})  # ends within an epoch
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 2
    assert caplog.text.count("training is already complete (step 2 of 2)") == 1


def test_resuming_where_there_is_nothing_starts_afresh(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
