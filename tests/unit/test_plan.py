"""The planner's counts against real models: parameters exactly, FLOPs against torch's counter, kept activations against
tracked ones."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, Qwen2Config

from silkie.model import tiny
from silkie.model.adapters import default_lora_targets, with_default_targets
from silkie.model.families import backbone
from silkie.model.vision import vision_parameters
from silkie.plan import __main__ as command
from silkie.plan import memory as plan
from tests.support.families import FAMILIES, family_model
from tests.support.tiny import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"
GUIDE = (EXAMPLES / "cluster.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [True, False])
def test_parameters_are_counted_exactly(family, tie):
    model = tiny_model(family, tie=tie)
    shape = plan.shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision_parameters == sum(p.numel() for p in vision_parameters(model))
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=default_lora_targets(model.config)))
    assert shape.lora_parameters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "billions"), [("qwen2-vl-2b", 2.21), ("qwen2.5-vl-3b", 3.75), ("qwen2.5-vl-7b", 8.29)]
)
def test_known_models_have_their_published_size(name, billions):
    assert plan.SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("training", ["full", "lora"])
def test_flops_of_the_language_model_match_the_counter(training):
    model = tiny_model(layers=3)
    shape = plan.shape_of(model.config)
    w = plan.Workload(
        groups=1,
        image_tokens=0,
        prompt_tokens=40,
        responses=2,
        response_tokens=30,
        training=training,
        lora_rank=4,
        checkpointing=False,
    )
    model.set_attn_implementation("eager")
    if training == "lora":
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=default_lora_targets(model.config)))
    text = backbone(model).language_model
    hidden = torch.randn(1, w.tokens, shape.hidden, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = text(inputs_embeds=hidden, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    expected = plan.flops(shape, w)
    assert forward.get_total_flops() == pytest.approx(expected["forward"], rel=0.02)
    assert backward.get_total_flops() == pytest.approx(expected["backward"], rel=0.05)


def test_flops_of_the_vision_tower_match_the_counter():
    model = tiny_model("qwen2_vl")
    model.set_attn_implementation("eager")
    shape = plan.shape_of(model.config)
    grid = torch.tensor([[1, 8, 8]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(model).visual(torch.randn(64, 3 * 2 * 14 * 14), grid_thw=grid)
    assert counter.get_total_flops() == pytest.approx(
        plan.flops(shape, plan.Workload(image_tokens=16))["vision"], rel=0.02
    )


def test_kept_activations_are_near_the_tracked_ones():
    """Bytes that autograd saves in a forward pass of the bf16 language model, weights excluded."""
    model = tiny_model(layers=4).to(torch.bfloat16)
    shape = plan.shape_of(model.config)
    w = plan.Workload(
        image_tokens=0, prompt_tokens=200, responses=2, response_tokens=100, training="full", checkpointing=False
    )
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(1, w.tokens, shape.hidden, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        backbone(model).language_model(inputs_embeds=hidden, use_cache=False)
    assert plan._activations(shape, w) == pytest.approx(sum(saved.values()), rel=0.4)


def test_sharding_divides_what_it_shards():
    shape, w = plan.SHAPES["qwen2.5-vl-7b"], plan.Workload(training="full")
    ddp, zero2, zero3 = (plan.estimate(shape, w, engine=e, gpus=8) for e in ("ddp", "zero2", "zero3"))
    alone = plan.estimate(shape, w, engine="zero2", gpus=1)
    assert zero2.optimizer == alone.optimizer / 8 == zero3.optimizer and zero2.gradients == ddp.gradients / 8
    assert zero2.weights == ddp.weights and ddp.weights / 8 < zero3.weights < ddp.weights / 4
    offload = plan.estimate(shape, w, engine="zero3_offload", gpus=8)
    assert offload.optimizer == 0 and offload.host == alone.optimizer


def test_cheaper_choices_are_cheaper():
    shape = plan.SHAPES["qwen2.5-vl-7b"]

    def total(**options):
        return plan.estimate(shape, plan.Workload(**options)).total

    assert total(training="qlora") < total() < total(training="full")
    assert total() < total(checkpointing=False) and total() < total(fused=False) and total() < total(groups=2)
    cached = plan.estimate(shape, plan.Workload(reference_cached=True))
    assert cached.flops < plan.estimate(shape, plan.Workload()).flops


def test_command_line(capsys):
    command.main(["Qwen/Qwen2.5-VL-7B-Instruct", "--gpus", "8", "--memory", "80GB", "--full"])
    text = capsys.readouterr().out
    assert "ddp on 8 GPU(s)" in text and "does NOT fit" in text and "use: recipes/accelerate/zero" in text
    command.main(["qwen2-vl-2b", "--memory", "24GB", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["config"] == "ddp" and answer["plans"][0]["fits"]
    with pytest.raises(SystemExit):
        command.main(["qwen2-vl-2b", "--memory", "lots"])
    assert "must look like 80GB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--image-tokens", "-1"], "--image-tokens must be at least 0"),
        (["--responses", "1"], "--responses must be at least 2"),
        (["--full", "--qlora"], "not allowed with"),
        (["--memory", "0GB"], "must look like 80GB"),
    ],
)
def test_command_line_that_cannot_be(capsys, options, message):
    with pytest.raises(SystemExit):
        command.main(["qwen2-vl-2b", *options])
    assert message in capsys.readouterr().err


def test_a_model_without_a_vision_tower_is_refused(tmp_path):
    Qwen2Config(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image-text-to-text class for 'qwen2'"):
        plan.load_shape(str(tmp_path))


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3_vl"])
def test_other_families_have_an_estimate(family):
    shape = plan.shape_of((tiny_model(family) if family == "qwen3_vl" else family_model(family)).config)
    assert plan.estimate(shape).total > shape.parameters * 2


def test_a_config_that_builds_no_model_is_refused():
    with pytest.raises(ValueError, match="Mistral4ForCausalLM does not merge image features"):
        plan.shape_of(CONFIG_MAPPING["mistral4"]())


@pytest.mark.parametrize(
    ("engine", "gpus", "launch"),
    [
        ("ddp", 1, "single.yaml"),
        ("zero3", 4, "zero3.yaml --num_processes 4"),
        ("zero2", 16, "zero2.yaml --num_processes 16 --num_machines 2"),
        ("zero3", 20, "multinode_zero3.yaml --num_processes 20 --num_machines 3"),
    ],
)
def test_the_chosen_config_comes_with_its_processes_and_machines(engine, gpus, launch):
    assert command._config(engine, gpus) == f"recipes/accelerate/{launch}"


def test_a_second_model_is_counted_where_there_is_one():
    shape = plan.SHAPES["qwen2-vl-2b"]

    def weights(**options):
        return plan.estimate(shape, plan.Workload(**options)).weights

    assert weights(training="full", second_model=True) - weights(training="full") == pytest.approx(shape.parameters * 2)
    assert weights(second_model=True) > 1.9 * weights()


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), (" 512 mb", 512e6)])
def test_memory_units(text, size):
    assert plan.parse_memory(text) == size


@pytest.mark.parametrize(
    ("model", "training", "engine", "gpus"),
    [
        ("7b", "lora", "ddp", 1),
        ("3b", "lora", "ddp", 8),
        ("7b", "qlora", "ddp", 1),
        ("3b", "full", "zero2", 8),
        ("7b", "full", "zero2", 8),
        ("7b", "full", "zero3", 4),
        ("7b", "full", "zero3", 8),
        ("7b", "full", "fsdp2", 4),
        ("7b", "full", "fsdp2", 8),
        ("7b", "full", "zero3_offload", 4),
    ],
)
def test_the_guide_gives_the_planners_figures(model, training, engine, gpus):
    workload = plan.Workload(training=training, second_model=training == "full")
    total = plan.estimate(plan.SHAPES[f"qwen2.5-vl-{model}"], workload, engine=engine, gpus=gpus).total
    row = next(
        line
        for line in GUIDE.splitlines()
        if line.startswith("|") and f"`{'single' if gpus == 1 else engine}.yaml`" in line
    )
    assert f"{total / plan.GIB:.1f} GiB" in row


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_formulas_give_what_is_counted(family, tie):
    counted = plan.shape_of(tiny_model(family, tie=tie).config)
    formulas = replace(counted, counts=None)
    names = ("parameters", "vision_parameters", "language_parameters", "head_parameters", "layer_parameters")
    for name in (*names, "matrices", "kept", "attending"):
        assert getattr(counted, name) == getattr(formulas, name), name
    assert counted.lora_parameters(3) == formulas.lora_parameters(3)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "gemma3", "llava", "internvl"])
def test_types_are_counted_as_their_models_are(model_type):
    """Parameters and adapter against a real tiny model with peft's adapter on it, mixtures and hybrids included."""
    model, _ = tiny.tiny(model_type)
    shape = plan.shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.vision_parameters == sum(p.numel() for p in vision_parameters(model))
    config = with_default_targets(LoraConfig(r=3), model)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    assert shape.lora_parameters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_mixture_computes_with_the_experts_that_a_token_is_sent_to():
    config = tiny.tiny("qwen3_vl_moe")[0].config
    text = config.get_text_config()
    shape = plan.shape_of(config)
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    router, expert = text.hidden_size * text.num_experts, 3 * text.hidden_size * text.moe_intermediate_size
    attention = text.hidden_size * (2 * q + 2 * kv)
    expected = text.num_hidden_layers * (attention + text.num_experts_per_tok * expert)
    assert shape.matrices in (expected, expected + text.num_hidden_layers * router)  # the router is no nn.Linear
    assert shape.language_parameters > shape.matrices


