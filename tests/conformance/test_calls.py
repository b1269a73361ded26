"""What TRL's users call on a trainer, in the installed TRL and in silkie."""

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from tests.conformance.cases import many
from tests.conformance.compare import METRICS, Case, build, chats, history, language_model, options
from tests.support.tiny import tiny_model, tiny_processor, tiny_tokenizer

BOTH = [(DPOTrainer, DPOConfig), (SilkieDPOTrainer, SilkieDPOConfig)]
CASE = Case(name="chat")


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


@pytest.mark.parametrize("rows", [chats(False), [{"prompt": "is it ?", "chosen": " yes", "rejected": " no"}] * 2])
def test_language_models_pack_and_equal_trl(rows, tmp_path):
    case, logs = Case(name="text", rows=rows), []
    for cls, config in BOTH:
        trainer = cls(
            language_model(),
            args=config(**options(tmp_path, case)),
            train_dataset=case.dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        )
        logs.append(history(trainer, METRICS))
    np.testing.assert_allclose(logs[0], logs[1], atol=1e-5)
    assert trainer.choice.layout == "packed"


def test_a_tokenizer_refuses_images(tmp_path):
    with pytest.raises(ValueError, match="processing_class is a tokenizer"):
        build(SilkieDPOTrainer, SilkieDPOConfig, CASE, tmp_path, processing_class=tiny_tokenizer())


def test_arguments_by_position(tmp_path):
    for cls, config in BOTH:
        args = config(**options(tmp_path, CASE))
        trainer = cls(tiny_model(), tiny_model(), args, None, CASE.dataset(), None, tiny_processor())
        assert len(trainer.train_dataset) == 2


def test_a_plain_dpo_config_is_taken_over(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie"):
        taken = build(SilkieDPOTrainer, DPOConfig, CASE, tmp_path)
    assert sum("DPOConfig" in record.getMessage() for record in caplog.records) == 1
    assert isinstance(taken.args, SilkieDPOConfig) and taken.args.learning_rate == 0.05
    assert history(taken, METRICS) == history(build(SilkieDPOTrainer, SilkieDPOConfig, CASE, tmp_path), METRICS)
    with pytest.raises(ValueError, match="truncation_mode"):
        SilkieDPOConfig.from_trl(DPOConfig(**options(tmp_path, CASE), truncation_mode="keep_end"))


def test_a_collator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="with_transform"):
        build(SilkieDPOTrainer, SilkieDPOConfig, CASE, tmp_path, data_collator=lambda rows: rows)


def test_a_collator_of_trl_is_taken_for_what_it_says_of_lengths(tmp_path):
    """Its max_length cuts answers: the same numbers with it given to both, and others without."""
    case, logs = Case(name="text", rows=chats(False)), []
    for cls, config in BOTH:
        collator = DataCollatorForPreference(pad_token_id=0, max_length=17, pad_to_multiple_of=8)
        trainer = build(cls, config, case, tmp_path, data_collator=collator)
        logs.append(history(trainer, METRICS))
    np.testing.assert_allclose(logs[0], logs[1], atol=1e-5)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 8 == 0
    assert not np.allclose(
        logs[1], history(build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path), METRICS), atol=1e-3
    )
    with pytest.raises(ValueError, match="keep_end"):
        collator = DataCollatorForPreference(pad_token_id=0, max_length=17, truncation_mode="keep_end")
        build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path, data_collator=collator)


def test_a_text_model_gets_pefts_own_targets_where_none_are_named(tmp_path):
    trained = []
    for cls, config in BOTH:
        case = Case(name="text", rows=chats(False))
        trainer = cls(
            language_model(),
            args=config(**options(tmp_path, case)),
            train_dataset=case.dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4),
        )
        trained.append({name for name, p in trainer.model.named_parameters() if p.requires_grad})
    assert trained[0] == trained[1] and any("q_proj" in name for name in trained[1])


