"""Tiny models of transformers' types against stock TRL 1.16: loss and LoRA gradients of one step, the load balancing
loss of routers included.

Tolerance: the error of TRL's own float32 step against its float64 one, and a little more.
"""

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import ProcessorMixin

from silkie.model import tiny
from silkie.model.dropout import disable_dropout
from silkie.model.processor import torchvision_works
from silkie.training.guards import LaunchError
from silkie.training.self_test import plain_inputs
from tests.conformance.cases import TRL_DIFFERS, TRL_STOPS
from tests.support.data import group
from tests.support.tiny import image
from tests.support.trl import distance, plain_step, silkie_step, trl_step

GROUPS = [
    group([image(0)], "what is in image ?", ["a red cat", "no not a dog on the table"], [[0, 1]]),
    group([image(4)], "how many cat are there in the image ?", ["two cat", "one"], [[0, 1]]),
]
TYPES = ["qwen3_5", "qwen3_vl_moe", "qwen3_5_moe", "gemma4", "llava"]
MIXTURES = ["qwen3_vl_moe", "qwen3_5_moe"]


def size(gradients):
    return distance(gradients, {n: torch.zeros_like(g) for n, g in gradients.items()})


def compare(folder, model_type, layout, **more):
    """Largest differences of loss and gradients (relative) between silkie and TRL, and what they may be."""
    true_loss, true, _ = trl_step(folder, model_type, GROUPS, torch.float64, **more)
    trl_loss, trl, _ = trl_step(folder, model_type, GROUPS, **more)
    loss, found, _ = silkie_step(folder, model_type, GROUPS, layout, **more)
    scale = size(true)
    assert abs(true_loss - 0.6931) > 2e-4 and scale > 2e-3, "nothing to compare"
    assert abs(loss - true_loss) <= 3 * abs(trl_loss - true_loss) + 1e-5
    assert distance(found, true) <= 3 * distance(trl, true) + 1e-4 * scale


@pytest.mark.parametrize("model_type", TYPES)
def test_a_step_in_rows_equals_stock_trl(tmp_path, model_type):
    """A mixture of experts with its own coefficient, as both take it by default."""
    compare(tmp_path, model_type, "rows")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_packed_step_equals_stock_trl(tmp_path, model_type):
    """A mixture of experts with a coefficient at which its load balancing loss weighs as much as the rest."""
    more = {"router_aux_loss_coef": 0.5} if model_type in MIXTURES else {}
    compare(tmp_path, model_type, "packed", **more)


