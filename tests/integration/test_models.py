"""Any vision-language type: exact in the layout that `auto` takes, or refused by name."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from silkie import SilkieDPOConfig
from silkie.batch.collator import Join, _how_joined, _join_vision, image_joins
from silkie.batch.encoding import GroupEncoder
from silkie.model import tiny
from silkie.model.__main__ import _pictures, check_named, main
from silkie.model.adapters import coverage, lora_targets, with_default_targets
from silkie.model.families import check_merges_images
from silkie.model.vision import describe_vision, freeze_vision, vision_is_frozen, vision_parts
from silkie.training.guards import LaunchError, check_adapter_on_vision, warn_of_untrained_vision
from silkie.training.self_test import TokenMismatch, plain_logps

MOST_USED = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5",
    "qwen3_vl_moe",
    "qwen3_5_moe",
    "gemma3",
    "gemma4",
    "llava",
    "internvl",
    "idefics3",
    "glm4v",
]


@pytest.mark.parametrize("model_type", MOST_USED)
def test_the_most_used_types_are_exact(model_type):
    verdict = check_named(model_type)
    assert verdict.exact, verdict.why
    assert verdict.coverage.share > 0.9, verdict.coverage


@pytest.mark.slow
def test_no_type_is_silently_different():
    """Every type that can be built: exact, or told why not."""
    verdicts = [check_named(name) for name in tiny.types()]
    assert sum(v.exact for v in verdicts) >= 45
    assert all(v.exact or v.why for v in verdicts)
    assert not [v.name for v in verdicts if v.why.startswith("not exact")]


def test_check_prints_a_verdict_and_says_by_its_exit_status_whether_a_model_trains(capsys):
    assert main(["check", "llava"]) == 0
    assert "llava: exact" in (shown := capsys.readouterr().out) and "100.0 % of the text weights" in shown
    assert main(["check", "blip"]) == 1
    assert "does not merge image features" in capsys.readouterr().out


def test_what_is_no_model_is_told(tmp_path, capsys):
    def told(name):
        with pytest.raises(SystemExit):
            main(["check", name])
        return capsys.readouterr().err

    assert f"{tmp_path / 'nowhere'} is not a directory" in told(str(tmp_path / "nowhere"))
    assert "qwen2_5_vl" in told("qwen2.5_vl")
    assert "no usable config.json of a model" in told(str(tmp_path))
    tiny.tiny("llava")[0].save_pretrained(tmp_path)
    assert "no usable processor" in told(str(tmp_path))


def test_what_could_not_be_tried_is_not_called_refused(monkeypatch, capsys):
    def missing(name):
        raise ImportError("TimmWrapperModel requires the timm library")

    monkeypatch.setattr(tiny, "tiny", missing)
    assert main(["check", "gemma3n"]) == 1
    assert capsys.readouterr().out == "gemma3n: not known\n  why: could not be built here: needs timm\n"


def test_image_tensors_that_number_places_are_shifted():
    """As Molmo 2's `image_token_pooling`, whose numbers are of patches among those of all images; -1 is none."""
    one = {"pixel_values": torch.ones(2, 3, 5), "places": torch.tensor([[0, 5], [-1, 1]])}
    two = {"pixel_values": torch.ones(1, 3, 5), "places": torch.tensor([[0, 2]])}
    both = {"pixel_values": torch.ones(3, 3, 5), "places": torch.tensor([[0, 5], [-1, 1], [6, 8]])}
    turned = {"pixel_values": torch.ones(3, 3, 5), "places": torch.tensor([[0, 2], [3, 8], [-1, 4]])}
    orders = [([one, two], both), ([two, one], turned)]
    join = _how_joined("places", orders)
    assert join == Join(counts=("pixel_values", 2)) and _how_joined("pixel_values", orders) is None
    assert torch.equal(_join_vision([one, two], {"places": join})["places"], both["places"])
    assert not torch.equal(_join_vision([one, two], {})["places"], both["places"])


def test_vision_is_what_is_not_the_decoder():
    model, _ = tiny.tiny("lighton_ocr")  # its tower has a name that no other type uses
    assert [name for name, _ in vision_parts(model)] == ["model.vision_encoder", "model.vision_projection"]
    adapted = get_peft_model(model, with_default_targets(LoraConfig(r=2), model))
    assert vision_is_frozen(adapted) and all(
        "language_model" in name for name, p in adapted.named_parameters() if p.requires_grad
    )
    assert describe_vision(adapted).startswith("frozen (") and "vision_encoder" in describe_vision(adapted)


def test_freezing_counts():
    model, _ = tiny.tiny("llava")
    assert describe_vision(model).startswith("trained (")
    freeze_vision(model)
    assert vision_is_frozen(model)


