"""Trackers: the metrics of a run and its table of sample answers arrive, offline."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data import open_image
from silkie.inference import generate
from tests.integration.test_trainer import losses
from tests.support.data import dataset
from tests.support.settings import QUIET
from tests.support.tiny import tiny_model, tiny_processor


def make(tmp_path, *, peft=True, held_out=True, **options):
    settings = dict(
        output_dir=str(tmp_path / "run"),
        learning_rate=0.1,
        per_device_train_batch_size=2,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        log_answers=3,
        **QUIET,
    )
    return SilkieDPOTrainer(
        tiny_model(),
        ref_model=None if peft else tiny_model(),
        args=SilkieDPOConfig(**{**settings, **options}),
        train_dataset=dataset(),
        eval_dataset=dataset() if held_out else None,
        processing_class=tiny_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8) if peft else None,
    )


def answers(tmp_path, step):
    return [json.loads(line) for line in (tmp_path / "run" / "answers" / f"step_{step}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "full"])
def test_the_table_holds_the_answers_of_the_base_and_of_the_policy_at_that_step(tmp_path, peft):
    trainer = make(tmp_path, peft=peft, freeze_vision=True)
    prompts = [[turn(row)] for row in dataset().select([0, 1, 2])]
    images = [[open_image(image) for image in row["images"]] for row in dataset().select([0, 1, 2])]
    before = [a[0] for a in generate(tiny_model(), trainer.processing_class, prompts, images, max_new_tokens=128)]
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    after = [a[0] for a in generate(model, trainer.processing_class, prompts, images, max_new_tokens=128)]
    last = answers(tmp_path, 2)
    assert [row["base"] for row in last] == before and [row["trained"] for row in last] == after
    assert before != after and [row["base"] for row in answers(tmp_path, 1)] == before
    assert last[0]["prompt"] == "what is in image ?"


def turn(row):
    (only,) = row["prompt"]
    parts = [{k: v for k, v in part.items() if v is not None} for part in only["content"]]
    return {"role": only["role"], "content": parts}


def test_training_does_not_depend_on_the_answers(tmp_path):
    with_answers, without = make(tmp_path / "a"), make(tmp_path / "b", log_answers=None)
    for trainer in (with_answers, without):
        trainer.train()
    assert losses(with_answers) == losses(without)


def test_answers_without_evaluation_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="log_answers"):
        make(tmp_path, held_out=False, eval_strategy="no")
    with pytest.raises(ValueError, match="log_answers"):
        make(tmp_path, log_answers=0)


def test_tensorboard_gets_metrics_table_and_images(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    make(tmp_path, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert {"train/loss", "train/rewards/margins", "eval/loss"} <= set(events.Tags()["scalars"])
    assert {"sample_answers/0", "sample_answers/1"} <= set(events.Tags()["images"])
    text = events.Tensors("sample_answers/text_summary")[-1]
    assert text.step == 2 and answers(tmp_path, 2)[0]["base"] in str(text.tensor_proto.string_val[0], "utf-8")


def test_wandb_gets_metrics_and_table(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    logged = []
    log = wandb.Run.log

    def kept(run, data, *args, **kwargs):
        logged.append(dict(data))
        log(run, data, *args, **kwargs)

    monkeypatch.setattr(wandb.Run, "log", kept)
    make(tmp_path, report_to="wandb").train()
    wandb.finish()
    assert any("train/rewards/margins" in data for data in logged)
    tables = [data["sample_answers"] for data in logged if "sample_answers" in data]
    assert len(tables) == 2 and tables[-1].columns == ["image", "prompt", "base", "trained"]
    assert tables[-1].data[0][1:] == list(answers(tmp_path, 2)[0].values()) and isinstance(
        tables[-1].data[0][0], wandb.Image
    )
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_trackio_gets_metrics_and_table(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    logged = []
    log = trackio.log
    monkeypatch.setattr(trackio, "log", lambda data, **kw: (logged.append(data), log(data, **kw)))
    make(tmp_path, report_to="trackio", project="silkie-test").train()
    tables = [data["sample_answers"] for data in logged if "sample_answers" in data]
    assert any("train/rewards/margins" in data for data in logged) and len(tables) == 2
    assert tables[-1].data[0]["prompt"] == "what is in image ?"
