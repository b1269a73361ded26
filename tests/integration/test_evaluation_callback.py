"""Benchmarks while training: scores in the log at the right steps, and the training itself untouched by them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from silkie.evaluation import get_benchmark
from silkie.evaluation.callback import BenchmarkCallback, parse_benchmarks, preserved_random_state
from silkie.evaluation.run import question_tasks
from silkie.inference import generate
from tests.integration.test_trainer import losses, make


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "pope"
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(5):
        Image.new("RGB", (56, 56), (i * 40, 90, 30)).save(folder / "images" / f"{i}.png")
        rows.append(
            {
                "question_id": i,
                "image": f"{i}.png",
                "text": "is there a dog in the image",
                "label": ("yes", "no")[i % 2],
            }
        )
    (folder / "coco_pope_random.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_scores_are_logged_every_n_steps_and_training_is_not_disturbed(tmp_path, data):
    callback = BenchmarkCallback([f"pope={data}"], 2, batch_size=2, at_start=True, categories=True)
    watched = make(tmp_path / "a", callbacks=[callback], max_steps=5)
    callback.trainer = watched
    watched.train()
    scored = [entry for entry in watched.state.log_history if "eval_pope_accuracy" in entry]
    assert [entry["step"] for entry in scored] == [0, 2, 4, 5]
    assert all(0 <= entry["eval_pope_accuracy"] <= 1 and "eval_pope_random_accuracy" in entry for entry in scored)
    assert not any("loss" in entry or "rewards/margins" in entry for entry in scored), (
        "a score's entry holds scores alone"
    )
    plain = make(tmp_path / "b", max_steps=5)
    plain.train()
    assert losses(watched) == losses(plain), "dropout and the order of the data must not depend on evaluations"
    keys = ("step", "rewards/margins", "rewards/accuracies", "grad_norm")
    regular = [[[e[k] for k in keys] for e in t.state.log_history if "grad_norm" in e] for t in (watched, plain)]
    assert regular[0] == regular[1] and len(regular[0]) == 5


def test_the_logged_score_is_that_of_the_policy_at_that_step(tmp_path, data):
    callback = BenchmarkCallback({"pope": str(data)}, 100, batch_size=2)
    trainer = make(tmp_path / "a", callbacks=[callback], max_steps=3, learning_rate=0.1)
    callback.trainer = trainer
    trainer.train()
    file = tmp_path / "a" / "benchmarks" / "answers_pope_step3.jsonl"
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    benchmark = get_benchmark("pope")
    tasks = question_tasks(benchmark, benchmark.load_questions(data), data)
    prompts = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.prompt}]}] for task in tasks
    ]
    images = [[Image.open(task.images[0])] for task in tasks]
    model, processor = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    expected = [text for (text,) in generate(model, processor, prompts, images, max_new_tokens=16, batch_size=2)]
    assert [row["answer"] for row in answers] == expected
    logged = next(entry for entry in trainer.state.log_history if "eval_pope_accuracy" in entry)
    assert logged["eval_pope_accuracy"] == benchmark.score_results(file).metrics["accuracy"]


def test_it_works_with_the_plain_trainer_too(tmp_path, data):
    from tests.support.tiny import tiny_model, tiny_processor

    class Constant(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"input_ids": torch.tensor([9, 10, 11]), "labels": torch.tensor([9, 10, 11])}

    args = TrainingArguments(
        str(tmp_path / "o"), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    callback = BenchmarkCallback([f"pope={data}"], 1, limit=2)
    trainer = Trainer(
        tiny_model(), args, train_dataset=Constant(), processing_class=tiny_processor(), callbacks=[callback]
    )
    callback.trainer = trainer
    trainer.train()
    assert any("eval_pope_f1" in entry for entry in trainer.state.log_history)
    assert len((tmp_path / "o" / "benchmarks" / "answers_pope_step1.jsonl").read_text().splitlines()) == 2


def test_bad_settings_are_refused_before_training(tmp_path, data):
    with pytest.raises(ValueError, match="mmhal needs a judge"):
        (data / "response_template.json").write_text("[]")
        BenchmarkCallback([f"mmhal={data}"], 10)
    with pytest.raises(ValueError, match="expected 'name=folder of its data'"):
        parse_benchmarks(["pope"])
    with pytest.raises(ValueError, match="at least 1"):
        BenchmarkCallback([f"pope={data}"], 0)
    assert parse_benchmarks(["a/kitchen.yaml"]) == {"a/kitchen.yaml": "a"}
    trainer = make(tmp_path / "a", callbacks=[BenchmarkCallback([f"pope={data}"], 1)], max_steps=1)
    with pytest.raises(ValueError, match="has no trainer"):
        trainer.train()


def test_the_random_state_is_put_back_after_an_error():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="x"), preserved_random_state():
        torch.manual_seed(4)
        raise RuntimeError("x")
    assert torch.equal(torch.random.get_rng_state(), before)