def test_routers_and_convolutions_get_no_adapter_and_experts_do():
    model, _ = tiny.tiny("qwen3_5_moe")
    targets = lora_targets(model)
    names = {name.rsplit(".", 1)[-1] for name in targets.modules}
    assert {"in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj", "o_proj"} <= names
    assert not {"gate", "shared_expert_gate", "conv1d", "lm_head"} & names
    assert {name.rsplit(".", 1)[-1] for name in targets.parameters} == {"gate_up_proj", "down_proj"}
    adapted = get_peft_model(model, with_default_targets(LoraConfig(r=2), model))
    assert vision_is_frozen(adapted) and coverage(adapted).share > 0.95


def test_targets_that_a_caller_names_stay(caplog):
    model, _ = tiny.tiny("qwen2_5_vl")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    assert with_default_targets(config, model) is config
    assert coverage(get_peft_model(model, config)).uncovered[0].startswith("layers.*.mlp")


def test_an_encoder_decoder_is_refused_by_name():
    model, _ = tiny.tiny("florence2")
    with pytest.raises(ValueError, match="Florence2ForConditionalGeneration is an encoder-decoder"):
        check_merges_images(model)


def test_experts_beside_shared_experts_leave_no_layer_without_an_adapter():
    """peft reads `down_proj` as the experts' alone, and would leave dense layers and shared experts out."""
    model, _ = tiny.tiny("glm4v_moe")
    adapted = get_peft_model(model, with_default_targets(LoraConfig(r=2), model))
    assert coverage(adapted).share > 0.99, coverage(adapted)
    assert vision_is_frozen(adapted)


def test_a_target_in_a_tower_is_excluded():
    """The experts' bare names are the tower's too."""
    model, _ = tiny.tiny("qwen3_vl_moe")
    config = with_default_targets(LoraConfig(r=2), model)
    assert vision_is_frozen(get_peft_model(model, config))
    assert re.match(config.exclude_modules, "model.visual.blocks.0.mlp.linear_fc1")
    assert not re.match(config.exclude_modules, "model.language_model.layers.0.mlp.gate")


def test_dropout_on_experts_is_told(caplog):
    caplog.set_level("WARNING", logger="silkie")
    model, _ = tiny.tiny("qwen3_vl_moe")
    config = with_default_targets(LoraConfig(r=2, lora_dropout=0.1), model)
    assert not config.target_parameters and "Set lora_dropout=0" in caplog.text


def test_a_dead_adapter_on_a_tower_is_an_error():
    model, _ = tiny.tiny("llava")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    check_adapter_on_vision(adapted)  # it trains
    freeze_vision(adapted)
    with pytest.raises(LaunchError, match=r"model.vision_tower have an adapter that does not train"):
        check_adapter_on_vision(adapted)


def test_a_vision_tower_that_is_to_train_and_has_no_adapter_is_told(caplog):
    caplog.set_level("WARNING", logger="silkie")
    model, _ = tiny.tiny("llava")
    args = SilkieDPOConfig(output_dir="x", use_cpu=True, bf16=False, freeze_vision=False)
    warn_of_untrained_vision(model, args, default_targets=True)
    assert "model.vision_tower" in caplog.text and "modules_to_save" in caplog.text


def test_image_tensors_are_joined_as_the_processor_joins_them():
    assert image_joins(GroupEncoder(tiny.tiny_processor("minicpmv4_6"))) == {"pixel_values": Join(dim=3)}
    assert image_joins(GroupEncoder(tiny.tiny_processor("llava"))) == {}


def test_an_unclosed_think_block_is_stopped(monkeypatch):
    """silkie's own encoder writes what a template closes; one that put the answer behind the generation prompt would
    train another text."""
    model, processor = tiny.tiny("qwen2_5_vl")
    closed = "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n</think>\n' }}{% endif %}"
    template = processor.chat_template.replace("{% for p in m['content'] %}", closed + "{% for p in m['content'] %}", 1)
    processor.chat_template = template.replace("<turn>assistant\n{% endif %}", "<turn>assistant\n<think>\n{% endif %}")
    row = tiny.tiny_groups(_pictures())[2]
    encoder = GroupEncoder(processor)
    plain_logps(model, encoder, row, dict)  # as the template writes it
    group = encoder.encode(row)
    opened = processor.tokenizer(encoder.render(row), add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    end = processor.tokenizer("<end>\n", add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    answers = [
        processor.tokenizer(r, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for r in row["responses"]
    ]
    unclosed = replace(group, prompt_ids=opened, responses=[torch.cat([a, end]) for a in answers])
    monkeypatch.setattr(encoder, "encode", lambda _: unclosed)
    with pytest.raises(TokenMismatch, match="are not those of the model's processor and chat template"):
        plain_logps(model, encoder, row, dict)
