"""Every family: packed = rows = one response at a time through the stock model, in float64, log-probs and LoRA
gradients; and what must not pass."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from silkie.model.attention import segments
from tests.support.families import FAMILIES, QWEN, family_model, family_processor
from tests.support.scoring import collate, gradients, groups, score, stock_logps, with_lora

ALL = [*QWEN, *FAMILIES]
EXACT = 1e-10  # float64: what is left are roundings of the last digits
GRADIENT = 1e-6  # torch's CPU attention keeps the softmax normaliser of its backward pass in float32


@pytest.fixture(scope="module", params=ALL)
def setting(request):
    family = request.param
    return family, with_lora(family_model(family).double()).train(), family_processor(family), groups(family)


@pytest.fixture(scope="module")
def truth(setting):
    family, model, processor, rows = setting
    logps = stock_logps(family, model, processor, rows)
    return logps.detach(), gradients(model, logps)


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize(
    "layout, backend", [("rows", "sdpa"), ("packed", "sdpa"), ("packed", "segments"), ("packed", "varlen")]
)
def test_layouts_equal_the_stock_model(setting, truth, layout, backend, monkeypatch):
    family, model, processor, rows = setting
    monkeypatch.setattr(segments, "SHORTEST_ROW", 0)
    if backend == "varlen" and family in ("gemma3", "paligemma"):
        with pytest.raises(ValueError, match="both directions"):
            score(model, processor, rows, layout, backend)
        return
    scores = score(model, processor, rows, layout, backend)
    assert difference(scores.logps.detach(), truth[0]) < EXACT
    found = gradients(model, scores.logps)
    assert found.keys() == truth[1].keys() and len(found) >= 28
    assert all(torch.linalg.norm(truth[1][name]) > 1e-6 for name in found), "a dead gradient proves nothing"
    for name in found:
        assert difference(found[name], truth[1][name]) < GRADIENT * max(1.0, truth[1][name].abs().max().item()), name


@pytest.mark.parametrize("backend", ["flex", "eager"])
def test_forward_only_backends_equal_the_stock_model(setting, truth, backend):
    """FlexAttention has no backward pass on the CPU; eager attention computes its softmax in float32."""
    _, model, processor, rows = setting
    with torch.no_grad():
        scores = score(model, processor, rows, "packed", backend)
    assert difference(scores.logps, truth[0]) < (EXACT if backend == "flex" else 1e-4)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_checkpointing_changes_no_gradient(setting, truth, checkpointing):
    _, model, processor, rows = setting
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        found = gradients(model, score(model, processor, rows, "packed").logps)
    finally:
        model.gradient_checkpointing_disable()
    for name in found:
        assert difference(found[name], truth[1][name]) < GRADIENT * max(1.0, truth[1][name].abs().max().item()), name


# -- negative controls: each of these errors must show in the numbers that the tests above compare
# ------------------------------------------------


def wrong(setting, truth, change):
    _, model, processor, rows = setting
    batch = collate(model, processor, rows, "packed")
    change(batch)
    with torch.no_grad():
        return difference(score(model, processor, rows, "packed", batch=batch).logps, truth[0])


def test_visible_siblings_show(setting, truth):
    """All responses of a group as one segment: a later one sees the earlier ones."""

    def merge(batch):
        same = batch["segment_ids"] > 0
        batch["subtree_end"] = torch.where(same, len(batch["segments"]), batch["subtree_end"])
        batch["logical_positions"] = torch.where(same, torch.arange(same.shape[1])[None], batch["logical_positions"])

    assert wrong(setting, truth, merge) > 1e-2


def test_positions_that_run_on_show(setting, truth):
    def run_on(batch):
        steps = torch.arange(batch["input_ids"].shape[1])[None, None]
        batch["position_ids"] = torch.where(batch["segment_ids"][None] > 0, steps, batch["position_ids"])

    assert wrong(setting, truth, run_on) > 1e-3


def test_another_image_shows(setting, truth):
    def swap(batch):
        pixels = batch["vision"]["pixel_values"]
        batch["vision"]["pixel_values"] = pixels.flip(0) if pixels.shape[0] > 1 else -pixels

    assert wrong(setting, truth, swap) > 1e-3


def test_a_window_in_row_distance_shows():
    """Gemma3's sliding layers count logical positions; counting places in the row would cut later responses off from
    the prompt."""
    family = "gemma3"
    model, processor, rows = with_lora(family_model(family).double()), family_processor(family), groups(family)
    truth = stock_logps(family, model, processor, rows).detach(), None

    def by_place(batch):
        batch["logical_positions"] = torch.arange(batch["input_ids"].shape[1])[None].expand_as(
            batch["logical_positions"]
        )

    assert wrong((family, model, processor, rows), truth, by_place) > 1e-2


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_an_image_longer_than_the_window(backend):
    """The window ends what a token of it sees behind itself, not what it sees ahead."""
    family = "gemma3"
    model, processor, rows = family_model(family).double(), family_processor(family), groups(family)
    model.config.text_config.sliding_window = 2  # an image has 4 tokens
    with torch.no_grad():
        assert (
            difference(
                score(model, processor, rows, "packed", backend).logps, stock_logps(family, model, processor, rows)
            )
            < EXACT
        )


def test_paligemma_counts_from_one():
    model, processor = family_model("paligemma"), family_processor("paligemma")
    batch = collate(model, processor, groups("paligemma"), "packed")
    assert batch["position_ids"][0, :, 0].tolist() == [1, 1, 1]


class Transformed(Qwen2_5_VLForConditionalGeneration):
    """What Cohere's and Gemma's forwards do to their logits."""

    def forward(self, *args, **kwargs):
        out, text = super().forward(*args, **kwargs), self.config.text_config
        out.logits = out.logits * text.logit_scale
        if text.final_logit_softcapping is not None:
            out.logits = text.final_logit_softcapping * torch.tanh(out.logits / text.final_logit_softcapping)
        return out


class AlwaysCapped(Qwen2_5_VLForConditionalGeneration):
    def forward(self, *args, **kwargs):
        out, text = super().forward(*args, **kwargs), self.config.text_config
        out.logits = 5.0 * torch.tanh(out.logits * text.output_multiplier / 5.0)
        return out


class Ignores(Qwen2_5_VLForConditionalGeneration):
    """Has a cap in its config and does not apply it, as Gemma3's image-text class."""


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("scale", "cap"), [(0.25, None), (1.0, 3.0), (0.25, 3.0)])
def test_logits_that_the_model_scales_or_caps(scale, cap, fused):
    model = family_model("qwen2_5_vl").double()
    model.__class__ = Transformed
    model.config.text_config.update({"logit_scale": scale, "final_logit_softcapping": cap})
    model, processor, rows = with_lora(model), family_processor("qwen2_5_vl"), groups("qwen2_5_vl")
    truth = stock_logps("qwen2_5_vl", model, processor, rows)
    found = score(model, processor, rows, "packed", fused=fused).logps
    assert difference(found.detach(), truth.detach()) < EXACT
    wanted = gradients(model, truth)
    for name, gradient in gradients(model, found).items():
        assert difference(gradient, wanted[name]) < GRADIENT * max(1.0, wanted[name].abs().max().item()), name
    assert model.config.text_config.final_logit_softcapping == cap


def test_a_cap_that_cannot_be_switched_off_is_refused_by_name():
    model = family_model("qwen2_5_vl")
    model.__class__ = AlwaysCapped
    model.config.text_config.update({"output_multiplier": 0.5, "final_logit_softcapping": 5.0})
    with pytest.raises(ValueError, match="AlwaysCapped caps its logits"):
        score(model, family_processor("qwen2_5_vl"), groups("qwen2_5_vl"), "packed")


def test_a_cap_that_the_forward_ignores_is_not_applied():
    model = family_model("qwen2_5_vl").double()
    processor, rows = family_processor("qwen2_5_vl"), groups("qwen2_5_vl")
    plain = score(model, processor, rows, "packed").logps
    model.__class__ = Ignores
    model.config.text_config.update({"logit_scale": 0.5, "final_logit_softcapping": 5.0})
    assert difference(score(model, processor, rows, "packed").logps, plain) == 0.0