def test_recurrent_layers_compare_no_pairs_of_tokens():
    config = tiny.tiny("qwen3_5")[0].config
    shape = plan.shape_of(config)
    assert shape.attending == config.get_text_config().layer_types.count("full_attention") < shape.layers


def test_a_margin_is_said_and_a_tight_fit_is_not_chosen_over_an_easy_one():
    shape, w = plan.SHAPES["qwen2.5-vl-7b"], plan.Workload()
    needed = plan.estimate(shape, w).total
    tight, easy, short = (plan.estimate(shape, w, memory=needed * f) for f in (1.03, 2.0, 0.8))
    assert tight.margin == "3 % to spare: tight" and "(estimate): 3 % to spare: tight" in tight.lines()[0]
    assert easy.margin == "50 % to spare" and short.margin == "25 % too much"
    full = plan.Workload(training="full", second_model=True)
    zero2 = plan.estimate(shape, full, engine="zero2", gpus=8)
    best, _ = plan.choose(shape, full, gpus=8, memory=zero2.total * 1.05)
    assert zero2.total < best.memory and best.engine == "zero3"
    one, _ = plan.choose(shape, w, gpus=1, memory=needed * 1.05)
    assert one.engine == "ddp" and one.tight  # there is no other


def test_the_hub_is_not_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    start = time.process_time()
    with pytest.raises(OSError):
        plan.load_shape("nobody/no-such-model")
    assert time.process_time() - start < 30


