"""A run knows what it is: resuming with other data, model, losses or options stops and says what differs."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, TrainerCallback

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.schema import ROW_FORM
from silkie.inference import load_processor
from silkie.training import checkpoints
from silkie.training.ending import PREEMPTED_EXIT_CODE
from silkie.training.identity import _order, describe_data, differences
from silkie.training.non_finite import NonFiniteError
from silkie.training.output_dir import LOCK, OutputDirInUse, OutputLock
from silkie.training.resumable import RunChanged
from tests.integration.test_distributed import ROOT
from tests.support.data import dataset, group, mixed_groups
from tests.support.tiny import image, tiny_model, tiny_processor

ARGS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 1,
    "learning_rate": 0.01,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 2,
    "self_test": False,
    "seed": 0,
}


def make(out, *, groups=None, model=None, processor=None, lora=None, **options):
    torch.manual_seed(0)
    return SilkieDPOTrainer(
        model or tiny_model(),
        args=SilkieDPOConfig(str(out), **{**ARGS, **options}),
        train_dataset=dataset(groups or mixed_groups()),
        processing_class=processor or tiny_processor(),
        peft_config=None if hasattr(model, "peft_config") else LoraConfig(**{"r": 4, "lora_alpha": 8, **(lora or {})}),
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The identity of an untouched run."""
    return make(tmp_path_factory.mktemp("first")).run_identity()


def other_response():
    rows = mixed_groups()
    rows[3]["responses"][1] = "two"
    return rows


def other_image():
    rows = mixed_groups()
    rows[0] = group([image(7)], "what is in image ?", rows[0]["responses"], rows[0]["pairs"], id="one")
    return rows


CHANGES = {
    "a response": ({"groups": other_response}, ["data: content changed"]),
    "an image": ({"groups": other_image}, ["data: images changed"]),
    "the order": ({"groups": lambda: mixed_groups()[::-1]}, ["data: content changed", "data: images changed"]),
    "fewer groups": ({"groups": lambda: mixed_groups()[:3]}, ["data: groups is 3, was 4"]),
    "base weights": ({"model": lambda: tiny_model(seed=1)}, ["base model: weights changed"]),
    "base config": ({"model": lambda: tiny_model(rms_norm_eps=1e-3)}, ["text_config.rms_norm_eps is 0.001, was 1e-05"]),
    "processor": ({"processor": lambda: tiny_processor(image_side=84)}, ["processor: processor changed"]),
    "limits": ({"max_length": 50}, ["processor: limits is [50, null"]),
    "adapter": ({"lora": {"r": 2}}, ["trained: adapter default: r is 2, was 4"]),
    "loss": ({"loss_type": ["ipo"]}, ['losses: loss_type is ["ipo"], was ["sigmoid"]']),
    "beta": ({"beta": 0.5}, ["losses: beta is 0.5, was 0.1"]),
    "router loss": ({"router_aux_loss_coef": 0.0}, ["losses: router_aux_loss_coef is 0.0, was null"]),
    "noise": ({"neftune_noise_alpha": 5.0, "layout": "rows"}, ["losses: neftune_noise_alpha is 5.0, was null"]),
    "dropout": ({"disable_dropout": False}, ["losses: disable_dropout is false, was null"]),
    "learning rate": ({"learning_rate": 0.1}, ["optimizer: learning_rate is 0.1, was 0.01"]),
    "seed": ({"seed": 1}, ["order: seed is 1, was 0"]),
    "sampling": (
        {"train_sampling_strategy": "sequential"},
        ['order: train_sampling_strategy is "sequential", was null'],
    ),
    "drop last": ({"dataloader_drop_last": True}, ["order: dataloader_drop_last is true, was null"]),
    "batch": ({"per_device_train_batch_size": 2}, ["order: groups_per_step is 2, was 1"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_named(tmp_path, first, what):
    """ATTACKS 2: resuming took another dataset, order, model or loss in silence."""
    options, expected = CHANGES[what]
    now = make(tmp_path, **{k: v() if callable(v) else v for k, v in options.items()}).run_identity()
    found = differences(now, json.loads(json.dumps(first)))
    for line in expected:
        assert any(line in entry for entry in found), found
    parts = {line.split(":")[0] for line in expected if ":" in line}
    assert {entry.split(":")[0] for entry in found} <= (parts or {"base model"}) | (
        {"data"} if "data" in parts else set()
    )


def test_the_same_run_is_the_same_from_elsewhere(tmp_path, first):
    """Moved directories, another process and another start are no difference."""
    tiny_model().save_pretrained(tmp_path / "moved")
    tiny_processor().save_pretrained(tmp_path / "moved")
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "moved"),
        load_processor(tmp_path / "moved"),
    )
    processor.tokenizer(["a", "is there a cat"], padding=True, truncation=True, max_length=2)  # leaves settings behind
    again = make(tmp_path / "out", model=model, processor=processor)
    assert differences(again.run_identity(), first) == []


def test_a_fresh_adapter_with_other_random_numbers_is_the_same_reference(tmp_path):
    """The frozen copy of an untrained LoRA changes nothing, whatever its random half is; a trained one does."""
    models = []
    for seed in (0, 1, 1):
        torch.manual_seed(seed)
        models.append(get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])))
    with torch.no_grad():
        next(p for n, p in models[2].named_parameters() if "lora_B" in n).add_(0.1)
    runs = [make(tmp_path / str(i), model=model).run_identity() for i, model in enumerate(models)]
    assert differences(runs[1], runs[0]) == [] and differences(runs[2], runs[0]) == ["reference: weights changed"]


