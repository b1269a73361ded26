"""Which layout runs and why, the self-test at start-up, and the vision tower once per step."""

import logging
import types
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, Image, List
from peft import LoraConfig, get_peft_model

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.batch.encoding import GroupEncoder
from silkie.batch.packing import visible
from silkie.model import families
from silkie.model.attention import Attention, api, segments
from silkie.model.families import FAMILIES as FAMILY_ROWS
from silkie.model.families import backbone
from silkie.model.layout import choose_layout
from silkie.model.recurrent import fork
from silkie.model.vision import vision_parameters
from silkie.training.self_test import LayoutMismatch, TokenMismatch, groups_to_test
from tests.support.data import dataset, group, mixed_groups
from tests.support.families import FAMILIES, QWEN, family_model, family_processor
from tests.support.hybrid import qwen3_5
from tests.support.scoring import gradients, groups, score, stock_logps
from tests.support.settings import QUIET
from tests.support.tiny import image, tiny_model, tiny_processor


def make(tmp_path, model=None, data=None, peft=True, processor=None, **options):
    arguments = dict(
        output_dir=str(tmp_path),
        max_steps=1,
        **QUIET,
    )
    return SilkieDPOTrainer(
        model if model is not None else tiny_model(),
        args=SilkieDPOConfig(**{**arguments, "per_device_train_batch_size": 4, **options}),
        train_dataset=data if data is not None else dataset(),
        processing_class=processor or tiny_processor(),
        peft_config=LoraConfig(r=4) if peft else None,
    )


