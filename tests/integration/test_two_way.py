"""Families whose image tokens see each other in both directions: Gemma 4 12B, 26B-A4B and 31B, and Gemma 4 unified.
Rows and packed against the model's plain forward in float64, and a causal mask that the self-test must stop."""

import pytest
import torch
from peft import LoraConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.model import tiny
from silkie.model.__main__ import _pictures
from silkie.plan.check import check_model
from silkie.training.self_test import LayoutMismatch
from tests.support.data import dataset, group
from tests.support.tiny import image


def two_way(model_type="gemma4"):
    """Gemma 4 as its larger models are configured."""
    processor = tiny.tiny_processor(model_type)
    config = tiny.tiny_config(model_type, processor)
    config.get_text_config().use_bidirectional_attention = "vision"
    return tiny.tiny_model(config), processor


@pytest.mark.parametrize("model_type", ["gemma4", "gemma4_unified"])
def test_both_layouts_equal_the_plain_forward(model_type):
    verdict = check_model(model_type, *two_way(model_type), tiny.tiny_groups(_pictures()))
    assert verdict.exact and verdict.layout == "packed", verdict.why
    assert verdict.rows.exact, verdict.rows
    assert max(verdict.rows.difference, verdict.packed.difference) < 1e-10


def test_the_two_directions_matter():
    """What the tests above compare differs from causal attention."""
    found = []
    for value in ("vision", None):
        model, processor = two_way()
        model.config.get_text_config().use_bidirectional_attention = value
        row = tiny.tiny_groups(_pictures())[0]
        messages = [
            {"role": "user", "content": [{"type": "image", "image": row["images"][0]}, row["prompt"][0]["content"][-1]]}
        ]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            found.append(model(**inputs).logits[0, -1].log_softmax(-1))
    assert (found[0] - found[1]).abs().max() > 0.05


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_a_causal_mask_is_stopped_by_the_self_test(tmp_path, monkeypatch, layout):
    """The types of the tokens are lost on the run's way, not in the plain forward."""
    model, processor = two_way()
    rows = [group([image(0)], "what is in image ?", ["a red cat", "yes"], [[0, 1]], pair_weights=[1.0])] * 2
    rows = [*rows, group([image(1)], "is there a dog", ["no", "yes yes"], [[0, 1]])]
    trainer = SilkieDPOTrainer(
        model,
        args=SilkieDPOConfig(
            output_dir=str(tmp_path), layout=layout, use_cpu=True, bf16=False, report_to="none", max_steps=1
        ),
        train_dataset=dataset(rows),
        processing_class=processor,
        peft_config=LoraConfig(r=2),
    )
    forward = type(trainer.passes.forward)
    inputs = forward._inputs

    def without_types(self, base, batch, **options):
        return {k: v for k, v in inputs(self, base, batch, **options).items() if k != "mm_token_type_ids"}

    monkeypatch.setattr(forward, "_inputs", without_types)
    with pytest.raises(LayoutMismatch, match="differ from the model's plain forward"):
        trainer.train()
