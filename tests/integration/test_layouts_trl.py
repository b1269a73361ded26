"""silkie against stock TRL 1.16 on the same preferences, model and processor: loss and LoRA gradients of one step.

Tolerance: the error of TRL's own float32 run against a float64 one, and a little more.
"""

import copy

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.model.adapters import default_lora_targets
from silkie.model.attention import segments
from tests.support.data import dataset, group
from tests.support.tiny import image, tiny_model, tiny_processor
from tests.support.trl import alive, distance, loss_and_gradients, options, pair_rows

ANSWERS = ["a red cat", "yes", "no not a dog on the table", "is it ?"]


def all_pairs(k):
    return [[i, j] for i in range(k) for j in range(i + 1, k)]


GROUPS = {
    2: [
        group([image(0)], "what is in image ?", ANSWERS[:2], all_pairs(2)),
        group([image(5)], "is there a dog", ANSWERS[1:3], all_pairs(2)),
    ],
    3: [
        group([image(0)], "what is in image ?", ANSWERS[:3], all_pairs(3)),
        group([image(4, 84, 56)], "how many cat", ANSWERS[1:], all_pairs(3)),
    ],
    4: [
        group([image(0)], "what is in image ?", ANSWERS, all_pairs(4)),
        group([image(6)], "is it red ?", ANSWERS[2:], all_pairs(2)),
    ],
    "several images": [
        group([image(1, 84, 56), image(2)], "how many cat are there", ANSWERS, [[0, 1], [2, 3], [1, 3]])
    ],
    "text only": [
        group([], "is there a dog", ANSWERS[:3], all_pairs(3)),
        group([], "what is it ?", ANSWERS[1:3], all_pairs(2)),
    ],
}


@pytest.fixture(autouse=True)
def by_segment(monkeypatch):
    """Rows as short as these would run with the dense mask."""
    monkeypatch.setattr(segments, "SHORTEST_ROW", 0)


def stock(tmp_path, groups, dtype, **more):
    model = tiny_model("qwen2_5_vl")
    rows = pair_rows(groups)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(per_device_train_batch_size=len(rows), **options(tmp_path, **more)),
        train_dataset=rows,
        processing_class=tiny_processor("qwen2_5_vl"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=default_lora_targets(model.config)),
    )
    alive(trainer, dtype)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    if dtype is torch.float64:
        batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    return loss_and_gradients(trainer, batch)


def ours(tmp_path, groups, layout, **more):
    trainer = SilkieDPOTrainer(
        tiny_model("qwen2_5_vl"),
        args=SilkieDPOConfig(per_device_train_batch_size=len(groups), layout=layout, **options(tmp_path, **more)),
        train_dataset=dataset(groups),
        processing_class=tiny_processor("qwen2_5_vl"),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )
    alive(trainer, torch.float32)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(groups))])
    return loss_and_gradients(trainer, batch)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("case", list(GROUPS))
def test_loss_and_gradients_equal_stock_trl(tmp_path, case, checkpointing):
    groups, more = GROUPS[case], {"gradient_checkpointing": checkpointing}
    true_loss, true = stock(tmp_path, groups, torch.float64, **more)
    trl_loss, trl = stock(tmp_path, groups, torch.float32, **more)
    size = distance(true, {n: torch.zeros_like(g) for n, g in true.items()})
    assert abs(true_loss - 0.6931) > 1e-3 and size > 1e-2, "nothing to compare"
    for layout in ("packed", "rows"):
        loss, found = ours(tmp_path, groups, layout, **more)
        assert abs(loss - true_loss) <= 3 * abs(trl_loss - true_loss) + 1e-5
        assert distance(found, true) <= 3 * distance(trl, true) + 1e-5 * size


def test_another_image_leaves_the_noise(tmp_path):
    """Negative control of the comparison above."""
    groups = GROUPS[4]
    swapped = copy.deepcopy(groups)
    swapped[0]["images"], swapped[1]["images"] = groups[1]["images"], groups[0]["images"]
    loss, true = stock(tmp_path, groups, torch.float32)
    other_loss, other = ours(tmp_path, swapped, "packed")
    assert abs(loss - other_loss) > 1e-4
    assert distance(other, true) > 0.01 * distance(true, {n: torch.zeros_like(g) for n, g in true.items()})
