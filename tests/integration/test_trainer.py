"""The trainer as a whole: layouts agree, the split of a step does not matter, runs repeat and resume bit for bit,
references and adapters are what they claim."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.model.vision import vision_parameters
from silkie.report.collect import collect
from silkie.training.non_finite import NonFiniteError
from tests.support.data import ASPECTS, dataset, group, mixed_groups
from tests.support.families import family_model, family_processor
from tests.support.settings import QUIET
from tests.support.tiny import image, tiny_model, tiny_processor


def make(tmp_path, *, model=None, family="qwen2_5_vl", data=None, peft=True, callbacks=None, ref_model=None, **options):
    defaults = dict(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        num_train_epochs=2,
        lr_scheduler_type="constant",
        **QUIET,
    )
    return SilkieDPOTrainer(
        model if model is not None else tiny_model(family),
        ref_model=ref_model,
        args=SilkieDPOConfig(**{**defaults, **options}),
        train_dataset=data if data is not None else dataset(),
        processing_class=tiny_processor(family),
        peft_config=LoraConfig(r=4, lora_alpha=8) if peft else None,
        callbacks=callbacks,
    )


def rated():
    """The mixed groups, earlier responses rated better."""
    rows = [
        {
            **row,
            "ratings": [dict.fromkeys(ASPECTS, float(5 - i)) for i in range(len(row["responses"]))],
            "rationales": [dict.fromkeys(ASPECTS, "") for _ in row["responses"]],
        }
        for row in mixed_groups()
    ]
    return dataset(rows, ASPECTS)


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def adapter(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(a, b, tolerance):
    assert a.keys() == b.keys() and a
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_layouts_train_alike(tmp_path, family):
    packed, rows = (make(tmp_path, family=family, layout=layout) for layout in ("packed", "rows"))
    packed.train(), rows.train()
    assert losses(packed) == pytest.approx(losses(rows), abs=1e-5)
    assert losses(packed)[0] == pytest.approx(0.693147, abs=1e-5) and losses(packed)[-1] < 0.6
    assert_same(
        adapter(packed), adapter(rows), 2e-4
    )  # Adam divides tiny gradients by themselves; float32 noise grows there


def test_fused_and_plain_log_probs_train_alike(tmp_path):
    fused, plain = (make(tmp_path, use_fused_logprob=f, max_steps=2) for f in (True, False))
    fused.train(), plain.train()
    assert losses(fused) == pytest.approx(losses(plain), abs=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    on, off = (make(tmp_path, gradient_checkpointing=g, max_steps=2) for g in (True, False))
    on.train(), off.train()
    assert losses(on) == pytest.approx(losses(off), abs=1e-6)


def test_a_step_does_not_depend_on_how_it_is_split(tmp_path):
    """4 groups with 2 + 1 + 1 + 3 pairs: the mean over pairs, not the mean over micro-batches."""
    whole = make(tmp_path, per_device_train_batch_size=4, num_train_epochs=3)
    split = make(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=3)
    whole.train(), split.train()
    assert losses(whole) == pytest.approx(losses(split), abs=1e-5)
    assert_same(adapter(whole), adapter(split), 2e-4)


def test_pair_weights_weigh(tmp_path):
    """A pair of weight 0 is as good as absent, and one of weight 2 as good as twice."""
    rows = mixed_groups()
    rows[0] = {**rows[0], "pairs": [[0, 1], [2, 3]], "pair_weights": [2.0, 0.0]}
    doubled = mixed_groups()
    doubled[0] = {**doubled[0], "pairs": [[0, 1], [0, 1]], "pair_weights": [1.0, 1.0]}
    a, b = (make(tmp_path, data=dataset(r), per_device_train_batch_size=4, num_train_epochs=2) for r in (rows, doubled))
    a.train(), b.train()
    assert losses(a) == pytest.approx(losses(b), abs=1e-6)


def test_reruns_are_bitwise_equal(tmp_path):
    first, second = make(tmp_path), make(tmp_path)
    first.train(), second.train()
    assert losses(first) == losses(second)
    assert_same(adapter(first), adapter(second), 0.0)


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_batch": 128}], ids=["fixed", "budget"])
def test_resuming_equals_never_stopping(tmp_path, options):
    data = dataset(
        [
            group([image(i)], "what is in image ?", ["a cat", "a dog", "yes"], [[0, 1], [0, 2]], id=str(i))
            for i in range(7)
        ]
    )
    whole = make(tmp_path / "whole", data=data, num_train_epochs=3, **options)
    whole.train()
    stopped = make(tmp_path / "part", data=data, num_train_epochs=3, save_strategy="steps", save_steps=1, **options)
    steps = whole.state.max_steps
    assert steps > 4
    stopped.train()
    for step in (1, steps // 2 + 1):  # in the middle of an epoch, in a later one
        resumed = make(tmp_path / "part", data=data, num_train_epochs=3, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{step}"))
        assert losses(resumed) == losses(whole)
        assert_same(adapter(resumed), adapter(whole), 0.0)


def test_data_workers_change_nothing_and_resume_exactly(tmp_path):
    alone = make(tmp_path / "alone", dataloader_num_workers=0, per_device_train_batch_size=1)
    helped = make(
        tmp_path / "helped",
        dataloader_num_workers=2,
        per_device_train_batch_size=1,
        save_strategy="steps",
        save_steps=3,
    )
    alone.train(), helped.train()
    assert losses(helped) == losses(alone)
    assert_same(adapter(helped), adapter(alone), 0.0)
    spawned = make(  # as in a process that was itself spawned: everything that a worker needs is pickled
        tmp_path / "spawned",
        dataloader_num_workers=1,
        dataloader_multiprocessing_context="spawn",
        per_device_train_batch_size=1,
    )
    spawned.train()
    assert losses(spawned) == losses(alone)
    resumed = make(tmp_path / "helped", dataloader_num_workers=2, per_device_train_batch_size=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "helped" / "checkpoint-3"))
    assert losses(resumed) == losses(alone)
    assert_same(adapter(resumed), adapter(alone), 0.0)


def test_tokens_between_two_lines_of_the_log_survive_a_restart(tmp_path):
    whole = make(tmp_path, logging_steps=3, save_strategy="steps", save_steps=1, max_steps=3)
    whole.train()
    resumed = make(tmp_path, logging_steps=3, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed._total_train_tokens == whole._total_train_tokens > 0


def test_reference_is_the_policy_at_the_start(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    assert losses(trainer) == pytest.approx([0.693147], abs=1e-6)
    assert trainer.reference.kind == "adapter off"


def test_second_model_as_reference_equals_adapter_off(tmp_path):
    off, second = make(tmp_path), make(tmp_path, ref_model=tiny_model())
    off.train(), second.train()
    assert second.reference.kind == "second model" and second.reference.shares_vision
    assert losses(off) == pytest.approx(losses(second), abs=1e-6)


def test_another_vision_tower_is_not_shared(tmp_path):
    trainer = make(tmp_path, ref_model=tiny_model(seed=1), max_steps=1)
    assert not trainer.reference.shares_vision
    trainer.train()
    assert losses(trainer)[0] != pytest.approx(0.693147, abs=1e-3)


def test_pre_loaded_adapter_is_its_own_reference(tmp_path):
    trained = make(tmp_path)
    trained.train()
    trained.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "adapter"), is_trainable=True)
    again = make(tmp_path, model=model, peft=False)
    again.train()
    assert again.reference.kind == "copy of the initial adapter"
    assert losses(again)[0] == pytest.approx(0.693147, abs=1e-6) and losses(again)[-1] < 0.6


def test_full_fine_tuning_freezes_the_vision_tower(tmp_path):
    model = tiny_model()
    before = [p.detach().clone() for p in vision_parameters(model)]
    trainer = make(tmp_path, model=model, ref_model=tiny_model(), peft=False, learning_rate=1e-3)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(a, b) for a, b in zip(before, vision_parameters(trainer.model), strict=True))


def test_a_trained_vision_tower_learns(tmp_path):
    model = tiny_model()
    before = [p.detach().clone() for p in vision_parameters(model)]
    trainer = make(
        tmp_path, model=model, ref_model=tiny_model(), peft=False, freeze_vision=False, learning_rate=1e-3, max_steps=1
    )
    trainer.train()
    assert not trainer.frozen_vision
    assert any(not torch.equal(a, b) for a, b in zip(before, vision_parameters(trainer.model), strict=True))


def test_lora_goes_on_the_language_model_only(tmp_path):
    trainer = make(tmp_path)
    names = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert names and all("language_model" in n and "visual" not in n for n in names)
    kinds = {n.split(".lora_")[0].rsplit(".", 1)[1] for n in names}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_checkpointing_puts_no_hook_on_a_frozen_vision_tower_and_hooks_do_not_pile_up(tmp_path):
    def hooks(trainer):
        base = trainer.model.get_base_model()
        return sum(len(m._forward_hooks) for m in base.modules()), sum(
            len(m._forward_hooks) for m in base.model.visual.modules()
        )

    trainer = make(tmp_path, gradient_checkpointing=True, num_train_epochs=1)
    trainer.train()
    after_one = hooks(trainer)
    assert after_one[1] == 0
    trainer.args.num_train_epochs = 4
    trainer.train()
    assert hooks(trainer)[0] <= after_one[0] + 1


def test_a_lora_config_serves_models_of_several_families(tmp_path):
    """Each finds its own targets; those of Qwen would hit LLaVA's vision tower."""
    config = LoraConfig(r=4)
    for family in ("qwen2_5_vl", "llava_onevision"):
        trainer = SilkieDPOTrainer(
            family_model(family),
            args=make(tmp_path).args,
            train_dataset=dataset(),
            processing_class=family_processor(family),
            peft_config=config,
        )
        assert trainer.frozen_vision and config.target_modules is None


