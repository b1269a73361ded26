"""No pickled weights, in any load path; and the command that converts them."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from silkie import SilkieDPOConfig, SilkieDPOTrainer, inference
from silkie.model import weights
from silkie.model.weights import PickledWeights, convert, refuse_pickled_adapter
from silkie.training.resumable import RecoverableTrainer
from tests.support.data import dataset
from tests.support.tiny import tiny_model, tiny_processor


def pickled(directory, safe, unsafe):
    """Turns the safetensors of a directory into a pickle."""
    torch.save(load_file(directory / safe), directory / unsafe)
    (directory / safe).unlink()


@pytest.fixture
def model_dir(tmp_path):
    """A model with its processor, weights pickled."""
    place = tmp_path / "model"
    tiny_model().save_pretrained(place)
    tiny_processor().save_pretrained(place)
    pickled(place, "model.safetensors", "pytorch_model.bin")
    return place


@pytest.fixture
def adapter_dir(tmp_path):
    """An adapter on a whole base model, its weights pickled."""
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    pickled(tmp_path / "adapter", "adapter_model.safetensors", "adapter_model.bin")
    return tmp_path / "adapter"


REFUSED = r"pickle, which can run code.*silkie convert"


def config(tmp_path, **options):
    return SilkieDPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", **options)


def test_a_model_directory_with_pickled_weights_is_refused(tmp_path, model_dir):
    """ATTACKS 10: SilkieDPOTrainer("dir") loaded pytorch_model.bin."""
    for peft in (LoraConfig(r=2), None):
        with pytest.raises(PickledWeights, match=REFUSED):
            SilkieDPOTrainer(str(model_dir), args=config(tmp_path), train_dataset=dataset(), peft_config=peft)
    with pytest.raises(PickledWeights, match=REFUSED):
        inference.load_policy(model_dir)


def test_a_reference_from_pickled_weights_is_refused(tmp_path, model_dir):
    """ATTACKS 10: full fine-tuning of a loaded model takes its reference from the directory that the model names."""
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = str(model_dir)
    with pytest.raises(PickledWeights, match=REFUSED):
        SilkieDPOTrainer(model, args=config(tmp_path), train_dataset=dataset(), processing_class=tiny_processor())


def test_a_hub_name_is_loaded_from_safetensors_only(tmp_path, model_dir, monkeypatch):
    """ATTACKS 10: what cannot be looked at in a directory is left to transformers' own option."""
    import silkie.training.startup as startup

    monkeypatch.setattr(startup, "refuse_pickled", lambda name: None)
    with pytest.raises(OSError, match="safetensors"):
        SilkieDPOTrainer(str(model_dir), args=config(tmp_path), train_dataset=dataset(), peft_config=LoraConfig(r=2))


def test_a_pickled_adapter_is_refused(adapter_dir):
    """ATTACKS 10: evaluation, feedback pool, demo and resume load adapters through these."""
    with pytest.raises(PickledWeights, match=REFUSED):
        inference.load_policy(adapter_dir)
    for load in (RecoverableTrainer._load_from_checkpoint, refuse_pickled_adapter):
        arguments = (None, str(adapter_dir)) if load is not refuse_pickled_adapter else (adapter_dir,)
        with pytest.raises(PickledWeights, match=REFUSED):
            load(*arguments)
    (adapter_dir / "ref").mkdir()
    (adapter_dir / "adapter_model.bin").rename(adapter_dir / "ref" / "adapter_model.bin")
    with pytest.raises(PickledWeights, match="ref has its weights"):
        refuse_pickled_adapter(adapter_dir)


def test_converted_files_load_to_the_same_weights(adapter_dir, model_dir, capsys):
    """ATTACKS 10: the way out for old files."""
    assert inference.main(["convert", str(model_dir)]) == 0 and inference.main(["convert", str(adapter_dir)]) == 0
    assert "wrote" in capsys.readouterr().out
    for file, twin in (("pytorch_model.bin", "model.safetensors"), ("adapter_model.bin", "adapter_model.safetensors")):
        place = model_dir if "pytorch" in file else adapter_dir
        old, new = torch.load(place / file, weights_only=True), load_file(place / twin)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert isinstance(inference.load_policy(adapter_dir)[0], PeftModel)
    plain, _ = inference.load_policy(model_dir)
    expected = dict(tiny_model().named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in plain.named_parameters())


def test_a_model_in_several_files_is_converted_with_its_index(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    text = index.read_text()
    for file in sorted(tmp_path.glob("model-*.safetensors")):
        torch.save(load_file(file), tmp_path / f"pytorch_{file.stem}.bin")
        file.unlink()
    index.unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        text.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    )
    with pytest.raises(PickledWeights, match="pytorch_model.bin.index.json"):
        inference.load_policy(tmp_path)
    convert(tmp_path)
    model, expected = type(tiny_model()).from_pretrained(tmp_path, use_safetensors=True), tiny_model()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


class Hostile:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_converting_runs_no_code(tmp_path, capsys):
    """ATTACKS 10: the one command that opens a pickle reads tensors only."""
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps({"a": Hostile(tmp_path / "ran")}))
    assert inference.main(["convert", str(tmp_path)]) == 2
    assert "adapter_model.bin holds more than tensors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("*.safetensors"))
    assert inference.main(["convert", str(tmp_path / "nothing")]) == 2


def test_converting_replaces_no_safetensors(tmp_path):
    """An old pickle beside newer safetensors: these were overwritten, in a hub snapshot through a link."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"w": torch.zeros(2)}, tmp_path / "adapter_model.bin")
    save_file({"w": torch.ones(2)}, tmp_path / "store")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "store")
    assert convert(tmp_path) == [tmp_path / "adapter_model.safetensors"]
    assert load_file(tmp_path / "store")["w"].tolist() == [1.0, 1.0]
    assert convert(tmp_path) == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({1: torch.zeros(2)}, "something else than named tensors"),
        ({"w": torch.eye(2).to_sparse()}, "safetensors cannot store"),
        ({"w": torch.zeros(2, device="meta")}, "safetensors cannot store"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "safetensors cannot store: torch.complex128"),
    ],
)
def test_tensors_that_cannot_be_stored_are_named(tmp_path, capsys, state, message):
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert inference.main(["convert", str(tmp_path)]) == 2
    assert message in (said := capsys.readouterr().err) and "pytorch_model.bin" in said and len(said.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"w": "pytorch_model-2.bin"}}', "names pytorch_model-2.bin, which is not beside it"),
        ('{"weight_map": {"w": "../pytorch_model-1.bin"}}', "names ../pytorch_model-1.bin, which is not beside it"),
        ('{"weight_map": {"w": null}}', "is no index"),
        ("{}", "is no index of weights: KeyError: 'weight_map'"),
        ("[]", "is no index"),
        ("{", "is no index"),
        ("[" * 100_000, "is no index"),
    ],
)
def test_an_index_that_is_none_is_not_written(tmp_path, capsys, text, message):
    """With one whose file was missing, the directory counted as converted."""
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model-1.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert inference.main(["convert", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(PickledWeights):
        weights.refuse_pickled(tmp_path)


def test_a_file_that_cannot_be_written_is_said_in_one_line(tmp_path):
    """safetensors has an error of its own for a full disk."""
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "pytorch_model.bin")
    program = (
        "import resource, signal, sys; from silkie import inference; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); sys.exit(inference.main(['convert', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ") and "File too" in done.stderr
    assert "Traceback" not in done.stderr and [file.name for file in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_a_conversion_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    """Half a file would be taken for the weights."""

    def full(state, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_model.bin"]