def test_a_step_split_otherwise_over_processes_is_the_same_order(tmp_path):
    args = SilkieDPOConfig(str(tmp_path), **{**ARGS, "gradient_accumulation_steps": 4})
    assert _order(args, 2) == _order(replace(args, gradient_accumulation_steps=1), 8) != _order(args, 8)


def test_names_of_images_are_seen_where_only_names_are_stored(tmp_path, monkeypatch):
    for name in "abc":
        image(1).save(tmp_path / f"{name}.png")

    def rows(names):
        return dataset([{**mixed_groups()[0], "images": [{"bytes": None, "path": str(tmp_path / n)}]} for n in names])

    monkeypatch.setattr("silkie.training.identity.SAMPLED_GROUPS", 2)
    same, other = (describe_data(rows(names)) for names in (["a.png", "b.png", "a.png"], ["a.png", "c.png", "a.png"]))
    assert same["content"] == other["content"] and same["images"] != other["images"]


@pytest.mark.parametrize("column", ROW_FORM)
def test_how_a_row_is_written_is_seen(column):
    """The same texts are other tokens as plain text, with other tools or with another call in their turns."""
    values = {"form": (None, "plain")}.get(column, ('["a"]', '["b"]'))
    one, other = (describe_data(dataset(mixed_groups()).add_column(column, [value] * 4)) for value in values)
    assert one["content"] != other["content"] and one["images"] == other["images"]


def test_a_changed_run_stops_before_it_writes_and_resumes_where_asked_to(tmp_path, caplog):
    """ATTACKS 2, end to end."""
    make(tmp_path).train()
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    with pytest.raises(RunChanged) as stopped:
        make(tmp_path, groups=other_response(), beta=0.3, max_steps=3).train(resume_from_checkpoint=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()) == before
    text = str(stopped.value)
    for part in ("checkpoint-2 belongs to another run", "data: content changed", "losses: beta is 0.3, was 0.1"):
        assert part in text, text
    assert "another output_dir" in text and "--on_changed_run continue" in text and "max_steps" not in text
    caplog.set_level(logging.WARNING)
    changed = make(tmp_path, groups=other_response(), beta=0.3, max_steps=3, on_changed_run="continue")
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert changed.state.global_step == 3 and "losses: beta is 0.3, was 0.1" in caplog.text
    assert "length: max_steps is 3, was 2" in caplog.text
    kept = checkpoints.read_state(tmp_path / "checkpoint-3")["identity"]
    assert differences(kept, changed.identity) == [] and kept["losses"]["beta"] == 0.3


