"""Loading and generating: adapter directories, moved bases, merging, batches, and examples as a person runs them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.inference import generate, load_policy, load_processor, merge
from silkie.run.adapter import check_adapter
from silkie.training.model_card import RunDescription, card_text
from tests.support.data import dataset
from tests.support.tiny import conversation, image, tiny_model, tiny_processor

ROOT = Path(__file__).parents[2]
QUESTIONS = (
    [conversation("what is in image ?"), conversation("is there a cat", 0), conversation("how many dog", 2)],
    [[image(0)], [], [image(1), image(2, 84, 56)]],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base model on disk and an adapter trained on it."""
    root = tmp_path_factory.mktemp("run")
    base, out = root / "base", root / "adapter"
    tiny_model().save_pretrained(base)
    tiny_processor().save_pretrained(base)
    args = SilkieDPOConfig(
        str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        learning_rate=3e-2,
        num_train_epochs=6,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SilkieDPOTrainer(str(base), args=args, train_dataset=dataset(), peft_config=LoraConfig(r=8))
    trainer.train()
    trainer.save_model(str(out))
    return base, out, trainer


def answers(model, processor, **options):
    return generate(model, processor, *QUESTIONS, max_new_tokens=8, **options)


def test_the_saved_adapter_answers_as_the_trained_model(run):
    base, out, trainer = run
    trained = answers(trainer.model, trainer.processing_class)
    model, processor = load_policy(out)
    assert isinstance(model, PeftModel)
    assert answers(model, processor) == trained
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), out)
    assert answers(plain, processor) == trained
    merged, _ = load_policy(out, merge=True)
    assert not isinstance(merged, PeftModel)
    assert answers(merged, processor) == trained
    with model.disable_adapter():
        assert answers(model, processor) == answers(*load_policy(base)) != trained