@pytest.mark.parametrize("option", [{"log_answers": 2}, {"eval_benchmarks": ["pope=data"]}], ids=str)
def test_a_text_model_answers_no_questions_on_images(tmp_path, option):
    """It was a KeyError at the start, or an AttributeError at the first evaluation."""
    case = Case(name="text", rows=chats(False))
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` .* processor"):
        SilkieDPOTrainer(
            language_model(),
            args=SilkieDPOConfig(**{**options(tmp_path, case), **option}),
            train_dataset=case.dataset(),
            eval_dataset=case.dataset(),
            processing_class=tiny_tokenizer(),
            peft_config=LoraConfig(r=4),
        )


@pytest.mark.parametrize("rows", [None, 3])
def test_evaluation_logs_everything_that_trl_does(rows, tmp_path):
    """Names and, with batches of one size, values."""
    case, logs = Case(name="eval", options={"eval_strategy": "steps", "eval_steps": 1}), []
    for cls, config in BOTH:
        own = {"log_token_stats": True} if cls is SilkieDPOTrainer else {}
        data = datasets.Dataset.from_list(many(rows) if rows else chats())
        args = config(**{**options(tmp_path, case), **own})
        trainer = build(cls, config, case, tmp_path, args=args, eval_dataset=data)
        trainer.train()
        logs.append([e for e in trainer.state.log_history if "eval_loss" in e])
    for theirs, ours in zip(*logs, strict=True):
        assert set(theirs) - set(ours) == set()
        for name in theirs if rows is None else ("eval_num_tokens",):
            if "runtime" not in name and "per_second" not in name:
                assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name


def test_inputs_for_metrics_are_the_rows_of_trl(tmp_path):
    shapes = []
    for cls, config in BOTH:
        case = Case(name="inputs", options={"include_for_metrics": ["inputs"]})
        metric = lambda prediction: shapes.append(np.shape(prediction.inputs)) or {}  # noqa: E731
        build(cls, config, case, tmp_path, compute_metrics=metric, eval_dataset=case.dataset()).evaluate()
    assert shapes[0] == shapes[1]


def test_compute_metrics_gets_the_logits_and_ids_of_trl(tmp_path):
    seen = []

    def metric(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"mine": 1.0}

    case = Case(name="eval", options={"eval_strategy": "no"})
    results = []
    for cls, config in BOTH:
        trainer = build(cls, config, case, tmp_path, compute_metrics=metric, eval_dataset=case.dataset())
        results.append(trainer.evaluate())
    assert results[1]["eval_mine"] == 1.0
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-6)
    (logits, ids), (own_logits, own_ids) = seen
    words = own_ids != tiny_tokenizer().pad_token_id  # of id 0, for which TRL takes the end token
    assert ids.shape == own_ids.shape and np.array_equal(ids[words], own_ids[words])
    np.testing.assert_allclose(logits[words], own_logits[words], atol=1e-4)


def test_predict_on_raw_rows(tmp_path):
    outputs = [build(cls, config, CASE, tmp_path).predict(CASE.dataset()) for cls, config in BOTH]
    theirs, ours = outputs
    words = ours.label_ids != tiny_tokenizer().pad_token_id
    assert np.array_equal(theirs.label_ids[words], ours.label_ids[words])
    np.testing.assert_allclose(theirs.predictions[words], ours.predictions[words], atol=1e-4)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], abs=1e-6)


def test_evaluate_on_raw_rows_and_on_a_dict(tmp_path):
    for data in (CASE.dataset(), {"a": CASE.dataset(), "b": CASE.dataset()}):
        theirs, ours = (build(cls, config, CASE, tmp_path).evaluate(data) for cls, config in BOTH)
        for name in (key for key in theirs if key.endswith("loss") or "rewards" in key):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


@pytest.mark.parametrize("more", [{}, {"ld_alpha": 0.5}])
def test_reference_log_probs_of_a_batch(more, tmp_path):
    case, found = Case(name="reference", options=more), []
    for cls, config in BOTH:
        trainer = build(cls, config, case, tmp_path)
        batch = next(iter(trainer.get_train_dataloader()))
        found.append(sorted(map(tuple, torch.stack(trainer.compute_ref_log_probs(trainer.model, batch), 1).tolist())))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_the_model_card_has_its_arguments_and_references(tmp_path):
    trainer = build(SilkieDPOTrainer, SilkieDPOConfig, CASE, tmp_path)
    trainer.create_model_card(model_name="my-model", dataset_name="org/data", tags=["mine"])
    for card in (Path(trainer.args.output_dir, "README.md"), tmp_path / "saved" / "README.md"):
        if not card.exists():
            trainer.save_model(str(card.parent))  # a card written later keeps them
        text = card.read_text()
        header = yaml.safe_load(text.split("---")[1])
        assert header["datasets"] == ["org/data"] and header["tags"] == ["mine", "silkie", "trl", "dpo"]
        assert "# my-model" in text and "2305.18290" in text
    trainer.create_model_card(dataset_name=["org/data", "org/more"])
    text = Path(trainer.args.output_dir, "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["datasets"] == ["org/data", "org/more"]
    assert "on `org/data`, `org/more`" in text


def test_a_stream_must_say_how_long_the_run_is(tmp_path):
    stream = CASE.dataset().to_iterable_dataset()
    case = Case(name="stream", rows=lambda: stream, options={"max_steps": -1})
    with pytest.raises(ValueError, match="max_steps"):
        build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path)