FILES = {
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "silkie_state.json",
}


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    """ATTACKS 11 and 21: damage of the same size, in every file that a resume reads; a wrongly typed state."""
    make(tmp_path).train()
    latest, earlier = tmp_path / "checkpoint-2", str(tmp_path / "checkpoint-1")
    assert {p.name for p in latest.iterdir()} >= FILES
    for name in sorted(FILES):
        whole = (latest / name).read_bytes()
        middle = len(whole) // 2
        (latest / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        caplog.clear()
        assert checkpoints.last_complete_checkpoint(tmp_path) == earlier, name
        assert f"checkpoint-2 is not resumed from: its file {name} has changed" in caplog.text
        with pytest.raises(checkpoints.CheckpointError, match=f"damaged: its file {name} has changed"):
            checkpoints.check_chosen(latest)
        (latest / name).write_bytes(whole)
    assert checkpoints.last_complete_checkpoint(tmp_path) == str(latest)
    state = latest / checkpoints.STATE
    for wrong in ("[1, 2]", '{"objective": 3}', '{"processes": "two"}', '{"identity": []}', "[" * 100_000):
        state.write_text(wrong)
        checkpoints.mark_complete(latest)
        caplog.clear()
        assert checkpoints.last_complete_checkpoint(tmp_path) == earlier, wrong
        assert checkpoints.STATE in caplog.text
    again = make(tmp_path)
    again.train(resume_from_checkpoint=True)  # from step 1
    assert again.state.global_step == 2 and checkpoints.is_complete(latest)


class Ruin(TrainerCallback):
    """Makes a trained weight infinite between an update and the save that follows."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = float("inf")


@pytest.mark.parametrize("how", ["learning rate", "one weight"])
def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path, how):
    """ATTACKS 6: a checkpoint full of NaN was marked complete and pushed out the last good one."""
    if how == "learning rate":
        trainer = make(tmp_path, learning_rate=float("inf"), optim="sgd", save_total_limit=1)
    else:
        trainer = make(tmp_path, save_total_limit=1)
        trainer.add_callback(Ruin())
    with pytest.raises(NonFiniteError, match=r"After step .* trained weights hold NaN or infinity \(.*lora"):
        trainer.train()
    left = sorted(p.name for p in tmp_path.glob("checkpoint-*"))
    assert left == ([] if how == "learning rate" else ["checkpoint-1"])
    assert checkpoints.last_complete_checkpoint(tmp_path) == (str(tmp_path / "checkpoint-1") if left else None)
    assert not (tmp_path / LOCK).exists()


def test_the_last_step_is_looked_at_where_nothing_is_saved(tmp_path):
    """ATTACKS 6: the script's own save_model comes next."""
    with pytest.raises(NonFiniteError, match="After step 1"):
        make(tmp_path, learning_rate=float("inf"), optim="sgd", save_strategy="no", max_steps=1).train()


def test_a_late_run_unmarks_nothing(tmp_path):
    """ATTACKS 13: the late run declared the other's checkpoints unusable."""
    make(tmp_path).train()
    trainer, lock = make(tmp_path), OutputLock(tmp_path)
    lock.take()
    for late in (trainer.train, lambda: make(tmp_path)):
        with pytest.raises(OutputDirInUse, match="is in use"):
            late()
    assert checkpoints.is_complete(tmp_path / "checkpoint-2") and checkpoints.is_complete(tmp_path / "checkpoint-1")
    lock.release()


def test_a_script_that_handles_preemption_gets_it_back(tmp_path):
    """ATTACKS 15: on_preempt="return"."""
    (tmp_path / "stop").touch()
    trainer = make(tmp_path, on_preempt="return")
    trainer.train()
    assert trainer.preempted and trainer.state.global_step == 1


def test_all_processes_leave_together(tmp_path):
    """ATTACKS 2 and 15 with two processes: none of them waits for another that has left."""
    spec = {"out": str(tmp_path / "out"), "data": "mixed", "resume": True}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stop").touch()
    jobs = [{"mode": "ddp", "spec": spec}, {"mode": "ddp", "spec": {**spec, "args": {"loss_type": ["ipo"]}}}]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [sys.executable, "-m", "tests.support.fork_run", str(tmp_path / "jobs.json")], cwd=ROOT, check=True, timeout=280
    )
    stopped, changed = (set(job["codes"]) for job in json.loads((tmp_path / "jobs.out").read_text()))
    log = (tmp_path / "out" / "log.0").read_text() + (tmp_path / "out" / "log.1").read_text()
    assert PREEMPTED_EXIT_CODE in stopped and 0 not in stopped | changed, log[
        -2000:
    ]  # the first to leave ends the rest
    assert "belongs to another run" in log and 'loss_type is ["ipo"], was ["sigmoid"]' in log, log[-2000:]
    assert checkpoints.is_complete(tmp_path / "out" / "checkpoint-1") and not (tmp_path / "out" / "final").exists()