def test_logits_of_the_merged_model(run):
    _, out, _ = run
    model, _ = load_policy(out)
    merged, _ = load_policy(out, merge=True)
    ids = torch.tensor([[8, 12, 13, 14]])
    with torch.no_grad():
        assert (model(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", ("embed_tokens", "lm_head")])
def test_an_adapter_on_tied_embeddings_is_folded_into_one_of_them(tmp_path, target):
    """Folded into the weight that both share, it changed the other as well: logits were off by as much as they are
    large."""
    tiny_model(tie=True).save_pretrained(tmp_path / "base")
    tiny_processor().save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    targets = ["q_proj", target] if isinstance(target, str) else ["q_proj", *target]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    assert merge([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    ids = torch.tensor([[8, 12, 13, 14]])
    adapted, merged, saved = (
        load_policy(tmp_path / place, merge=folded)[0](input_ids=ids).logits
        for place, folded in (("adapter", False), ("adapter", True), ("merged", False))
    )
    assert (adapted - merged).abs().max() < 1e-4 and (adapted - saved).abs().max() < 1e-4


def test_an_adapter_is_not_folded_into_quantized_weights(tmp_path, capsys):
    """It was rounded with them: logits were off by a third of their size, and `silkie merge` failed without a word."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]}
    tiny_model(hidden=64, rope_parameters=rope).save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    small = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=bits)
    for place in ("base", "small"):
        tiny_processor().save_pretrained(tmp_path / place)
    small.save_pretrained(tmp_path / "small")
    get_peft_model(small, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="quantized form.*base_model="):
        load_policy(tmp_path / "adapter", merge=True, quantization_config=bits)
    words = [str(tmp_path / "adapter"), str(tmp_path / "merged"), "--base-model"]
    assert merge([*words, str(tmp_path / "small")]) == 2 and "small is loaded in quantized" in capsys.readouterr().err
    assert merge([*words, str(tmp_path / "base")]) == 0


def test_a_moved_base_is_named_and_can_be_given(run, tmp_path):
    base, out, _ = run
    moved = tmp_path / "moved"
    base.rename(moved)
    try:
        with pytest.raises(FileNotFoundError, match="base_model="):
            load_policy(out)
        model, processor = load_policy(out, base_model=moved)
        assert answers(model, processor)
    finally:
        moved.rename(base)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        load_policy(str(tmp_path / "nothing" / "here" / "at" / "all"))


def test_an_adapter_that_names_no_base_needs_one(run, tmp_path):
    """As one trained on a model that was built in memory."""
    base, out, _ = run
    shutil.copytree(out, tmp_path / "copy")
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="base_model="):
        load_policy(tmp_path / "copy")
    assert answers(*load_policy(tmp_path / "copy", base_model=base)) == answers(*load_policy(out))


def test_a_base_has_the_revision_that_was_trained_on(tmp_path, monkeypatch):
    """The adapter recorded none, one that another tool recorded was not read, and the processor was the main one's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for seed, revision in enumerate(("main", "old")):
        place = tmp_path / "hub" / "models--org--vlm"
        tiny_model(seed=seed).save_pretrained(place / "snapshots" / revision)
        processor = tiny_processor()
        processor.tokenizer.add_tokens([revision])
        processor.save_pretrained(place / "snapshots" / revision)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(revision)

    def found(*where, **options):
        model, processor = load_policy(*where, **options)
        weights = getattr(model, "get_base_model", lambda: model)().lm_head.weight
        words = processor.tokenizer.get_vocab()
        return [seed for seed in (0, 1) if torch.equal(weights, tiny_model(seed=seed).lm_head.weight)], "old" in words

    old, main = ([1], True), ([0], False)
    assert found("org/vlm", revision="old") == old and found("org/vlm") == main
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "model_init_kwargs": {"revision": "old"}}
    given = LoraConfig(r=2)
    trainer = SilkieDPOTrainer(
        "org/vlm", args=SilkieDPOConfig(str(tmp_path), **options), train_dataset=dataset(), peft_config=given
    )
    out = tmp_path / "adapter"
    trainer.save_model(str(out))
    assert found(out) == found(out, base_model="org/vlm") == old and given.revision is None
    assert found(out, revision="main")[0] == found(out, base_model=place / "snapshots" / "main")[0] == [0]
    (out / "tokenizer_config.json").unlink()
    assert found(out) == old  # the processor is the base's
    check_adapter(str(out), ModelConfig(model_name_or_path="org/vlm", model_revision="old"))
    with pytest.raises(ValueError, match="trained on revision old of org/vlm, and this run loads main"):
        check_adapter(str(out), ModelConfig(model_name_or_path="org/vlm"))


@pytest.mark.parametrize("command", ["infer", "merge"])
def test_a_directory_that_is_not_there_is_named(command, tmp_path, monkeypatch, capsys):
    """Of two parts it may be a hub name, and a hub that is not reached looked like a model without an adapter."""
    from silkie.__main__ import main

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("photo.jpg")
    words = {"infer": ["outputs/gone", "photo.jpg", "What is it?"], "merge": ["outputs/gone", "merged"]}
    assert main([command, *words[command]]) == 2
    assert "error: outputs/gone is no directory here, and the hub gave no model" in capsys.readouterr().err


def test_sampling_is_seeded_and_shaped(run):
    model, processor = load_policy(run[0])
    one = answers(model, processor, temperature=1.0, num_return_sequences=3, seed=1)
    assert [len(a) for a in one] == [3, 3, 3]
    assert one == answers(model, processor, temperature=1.0, num_return_sequences=3, seed=1)
    assert one != answers(model, processor, temperature=1.0, num_return_sequences=3, seed=2)


def test_batching_does_not_change_greedy_answers(run):
    model, processor = load_policy(run[0])
    assert answers(model, processor, batch_size=8) == answers(model, processor, batch_size=1)


def test_wrong_calls(run):
    model, processor = load_policy(run[0])
    with pytest.raises(ValueError, match="temperature > 0"):
        answers(model, processor, num_return_sequences=2)
    with pytest.raises(ValueError, match="prompt 0 has 1 image parts but 0 images"):
        generate(model, processor, [conversation("a")], [[]])
    with pytest.raises(TypeError, match="prompt 0 is a string; expected a conversation"):
        generate(model, processor, ["What is this?"], [[]])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_processors_load_without_torchvision_and_round_trip(tmp_path, family):
    processor = tiny_processor(family)
    tiny_model(family).save_pretrained(tmp_path / "a")
    processor.save_pretrained(tmp_path / "a")
    loaded = load_processor(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = load_processor(tmp_path / "b")
    text = again.apply_chat_template(QUESTIONS[0][0], tokenize=False, add_generation_prompt=True)
    for p in (loaded, again):
        a, b = (q(text=[text], images=[[image(0)]], return_tensors="pt") for q in (processor, p))
        assert (a["input_ids"] == b["input_ids"]).all() and torch.equal(a["pixel_values"], b["pixel_values"])


def test_examples_infer_and_merge(run, tmp_path):
    _, out, _ = run
    picture = tmp_path / "picture.png"
    image(0).save(picture)
    command = [
        sys.executable,
        str(ROOT / "examples" / "infer.py"),
        str(out),
        str(picture),
        "what is in image ?",
        "--compare",
        "--max-new-tokens",
        "8",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"answer: {answers(*load_policy(out))[0][0]}" in shown and "base:" in shown
    command = [sys.executable, str(ROOT / "examples" / "merge_adapter.py"), str(out), str(tmp_path / "merged")]
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert answers(*load_policy(tmp_path / "merged")) == answers(*load_policy(out))
    assert subprocess.run(command, capture_output=True).returncode == 2  # not over something that is there


def test_a_language_model_is_loaded_as_its_card_says(tmp_path):
    """The card named `load_policy`, which loads models that read images; for others it listed their 80 classes."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    run = {"args": SilkieDPOConfig(str(tmp_path), use_cpu=True, bf16=False), "base": "", "adapter": False}
    run |= {"reference": None, "setup": [], "reports": {}, "log_history": []}
    card = card_text(RunDescription(**run, reads_images=False))
    code = card.split("```python\n")[1].split("```")[0]
    assert "load_policy" not in code and "load_policy" in card_text(RunDescription(**run))
    loading = "\n".join(line for line in code.splitlines() if "okenizer" not in line or "import" in line)
    found: dict = {}
    exec(loading.replace("path/to/this/directory", str(tmp_path)), found)
    assert isinstance(found["model"], LlamaForCausalLM)
    with pytest.raises(ValueError, match="a language model.*AutoModelForCausalLM"):
        load_policy(tmp_path)