@pytest.mark.parametrize(
    "model_type", ["qwen2_5_vl", *(pytest.param(t, marks=pytest.mark.slow) for t in ("qwen3_vl", "llava", "gemma3"))]
)
def test_in_bf16_a_step_is_as_near_to_float64_as_that_of_trl(tmp_path, model_type):
    """Both round every product; over rows of other lengths they round otherwise, and so they differ from each other, by
    less than either does from the truth. Over random adapters, as one alone may favour either."""
    losses, gradients, apart = {"trl": 0.0, "silkie": 0.0}, {"trl": 0.0, "silkie": 0.0}, 0.0
    seeds = range(5)
    for seed in seeds:
        true_loss, true, _ = trl_step(tmp_path, model_type, GROUPS, torch.float64, seed=seed)
        theirs = trl_step(tmp_path, model_type, GROUPS, bf16=True, seed=seed)
        ours = silkie_step(tmp_path, model_type, GROUPS, "packed", bf16=True, seed=seed)
        for name, (loss, found, _) in (("trl", theirs), ("silkie", ours)):
            losses[name] += abs(float(loss - true_loss)) / len(seeds)
            gradients[name] += distance(found, true) / size(true) / len(seeds)
        apart += abs(float(ours[0] - theirs[0])) / len(seeds)
    print(f"{model_type}: loss off by {losses}, apart {apart:.1e}; gradient off by {gradients}")
    assert losses["trl"] > 1e-5 and gradients["trl"] > 1e-3, "nothing is rounded"
    assert losses["silkie"] < 1.5 * losses["trl"] + 1e-4 and gradients["silkie"] < 1.25 * gradients["trl"]


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_the_load_balancing_loss_shows_in_the_loss_and_the_log(tmp_path, layout):
    weighed = {"router_aux_loss_coef": 0.5}
    loss, gradients, trainer = silkie_step(tmp_path, "qwen3_vl_moe", GROUPS, layout, **weighed)
    without, other, _ = silkie_step(tmp_path, "qwen3_vl_moe", GROUPS, layout, router_aux_loss_coef=0.0)
    logged = trainer._logged["train"].pop(trainer._sum).means["aux_loss"]
    assert logged > 0.5 and abs(loss - without - 0.5 * logged) < 1e-5
    assert distance(gradients, other) > 1e-3 * size(other)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_packed_routers_weigh_tokens_as_the_rows_of_trl(tmp_path, model_type):
    """The model's own function on the routers' logits of plain forwards: each row of TRL's with its prompt."""
    _, _, trainer = silkie_step(tmp_path, model_type, GROUPS[:1], "packed")
    model, batch = trainer.model, trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        found = trainer.passes.forward(model, batch, frozen_vision=True, router_aux=True).aux_loss
        seen = router_logits(trainer, model)
    config = model.config.get_text_config()
    own = importlib.import_module(type(model.get_base_model()).__module__).load_balancing_loss_func
    expected = own(seen, config.num_experts, config.num_experts_per_tok)
    assert abs(found - expected) < 1e-5
    again = own(tuple(torch.cat([layer, layer[:9]]) for layer in seen), config.num_experts, config.num_experts_per_tok)
    assert abs(found - again) > 1e-4, "tokens that are counted once more must show"


def router_logits(trainer, model):
    """Per layer [tokens, E]: of a group's prompt with each of its responses."""
    row, out = trainer.train_dataset[0], []
    for response in row["responses"]:
        inputs = plain_inputs(trainer.encoder, model.get_base_model(), row, response)
        layers = model(**inputs, output_router_logits=True, use_cache=False).router_logits
        out.append([layer.reshape(-1, layer.shape[-1]) for layer in layers])
    return tuple(torch.cat(layer) for layer in zip(*out, strict=True))


def test_a_model_without_a_load_balancing_loss_is_told(tmp_path, monkeypatch, caplog):
    from transformers import Qwen3VLMoeForConditionalGeneration as Model

    stock = Model.forward

    def forgetful(self, *args, output_router_logits=None, **kwargs):
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", forgetful)
    with pytest.raises(LaunchError, match="Qwen3VLMoeForConditionalGeneration returns no load balancing loss"):
        silkie_step(tmp_path, "qwen3_vl_moe", GROUPS, "rows", router_aux_loss_coef=0.1)
    silkie_step(tmp_path, "qwen3_vl_moe", GROUPS, "rows")
    assert "training without it" in caplog.text


PAGE = (Path(__file__).resolve().parents[2] / "examples" / "models.md").read_text(encoding="utf-8")
EXACT = dict(re.findall(r"^\| (?!type )([\w.-]+) \|.*\| ([\w, -]*) \|$", PAGE, re.M))  # type -> packages that it needs
REFUSED = dict(re.findall(r"^- `([\w.-]+)`: (.+)$", PAGE, re.M))


FP32_ONLY = {"inkling2": "its router runs in fp32 alone, so there is no step of TRL in float64 to compare with"}


def installed(packages):
    return all(torchvision_works() if p == "torchvision" else find_spec(p) for p in packages.split(", ") if p)