EXACT_TYPES = sorted(
    set(re.findall(r"^\| (\w+) \| (?:packed|rows)", (EXAMPLES / "models.md").read_text(encoding="utf-8"), re.M))
)


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=[pytest.mark.slow] * (n % 4 > 0)) for n, t in enumerate(EXACT_TYPES)]
)
def test_every_type_that_the_check_knows_is_planned_from_its_config_alone(model_type, tmp_path, monkeypatch):
    """Sizes against a model of that config which is built here; no weights, no hub."""
    try:
        config = tiny.tiny_config(model_type, tiny.tiny_processor(model_type))
    except ImportError:  # its processor needs torchvision; sizes do not
        config = tiny.whole_config(model_type)
    config.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    monkeypatch.setattr(plan, "_hub_answers", lambda: pytest.fail("the hub was asked"))
    shape = plan.load_shape(str(tmp_path))
    with torch.device("meta"):
        model = getattr(transformers, tiny.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert 0 < shape.vision_parameters == sum(p.numel() for p in vision_parameters(model)) < shape.parameters
    targets = with_default_targets(LoraConfig(r=3), model)
    with torch.device("meta"):
        adapted = get_peft_model(model, targets, autocast_adapter_dtype=False)
    assert shape.lora_parameters(3) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert plan.estimate(shape).total > 2 * shape.parameters
    row = next(
        line for line in (EXAMPLES / "models.md").read_text().splitlines() if line.startswith(f"| {model_type} |")
    )
    assert ("packed" if shape.unpackable is None else "rows") == row.split(" | ")[1]


@pytest.mark.parametrize("model_type", ["gemma4", "qwen3_vl", "llama4", "aya_vision", "cohere_compass"])
def test_a_type_is_planned_by_its_name_where_its_default_config_is_whole(model_type):
    """Where it is not, the model that transformers builds of it fails as well, and the error says what to name."""
    try:
        shape = plan.load_shape(model_type)
    except ValueError as error:
        assert "name a directory or a hub name instead" in str(error)
        with pytest.raises((ValueError, TypeError, KeyError)), torch.device("meta"):
            getattr(transformers, tiny.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type])(
                tiny.whole_config(model_type)
            )
    else:
        assert shape.parameters > 0


@pytest.mark.parametrize(
    ("model_type", "why"), [("mllama", "does not merge image features"), ("florence2", "is an encoder-decoder")]
)
def test_what_the_check_refuses_is_not_planned(model_type, why, capsys):
    with pytest.raises(SystemExit):
        command.main([model_type])
    assert why in capsys.readouterr().err


def test_layers_that_no_mask_keeps_apart_are_planned_in_rows(tmp_path, capsys):
    whole_type = "glm5_next"  # an indexer
    assert command.main([whole_type, "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "layout: rows (glm5_next has indexed_attention layers" in text
    with pytest.raises(SystemExit):
        command.main([whole_type, "--layout", "packed"])
    assert "--layout packed: glm5_next has indexed_attention" in capsys.readouterr().err
    assert command.main(["qwen2-vl-2b", "--layout", "rows", "--write", str(tmp_path / "plan")]) == 0
    assert "layout: rows\n" in (tmp_path / "plan" / "train.yaml").read_text()
