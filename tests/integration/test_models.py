"""Any vision-language type: exact in the layout that `auto` takes, or refused by name."""

import pytest
from peft import LoraConfig, get_peft_model

from silkie.model import tiny
from silkie.model.__main__ import check_named, main
from silkie.model.adapters import coverage, lora_targets, with_default_targets
from silkie.model.families import check_merges_images
from silkie.model.vision import describe_vision, freeze_vision, vision_is_frozen, vision_parts

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
    assert sum(v.exact for v in verdicts) >= 25  # without torchvision, which half of the image processors need
    assert all(v.exact or v.why for v in verdicts)


def test_check_prints_a_verdict_and_says_by_its_exit_status_whether_a_model_trains(capsys):
    assert main(["check", "llava"]) == 0
    assert "llava: exact" in (shown := capsys.readouterr().out) and "100.0 % of the text weights" in shown
    assert main(["check", "blip"]) == 1
    assert "does not merge image features" in capsys.readouterr().out


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
    assert coverage(get_peft_model(model, config)).left_out[0].startswith("layers.*.mlp")


def test_an_encoder_decoder_is_refused_by_name():
    model, _ = tiny.tiny("florence2")
    with pytest.raises(ValueError, match="Florence2ForConditionalGeneration is an encoder-decoder"):
        check_merges_images(model)
