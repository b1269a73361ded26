"""`attention_backend="auto"` on a GPU: what the trial chooses, and that a choice the model does not bear is taken back.

There is no GPU here: varlen's kernel is its plain PyTorch form, and the times are made up."""

import logging

import pytest
import torch

from silkie.model import layout
from silkie.model.attention import probe, varlen
from silkie.training.startup import a_micro_batch
from tests.integration.test_trainer import adapter, assert_same, losses, make
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")
GROUPS = ((5, [3, 2, 4]), (9, [1, 2]))


@pytest.fixture
def available(monkeypatch):
    """Backends for CUDA count as available; returns a function that says which times will be measured."""
    for module in (layout, probe):
        monkeypatch.setattr(module, "why_not_available", lambda *_: None)

    def times(*seconds):
        waiting = iter(seconds)
        monkeypatch.setattr(probe, "_seconds", lambda run, device: run() and next(waiting))

    return times


def tried(dtype=torch.float32):
    config = tiny_model().config
    return probe.fastest(config, probe.sizes_of(config, GROUPS, dtype), CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exact_and_faster_backend_is_taken(available, dtype):
    available(0.010, 0.004)
    backend, why = tried(dtype)
    assert backend == "varlen" and "tried on 2 groups of the run: varlen takes 0.40 of sdpa's 10.00 ms" in why


def test_a_backend_that_saves_little_is_not_and_one_that_cannot_is_named(available):
    """FlexAttention has no backward pass on the CPU."""
    available(0.010, 0.0095)
    backend, why = tried()
    assert backend == "sdpa" and "varlen takes 0.95" in why and "flex cannot: RuntimeError: FlexAttention has no" in why


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_a_backend_that_computes_something_else_is_not(available, monkeypatch, wrong):
    kernel = varlen.segment_attention

    def broken(q, k, v, plan, scaling):
        if wrong == "output":
            return kernel(q, k, v, plan, scaling) * 1.01
        return kernel(q, k.detach(), v, plan, scaling) + 0 * k.sum()

    monkeypatch.setattr(varlen, "segment_attention", broken)
    available(0.010, 0.001)
    backend, why = tried()
    assert backend == "sdpa" and "varlen is off by" in why


def test_a_backend_that_needs_more_memory_is_not(available, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(varlen, "segment_attention", full)
    available(0.010)
    backend, why = tried()
    assert backend == "sdpa" and "varlen runs out of memory" in why


def test_times_are_measured():
    run = torch.randn(64, 64)
    assert 0 < probe._seconds(lambda: run @ run, CPU) < 1


def on_a_gpu(monkeypatch):
    """Has the layout choose as on a GPU."""
    real = layout._choose_backend

    def choose(config, args, groups, dtype):
        if args.attention_backend != "auto":
            return real(config, args, groups, dtype)
        return probe.fastest(config, probe.sizes_of(config, groups, dtype), CPU)

    monkeypatch.setattr(layout, "_choose_backend", choose)


def test_a_run_trains_on_what_was_chosen(tmp_path, monkeypatch, available, caplog):
    plain = make(tmp_path / "plain", max_steps=2, attention_backend="sdpa")
    plain.train()
    on_a_gpu(monkeypatch)
    available(0.010, 0.004)
    caplog.set_level(logging.INFO, "silkie")
    chosen = make(tmp_path / "chosen", max_steps=2)
    chosen.train()
    assert (chosen.choice.backend, chosen.choice.groups_per_row) == ("varlen", None)
    assert "attention: varlen (tried on 2 groups of the run" in caplog.text
    assert chosen.model.config.get_text_config()._attn_implementation == varlen.NAME
    assert losses(chosen) == pytest.approx(losses(plain), abs=1e-6)
    assert_same(adapter(plain), adapter(chosen), 2e-4)


def test_a_choice_that_the_whole_model_does_not_bear_is_taken_back(tmp_path, monkeypatch, available, caplog):
    """As with a model whose layers ask for something that the kernel does not do."""
    on_a_gpu(monkeypatch)
    available(0.010, 0.004)
    kernel = varlen.segment_attention
    trials = iter([True] * 2)  # exactness and time
    monkeypatch.setattr(
        varlen, "segment_attention", lambda *args: kernel(*args) * (1.0 if next(trials, False) else 1.5)
    )
    caplog.set_level(logging.INFO, "silkie")
    trainer = make(tmp_path, max_steps=1, layout="packed")
    assert (trainer.choice.layout, trainer.choice.backend, trainer.choice.groups_per_row) == ("packed", "sdpa", 1)
    assert "varlen was faster, but: Self-test failed" in caplog.text
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-5)


def test_a_micro_batch_is_as_many_groups_as_a_run_has_room_for(tmp_path):
    trainer = make(tmp_path, self_test=False)
    data, args = trainer.train_dataset, trainer.args
    first = [(p, r) for p, r in zip(data["prompt_length"], data["response_lengths"], strict=True)]
    assert a_micro_batch(data, args) == first[:2]
    args.max_tokens_per_batch = first[0][0] + sum(first[0][1]) + 1
    assert a_micro_batch(data, args) == first[:1]