def skip_what_the_page_excuses(model_type):
    """A type that the page calls exact is skipped for the packages alone that the page says it needs."""
    if model_type not in EXACT:
        pytest.skip(REFUSED[model_type])
    if not installed(EXACT[model_type]):
        pytest.skip(f"{model_type} needs {EXACT[model_type]}, and it is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in tiny.types() if t not in {*TYPES, *TRL_DIFFERS, *TRL_STOPS}])
def test_every_type_that_trl_runs(tmp_path, model_type):
    """In the layout that `auto` takes without the load balancing loss, and in rows with it."""
    skip_what_the_page_excuses(model_type)
    if model_type in FP32_ONLY:
        pytest.skip(FP32_ONLY[model_type])
    compare(tmp_path, model_type, "auto", router_aux_loss_coef=0.0)
    if trl_step(tmp_path, model_type, GROUPS)[2].aux_loss_enabled:
        compare(tmp_path, model_type, "rows")


def test_the_page_knows_every_type():
    assert {*EXACT, *REFUSED} == set(tiny.types()), "write examples/models.md with the command in its first line"
    assert {*TRL_DIFFERS, *TRL_STOPS} <= {*EXACT}


def no_dropout(model, processor):
    disable_dropout(model)


def unscaled(model, processor):
    model.config.get_text_config().logit_scale = 1.0


def unscaled_width(model, processor):
    model.config.get_text_config().logits_mup_width_multiplier = 1.0


def no_added_token(model, processor):
    processor.__class__ = type("Plain", (type(processor),), {"__call__": ProcessorMixin.__call__})


def positions_by_row(model, processor):
    """Of each row as it would get them alone."""
    stock = model.model.get_rope_index

    def rows(input_ids, mm_token_type_ids, image_grid_thw, attention_mask=None):
        assert len(image_grid_thw) == len(input_ids), "one image a row"
        each = [input_ids, mm_token_type_ids, image_grid_thw, attention_mask]
        found = [stock(*(x[i : i + 1] for x in each)) for i in range(len(input_ids))]
        return torch.cat([positions for positions, _ in found], 1), torch.cat([deltas for _, deltas in found])

    model.model.get_rope_index = rows


WITHOUT_THE_CAUSE = {
    "aya_vision": unscaled,
    "cohere2_vision": unscaled,
    "granite4_vision": no_dropout,
    "hunyuan_vl": positions_by_row,
    "inkling_mm_model": unscaled_width,
    "molmo2": no_added_token,
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRL_DIFFERS)
def test_where_trl_differs_silkie_is_the_plain_forward(tmp_path, model_type):
    """And TRL equals silkie where the cause that the page names is taken away from it."""
    skip_what_the_page_excuses(model_type)
    loss, found, trainer = silkie_step(tmp_path, model_type, GROUPS, "auto")
    true_loss, true = plain_step(trainer, GROUPS)
    assert abs(true_loss - 0.6931) > 1e-3 and size(true) > 1e-2, "nothing to compare"
    assert abs(loss - true_loss) < 1e-5 and distance(found, true) < 1e-4 * size(true)
    trl_loss, trl, _ = trl_step(tmp_path, model_type, GROUPS, torch.float64)
    assert abs(trl_loss - true_loss) > 1e-4 and distance(trl, true) > 1e-2 * size(true)
    compare(tmp_path, model_type, "auto", change=WITHOUT_THE_CAUSE[model_type])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRL_STOPS)
def test_where_trl_stops_silkie_is_the_plain_forward(tmp_path, model_type):
    skip_what_the_page_excuses(model_type)
    with pytest.raises(Exception, match=re.escape(TRL_STOPS[model_type][0])):
        trl_step(tmp_path, model_type, GROUPS, torch.float64)
    loss, found, trainer = silkie_step(tmp_path, model_type, GROUPS, "auto", router_aux_loss_coef=0.0)
    true_loss, true = plain_step(trainer, GROUPS)
    assert abs(true_loss - 0.6931) > 1e-3 and size(true) > 1e-2, "nothing to compare"
    assert abs(loss - true_loss) < 1e-5 and distance(found, true) < 1e-4 * size(true)