def test_an_adapter_on_the_vision_tower_that_the_caller_made_trains(tmp_path):
    """`freeze_vision` is for full fine-tuning: what an adapter was put on is the caller's choice."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=r".*\.(q_proj|qkv)"))
    trainer = make(tmp_path, model=model, peft=False)
    trainer.train()
    moved = [p for n, p in trainer.model.named_parameters() if "visual" in n and "lora_B.default" in n]
    assert moved and all(p.abs().max() > 0 for p in moved)


def test_adapter_on_the_output_head_trains(tmp_path):
    trainer = SilkieDPOTrainer(
        tiny_model(),
        args=make(tmp_path).args,
        train_dataset=dataset(),
        processing_class=tiny_processor(),
        peft_config=LoraConfig(r=4, target_modules=["lm_head"]),
    )
    trainer.train()
    head = {n: p for n, p in trainer.model.named_parameters() if "lm_head.lora_B" in n and ".default" in n}
    assert head and all(p.abs().max() > 0 for p in head.values())
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_loss_without_reference_runs_none(tmp_path):
    trainer = make(tmp_path, loss_type=["simpo"], beta=2.0)
    assert trainer.reference is None
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_a_loss_without_reference_keeps_no_second_model(tmp_path):
    """TRL loads one for full fine-tuning, whatever the loss."""
    tiny_model().save_pretrained(tmp_path / "base")
    read, unread = (
        make(tmp_path, model=str(tmp_path / "base"), peft=False, loss_type=[loss]) for loss in ("sigmoid", "orpo")
    )
    assert read.ref_model is not None and read.reference.kind == "second model"
    assert unread.ref_model is None and unread.reference is None


def test_a_broken_checkpoint_is_not_blamed_on_packing(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.language_model.norm.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="even in the model's plain forward.*look at the checkpoint"):
        make(tmp_path, model=model)


def test_options_that_read_ratings_need_them(tmp_path):
    with pytest.raises(ValueError, match="`margin='weight'` reads ratings, and the data has none"):
        make(tmp_path, margin="weight")
    with pytest.raises(
        ValueError, match=r"names \['Wit'\]; the data is rated on \['Helpfulness', 'Visual Faithfulness'\]"
    ):
        make(tmp_path, data=rated(), aspect_weights={"Wit": 1.0})


def test_the_evaluation_loss_is_that_of_the_whole_set(tmp_path):
    """Pairs, tokens and groups are counted over the set, not averaged over batches of unlike size."""
    options = dict(loss_type=["sigmoid", "sft", "plackett_luce"], loss_weights=[1.0, 0.5, 0.3], max_steps=2)
    small, whole = (make(tmp_path, data=rated(), per_device_eval_batch_size=n, **options) for n in (1, 4))
    found = []
    for trainer in (small, whole):
        trainer.eval_dataset = trainer.train_dataset
        trainer.train()
        found.append(trainer.evaluate()["eval_loss"])
    with torch.no_grad():
        batch = whole._prepare_inputs(whole.data_collator([whole.train_dataset[i] for i in range(4)]))
        assert found == pytest.approx([float(whole.compute_loss(whole.model.eval(), batch))] * 2, abs=1e-5)


def test_the_evaluation_loss_goes_by_its_prefix_and_no_other_metric_is_one(tmp_path):
    trainer = make(tmp_path, data=dataset(mixed_groups()), per_device_eval_batch_size=1)
    trainer.train()
    trainer.eval_dataset = trainer.train_dataset
    trainer.compute_metrics = lambda prediction: {"ranking_loss": 3.0}
    usual, named = trainer.evaluate(), trainer.evaluate(metric_key_prefix="eval_mine")
    other = trainer.evaluate(metric_key_prefix="val")
    assert usual["eval_ranking_loss"] == named["eval_mine_ranking_loss"] == other["val_ranking_loss"] == 3.0
    assert usual["eval_loss"] == named["eval_mine_loss"] == other["val_loss"]


def test_evaluation_takes_data_that_was_not_there_at_the_start(tmp_path):
    trainer = make(tmp_path)
    turns = {"prompt": ("user", "is there a dog"), "chosen": ("assistant", "no"), "rejected": ("assistant", "yes yes")}
    pair = {column: [{"role": role, "content": text}] for column, (role, text) in turns.items()}
    groups = dataset([group([], "is there a dog", ["no", "yes yes"], [[0, 1]])])
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter += torch.linspace(-0.1, 0.1, 4)  # the policy leaves the reference
    found = [trainer.evaluate(eval_dataset=data)["eval_loss"] for data in (groups, Dataset.from_list([pair]))]
    assert found[0] == found[1] != pytest.approx(0.693147, abs=1e-4)


def test_trl_metric_names_and_evaluation(tmp_path):
    trainer = make(tmp_path, log_token_stats=True, num_train_epochs=1)
    trainer.eval_dataset = trainer.train_dataset
    trainer.train()
    metrics = trainer.evaluate()
    logged = next(e for e in trainer.state.log_history if "loss" in e)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
        "num_tokens",
    ):
        assert name in logged, name
        assert name == "num_tokens" or f"eval_{name}" in metrics, name
    assert 0 < metrics["eval_loss"] < 1


def test_margin_weights_come_from_the_ratings(tmp_path):
    plain, weighted = (
        make(tmp_path, data=rated(), margin=m, per_device_train_batch_size=4) for m in ("none", "weight")
    )
    plain.train(), weighted.train()
    assert losses(plain)[0] == pytest.approx(losses(weighted)[0], abs=1e-6)  # both are log 2 at the start
    assert losses(plain)[1] != pytest.approx(losses(weighted)[1], abs=1e-6)


def test_saved_adapter_card_and_processor(tmp_path):
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    trainer = SilkieDPOTrainer(
        str(tmp_path / "base"), args=make(tmp_path / "out").args, train_dataset=dataset(), peft_config=LoraConfig(r=4)
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    out = Path(tmp_path / "out")
    assert (out / "adapter_model.safetensors").exists() and not list(out.glob("*model*.bin"))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    card = (out / "README.md").read_text()
    for text in ("silkie", "4 groups", "| last |", '"beta": 0.1', "transformers 5."):
        assert text in card, text
    assert str(tmp_path) not in card
    assert (out / "tokenizer.json").exists() and (out / "chat_template.jinja").exists()


def test_the_report_of_a_run_shows_its_configuration_and_data(tmp_path):
    trainer = make(tmp_path / "run", beta=0.3, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    shown = collect(tmp_path / "run")
    assert (
        shown.configuration["Training"] | {"beta": 0.3, "loss_type": ["sigmoid"], "seed": 42}
        == shown.configuration["Training"]
    )
    assert shown.configuration["Run"]["layout"].startswith("packed")
    assert shown.configuration["Adapter"]["rank"] == trainer.model.peft_config["default"].r
    report = trainer.reports["train"]
    assert report.groups == shown.data["train"]["groups"] == 4 and shown.data["train"]["pairs"] == report.pairs
    assert str(tmp_path) not in (tmp_path / "run" / "silkie_run.json").read_text()


def test_peft_model_from_outside(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=True))
    trainer = make(tmp_path, model=model, peft=False)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_benchmarks_while_training_are_logged_and_disturb_nothing(tmp_path):
    folder = tmp_path / "pope"
    (folder / "images").mkdir(parents=True)
    with (folder / "pope_random.jsonl").open("w") as file:
        for n in range(4):
            image(n).save(folder / "images" / f"{n}.png")
            question = {
                "question_id": n,
                "image": f"{n}.png",
                "text": "Is there a cat in the image?",
                "label": "yes" if n % 2 else "no",
            }
            file.write(json.dumps(question) + "\n")
    plain = make(tmp_path / "a")
    watched = make(tmp_path / "b", eval_benchmarks=[f"pope={folder}"], eval_benchmark_steps=2)
    plain.train(), watched.train()
    assert losses(plain) == losses(watched)
    scored = [entry for entry in watched.state.log_history if any(key.startswith("eval_pope") for key in entry)]
    assert [entry["step"] for entry in scored] == [2, 4]
