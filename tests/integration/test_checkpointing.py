"""`gradient_checkpointing="auto"`: as many layers as memory needs, the same numbers whatever their number is."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from silkie import SilkieDPOConfig
from silkie.model import checkpointing as mechanism
from silkie.plan import checkpointing
from silkie.run.command import make_parser
from tests.integration.test_distributed import run_jobs
from tests.integration.test_trainer import adapter, assert_same, losses, make
from tests.support.hybrid import qwen3_5
from tests.support.tiny import tiny_model

MODELS = {"attention": lambda: tiny_model(layers=3), "hybrid": qwen3_5}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_whatever_number_of_layers_is_checkpointed(tmp_path, kind, reentrant):
    """Also of the hybrid model, whose recurrent layers fork again when they are computed again."""
    trainer = make(tmp_path, model=MODELS[kind]().double(), self_test=False, layout="packed")
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    layers, calls = mechanism.checkpointable_layers(model), [0]
    for layer in layers:  # a hook of the layer itself would not be called when it is computed again
        layer.input_layernorm.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = []
    for count in range(len(layers) + 1):
        mechanism.checkpoint_first(model, count)
        calls[0] = 0
        loss = trainer.passes.run(model, batch, use_table=True)[1].logps.square().sum()
        forward = calls[0]
        loss.backward()
        assert calls[0] - forward == count  # so many layers were computed again
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(layers) >= 2 and found[0]
    for other in found[1:]:
        assert_same(found[0], other, 1e-12)


def give(monkeypatch, memory):
    monkeypatch.setattr(checkpointing, "free_memory", lambda device: memory)


def needs(tmp_path, monkeypatch):
    """Bytes that a run needs with none and with every layer checkpointed."""
    give(monkeypatch, 0.0)
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    words = str(trainer.checkpointing).split()
    assert "every layer (auto)" in str(trainer.checkpointing)
    sizes = [float(words[i - 1]) * 2**20 for i, word in enumerate(words) if word.startswith("MiB")]
    return trainer, sizes[1], sizes[0]


def test_auto_checkpoints_what_memory_needs_and_trains_alike(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "silkie")
    every, without, _ = needs(tmp_path / "every", monkeypatch)
    share = checkpointing._SHARE["cpu"]
    give(monkeypatch, without * 1.01 / share)
    none = make(tmp_path / "none", max_steps=1)
    none.train()
    assert "no layer (auto)" in caplog.text and none.checkpointing.layers == 0
    assert caplog.text.count("LoRA targets") == 2, "a line per run, and none for the copy that is counted"
    give(monkeypatch, without * 0.95 / share)
    some = make(tmp_path / "some", max_steps=1)
    some.train()
    assert 0 < some.checkpointing.layers < some.checkpointing.of and "the first 1 of" in caplog.text
    always, never = (make(tmp_path / str(g), gradient_checkpointing=g, max_steps=1) for g in (True, False))
    always.train(), never.train()
    assert always.checkpointing is None and never.checkpointing is None
    for trainer in (none, some, always, never):
        assert_same(adapter(every), adapter(trainer), 0.0)
        assert losses(trainer) == losses(every)


def test_a_run_resumes_bit_for_bit_with_another_number_of_layers(tmp_path, monkeypatch):
    give(monkeypatch, 1e12)
    whole = make(tmp_path / "whole", num_train_epochs=2)
    whole.train()
    cut = make(tmp_path / "cut", num_train_epochs=2, max_steps=2, save_strategy="steps", save_steps=2)
    cut.train()
    give(monkeypatch, 0.0)
    rest = make(tmp_path / "cut", num_train_epochs=2, save_strategy="steps", save_steps=2)
    rest.train(resume_from_checkpoint=True)
    assert cut.checkpointing.layers == 0 and rest.checkpointing.layers == rest.checkpointing.of > 0
    assert_same(adapter(whole), adapter(rest), 0.0)


def test_a_forward_pass_that_runs_out_of_memory_runs_again_with_more_layers(tmp_path, monkeypatch, caplog):
    give(monkeypatch, 1e12)
    plain, retried = (make(tmp_path / name, max_steps=2) for name in ("plain", "retried"))
    plain.train()
    run, failures = retried.passes.run, iter([True, False, True])

    def fails(*args, **options):
        scores = run(*args, **options)
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scores

    monkeypatch.setattr(type(retried.passes), "run", lambda self, *args, **options: fails(*args, **options))
    retried.train()
    assert "now the first 1 of 2 layers" in caplog.text and retried.checkpointing.layers == 2
    assert_same(adapter(plain), adapter(retried), 0.0)
    assert losses(plain) == losses(retried)


def test_one_rank_of_two_runs_out_of_memory(tmp_path):
    """In its first pass of an optimizer step, the reference's: DDP would begin the repeated pass with a broadcast that
    the other rank does not join."""
    common = {"data": "many", "layers": 0}
    options = {"gradient_checkpointing": "auto", "self_test": False}
    jobs = [
        {"mode": mode, "spec": {**common, **more, "out": str(tmp_path / mode), "args": {**options, **args}}}
        for mode, more, args in (
            ("single", {}, {"gradient_accumulation_steps": 2}),
            ("ddp", {"out_of_memory": 0}, {}),
        )
    ]
    run_jobs(jobs, tmp_path, 120)
    results = [json.loads((tmp_path / mode / "result.json").read_text()) for mode in ("single", "ddp")]
    alone, together = ([[e["loss"], e["grad_norm"]] for e in r["log"] if "loss" in e] for r in results)
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=2e-6, rtol=2e-5)
    logged = (tmp_path / "ddp/log.1").read_text()
    assert "now the first 1 of 2 layers are checkpointed" in logged


def test_where_nothing_can_be_changed_the_error_comes_through(tmp_path, monkeypatch):
    def fails(self, *args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    always = make(tmp_path / "always", gradient_checkpointing=True, self_test=False)
    every = make(tmp_path / "every", self_test=False)
    give(monkeypatch, 0.0)
    monkeypatch.setattr(type(always.passes), "run", fails)
    for trainer in (always, every):
        with pytest.raises(torch.OutOfMemoryError):
            trainer.train()
    assert not checkpointing.Checkpointing(1, 4, "sharded", fixed=True).add(None)


def test_what_the_planner_does_not_know_is_checkpointed(tmp_path, monkeypatch):
    give(monkeypatch, 1e12)
    trainer = make(tmp_path, self_test=False)
    trainer.frozen_vision = False
    assert "the vision tower trains" in str(checkpointing.choose_checkpointing(trainer))
    trainer.frozen_vision = True
    monkeypatch.setattr(checkpointing, "shape_of", lambda config: (_ for _ in ()).throw(ValueError("no sizes")))
    chosen = checkpointing.choose_checkpointing(trainer)
    assert chosen.layers == chosen.of == 2 and "every layer (auto): no sizes" in str(chosen)


def test_ranks_of_a_sharded_run_take_the_largest_number(tmp_path, monkeypatch):
    give(monkeypatch, 1e12)
    trainer = make(tmp_path, self_test=False)
    asked = []
    monkeypatch.setattr(type(trainer), "is_fsdp_enabled", True, raising=False)
    trainer.is_fsdp_enabled = True
    gather = lambda found: asked.append(int(found)) or torch.tensor([int(found), 1])  # noqa: E731
    monkeypatch.setattr(trainer.accelerator, "gather", gather)
    chosen = checkpointing.choose_checkpointing(trainer)
    assert asked == [0] and chosen.layers == 1 and chosen.fixed


def test_free_memory_is_what_is_left_of_the_container_and_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(checkpointing.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    monkeypatch.setattr(checkpointing, "memory_left", lambda: 4e9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert checkpointing.free_memory(torch.device("cpu")) == 2e9
    monkeypatch.setattr(checkpointing, "memory_left", lambda: float("inf"))
    assert checkpointing.free_memory(torch.device("cpu")) == 4e9
    monkeypatch.undo()
    assert 0 < checkpointing.free_memory(torch.device("cpu")) < 1e14


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "true"], True),
        (["--gradient_checkpointing", "False"], False),
        (["--no_gradient_checkpointing"], False),
        (["--gradient_checkpointing", "auto"], "auto"),
    ],
)
def test_the_command_line_takes_what_trl_takes_and_auto(tmp_path, words, expected):
    args = ["--output_dir", str(tmp_path), "--dataset_name", "x", "--use_cpu", "true", "--bf16", "false"]
    _, config, _ = make_parser().parse_args_and_config([*args, *words])
    assert config.gradient_checkpointing == config.activation_checkpointing == expected
    assert type(config.gradient_checkpointing) is type(expected)


def test_layers_that_are_chosen_already_are_left_alone(tmp_path):
    kwargs = {"every_n_layers": 2}
    config = SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing_kwargs=kwargs)
    assert config.gradient_checkpointing is True
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be one of"):
        SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing="sometimes")


def test_layers_are_those_of_the_text_decoder_in_order():
    model = tiny_model(layers=3)
    assert mechanism.checkpointable_layers(model) == list(model.model.language_model.layers)
    mechanism.checkpoint_first(model, 2)
    assert [layer.gradient_checkpointing for layer in model.model.language_model.layers] == [True, True, False]