def test_a_hybrid_model_is_packed_and_the_log_says_how(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie"):
        trainer = make(tmp_path, qwen3_5(), layout="auto")
        trainer.train()
    assert trainer.choice.layout == "packed"
    assert "layout: packed (3 recurrent layers start each response from the state of its prompt)" in caplog.text
    assert "Qwen3_5GatedDeltaNet starts from the state of a prompt with transformers' code in float32" in caplog.text
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_hybrid_model_whose_mixers_forget_trains_in_rows_with_the_reason(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fork.States, "get_recurrent_state", lambda self, *args, **kwargs: None)  # as Mamba-1 does
    with pytest.raises(ValueError, match="Qwen3_5GatedDeltaNet does not start from the state of a prompt"):
        make(tmp_path, qwen3_5(), layout="packed")
    with caplog.at_level(logging.INFO, logger="silkie"):
        trainer = make(tmp_path, qwen3_5(), layout="auto")
        trainer.train()
    assert trainer.choice.layout == "rows"
    assert "layout: rows (Qwen3_5GatedDeltaNet does not start from" in caplog.text
    assert any("one row per response" in r.message for r in caplog.records if r.levelname == "WARNING"), (
        "seen where no log is configured"
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)


_PRECISION = {"bf16": False, "fp16": False, "share_prefix": "off"}


def choose(config, **options):
    return choose_layout(
        config,
        types.SimpleNamespace(
            **{"layout": "auto", "attention_backend": "auto", "device": torch.device("cpu"), **_PRECISION, **options}
        ),
    )


@pytest.mark.parametrize("kind", ["indexed_attention"])
def test_other_layers_of_a_known_family_are_refused_by_name(kind):
    config = tiny_model().config
    config.text_config.layer_types = [kind, "full_attention"]
    assert choose(config).layout == "rows" and kind in choose(config).reason
    with pytest.raises(ValueError, match=kind):
        choose(config, layout="packed")


def test_recurrent_layers_that_the_model_does_not_have_are_refused():
    config = tiny_model().config
    config.text_config.layer_types = ["linear_attention", "full_attention"]
    assert "1 of its layers are recurrent, but 0 modules keep states" in choose(config).reason


def test_a_model_that_merges_no_images_into_its_text_is_refused(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.delattr(type(backbone(model)), "get_image_features")  # as Mllama, which attends to its images across
    with pytest.raises(ValueError, match="Qwen2_5_VLForConditionalGeneration does not merge image features"):
        make(tmp_path, model)


@pytest.mark.parametrize("family", [*QWEN, *FAMILIES])
def test_families_are_packed_and_on_a_cpu_by_segment(family):
    choice = choose(family_model(family).config)
    assert (choice.layout, choice.backend, choice.groups_per_row) == ("packed", "segments", 1)


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_backends_for_cuda_are_an_error_elsewhere(tmp_path, backend):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        make(tmp_path, attention_backend=backend)


def test_the_log_says_what_runs_and_why(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie"):
        make(tmp_path).train()
    for line in (
        "layout: packed (qwen2_5_vl has full attention only",
        "attention: segments (sdpa without the scores that nothing sees",
        "self-test: layout='packed' equals the model's plain forward",
        "encoded once",
    ):
        assert line in caplog.text


def everything_visible(*args, **kwargs):
    """A broken mask: causal along the row, siblings and all."""
    return torch.ones_like(visible(*args, **kwargs)).tril()


def test_the_self_test_stops_a_broken_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "visible", everything_visible)
    trainer = make(tmp_path, layout="packed")
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    with pytest.raises(LayoutMismatch, match=r"Self-test failed.*layout='rows'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if p.requires_grad)


def test_it_can_be_switched_off_and_auto_takes_rows_where_it_fails(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(api, "visible", everything_visible)
    make(tmp_path, self_test=False, layout="packed").train()
    caplog.clear()
    trainer = make(tmp_path)
    assert trainer.choice.layout == trainer.data_collator.layout == trainer.passes.forward.attention.layout == "rows"
    assert "runs one row per response, which costs more: Self-test failed" in caplog.text
    trainer.train()


def without_types(encode):
    """As if silkie knew nothing of a family's per-token inputs: its image tokens become causal."""

    def stripped(self, row):
        group = encode(self, row)
        return replace(group, token_inputs={name: v * 0 for name, v in group.token_inputs.items()})

    return stripped


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_the_self_test_stops_a_causal_mask_on_a_two_way_family(tmp_path, monkeypatch, layout):
    model, processor = family_model("gemma3"), family_processor("gemma3")
    monkeypatch.setattr(GroupEncoder, "encode", without_types(GroupEncoder.encode))
    with pytest.raises(LayoutMismatch, match=rf"layout='{layout}'.*differ.*full_attention, sliding_attention layers"):
        make(tmp_path, model, processor=processor, layout=layout).train()


def test_the_self_test_stops_a_wrong_type_id(tmp_path, monkeypatch):
    """PaliGemma's responses have type 1; with type 0 they would be a part of the two-way prefix."""
    monkeypatch.setattr(families, "FAMILIES", {"paligemma": replace(FAMILY_ROWS["paligemma"], response_types={})})
    model, processor = family_model("paligemma"), family_processor("paligemma")
    data = dataset([row for row in mixed_groups() if row["images"]])
    with pytest.raises(LayoutMismatch, match="layout='rows' the log-probs of the first groups differ"):
        make(tmp_path, model, data, processor=processor, layout="rows").train()


def test_the_self_test_stops_tokens_that_the_template_does_not_write(tmp_path, monkeypatch):
    trainer = make(tmp_path, layout="rows")
    encode = GroupEncoder.encode

    def with_another_end(self, row):
        group = encode(self, row)
        return replace(group, responses=[torch.cat([r, r[:1]]) for r in group.responses])

    monkeypatch.setattr(GroupEncoder, "encode", with_another_end)
    with pytest.raises(TokenMismatch, match="differ from token .*chat_template_kwargs"):
        trainer.train()


def test_a_path_that_crashes_is_told_by_name(tmp_path, monkeypatch):
    trainer = make(tmp_path, layout="rows")
    monkeypatch.setattr(Attention, "inputs", lambda *_: 1 / None)
    with pytest.raises(LayoutMismatch, match="Qwen2_5_VLForConditionalGeneration cannot run in layout='rows'"):
        trainer.train()


def test_groups_of_both_kinds_and_of_different_length_are_tested():
    rows = [{"prompt_length": n, "images": images} for n, images in [(5, [1]), (5, [1]), (5, []), (7, [1]), (9, [])]]
    assert groups_to_test(rows) == [rows[0], rows[2], rows[3]]
    parted = [{"prompt_length": n % 5, "images": []} for n in range(9)]
    assert groups_to_test(parted) == parted[:2] and groups_to_test(parted, lengths=4) == parted[:4]
    assert groups_to_test(rows[:2]) == rows[:2] and groups_to_test(rows[3:]) == rows[3:]


def test_two_groups_with_images_are_tested_where_there_are_two():
    """One alone would not show how the image tensors of several groups are joined."""
    rows = [{"prompt_length": n, "images": images} for n, images in [(5, [1]), (7, []), (9, []), (5, [1])]]
    assert groups_to_test(rows) == [rows[0], rows[1], rows[3]]


def count_encodings(trainer):
    """Pixel rows that went through the vision tower, per call."""
    calls = []
    backbone(trainer.model).visual.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len((args or tuple(kwargs.values()))[0])), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("layout", ["packed", "rows"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_image_is_encoded_once_per_step(tmp_path, layout, checkpointing):
    """4 groups, 13 responses, policy and reference, with recomputation: one run over the images of the batch."""
    trainer = make(
        tmp_path, layout=layout, gradient_checkpointing=checkpointing, self_test=False, max_steps=3, vision_cache="off"
    )
    calls = count_encodings(trainer)
    trainer.train()
    patches = sum(
        len(trainer.encoder.encode(trainer.train_dataset[i]).vision.get("pixel_values", [])) for i in range(4)
    )
    assert calls == [patches] * 3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_a_trainable_vision_tower_gets_exact_gradients(family, layout):
    model, processor, rows = family_model(family).double().train(), family_processor(family), groups(family)
    truth = gradients(model, stock_logps(family, model, processor, rows))
    found = gradients(model, score(model, processor, rows, layout).logps)
    names = {n for n, p in model.named_parameters() if any(p is q for q in vision_parameters(model))}
    assert len(names & found.keys()) > 10
    for name in truth:
        assert (found[name] - truth[name]).abs().max() < 1e-6 * max(1.0, truth[name].abs().max().item()), name


def test_an_adapted_vision_tower_gets_exact_gradients_in_both_layouts(tmp_path):
    found = []
    for layout in ("packed", "rows"):
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_model().double(),
            LoraConfig(r=4, target_modules=r".*visual.*\.(qkv|proj)"),
            autocast_adapter_dtype=False,
        ).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        found.append(gradients(model, score(model, tiny_processor(), groups("qwen2_5_vl"), layout).logps))
    assert len(found[0]) >= 8 and all(g.norm() > 1e-8 for g in found[0].values())
    for name in found[0]:
        assert (found[0][name] - found[1][name]).abs().max() < 1e-6 * max(1.0, found[0][name].abs().max().item()), name


def test_pair_rows_are_regrouped_and_the_log_says_what_it_saves(tmp_path, caplog):
    pairs = [
        group([image(0)], "what is in image ?", ["a cat", other], [[0, 1]]) for other in ("a dog", "yes", "no")
    ] + mixed_groups()[1:2]
    rows = [
        {
            "images": g["images"],
            "prompt": g["prompt"],
            "chosen": _turn(g["responses"][0]),
            "rejected": _turn(g["responses"][1]),
        }
        for g in pairs
    ]
    data = Dataset.from_list(rows).cast_column("images", List(Image()))
    with caplog.at_level(logging.INFO, logger="silkie"):
        trainer = make(tmp_path, data=data)
    assert len(trainer.train_dataset) == 2 and sorted(len(r) for r in trainer.train_dataset["responses"]) == [2, 4]
    assert "regrouped 4 pair rows into 2 groups" in caplog.text and "saved" in caplog.text


def _turn(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def test_a_second_reference_model_runs_the_same_attention(tmp_path, monkeypatch):
    """Masks are made for one backend; a reference model left on its own would misread them."""
    monkeypatch.setattr(segments, "SHORTEST_ROW", 0)
    args = SilkieDPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        attention_backend="segments",
        **QUIET,
    )
    trainer = SilkieDPOTrainer(
        tiny_model(), ref_model=tiny_model(), args=args, train_dataset=dataset(), processing_class=tiny_processor()
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
