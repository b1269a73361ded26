"""Training on from an adapter: what it starts from, what it is compared with, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from trl import ModelConfig

from silkie import SilkieDPOConfig
from silkie.model.weights import PickledWeights
from silkie.run import RunArguments, run
from silkie.training.reference import match_dtypes
from tests.support.tiny import image, tiny_model, tiny_processor

STEPS = 3


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A model directory, preferences, and an adapter that was trained on them."""
    root = tmp_path_factory.mktemp("train_on")
    tiny_model().save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    with (root / "data.jsonl").open("w") as file:
        for n in range(STEPS):
            image(n).save(root / f"{n}.png")
            responses = ["a red cat", "a dog on the table", "yes"]
            row = {"images": [f"{n}.png"], "prompt": f"what is in image {n} ?", "responses": responses}
            file.write(json.dumps(row | {"pairs": [[0, 1], [2, 1]]}) + "\n")
    train(root, root / "first", use_peft=True)
    return root


def train(root: Path, out: Path, *, adapter: str | None = None, **model_options: Any) -> Any:
    args = SilkieDPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    data = RunArguments(dataset_name=str(root / "data.jsonl"), adapter_name_or_path=adapter)
    return run(data, args, ModelConfig(model_name_or_path=str(root / "model"), dtype="float32", **model_options))


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def test_it_starts_as_the_adapter_and_is_compared_with_it(places, tmp_path):
    trainer = train(places, tmp_path / "second", adapter=str(places / "first"))
    first, second = weights(places / "first"), weights(tmp_path / "second")
    copy = weights(tmp_path / "second" / "ref")
    assert trainer.reference.kind == "copy of the initial adapter"
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6), "policy = reference at the first step"
    assert losses(trainer)[-1] < losses(trainer)[0] - 1e-3
    assert all((copy[name] == value).all() for name, value in first.items()), "the reference never moves"
    assert any((second[name] != value).any() for name, value in first.items())

    # with the model itself as the reference, as in a first round, the same step is another one
    trainer.model.delete_adapter("ref")
    trainer.model.load_adapter(str(places / "first"), "default", is_trainable=True)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    assert abs(float(loss.detach()) - math.log(2)) > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_copy_has_the_dtypes_of_the_adapter(places, dtype):
    model = PeftModel.from_pretrained(tiny_model(), str(places / "first"), is_trainable=True)
    model.add_adapter("ref", model.peft_config["default"])
    own = [p for name, p in model.named_parameters() if ".default." in name]
    for parameter in own:
        parameter.data = parameter.data.to(getattr(torch, dtype))  # what TRL does where the model is quantized
    match_dtypes(model)
    assert {p.dtype for name, p in model.named_parameters() if ".ref." in name} == {getattr(torch, dtype)}


def test_a_new_adapter_beside_it_is_refused(places, tmp_path):
    with pytest.raises(ValueError, match="asks for a new adapter, and `adapter_name_or_path` names one"):
        train(places, tmp_path, adapter=str(places / "first"), use_peft=True)


def test_an_adapter_in_the_models_place_is_told_where_it_belongs(places, tmp_path):
    args = SilkieDPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    wrong = ModelConfig(model_name_or_path=str(places / "first"))
    with pytest.raises(ValueError, match=r"is an adapter, not a model.*--adapter_name_or_path .*first"):
        run(RunArguments(dataset_name=str(places / "data.jsonl")), args, wrong)


def test_a_folder_without_an_adapter_and_a_pickled_one_are_refused(places, tmp_path):
    with pytest.raises(ValueError, match=r"holds no adapter_config\.json"):
        train(places, tmp_path / "out", adapter=str(places / "model"))
    LoraConfig(r=2).save_pretrained(tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    with pytest.raises(PickledWeights, match="a pickle"):
        train(places, tmp_path / "out", adapter=str(tmp_path / "pickled"))
