"""Reference log-probs computed once: reused whenever nothing they depend on changed, never when something did; kills
and full disks."""

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftModel

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.batch import measure
from silkie.batch.encoding import GroupEncoder
from silkie.data.schema import group_features
from silkie.training.checkpoints import CheckpointError
from silkie.training.reference import ReferenceStore
from tests.support.data import dataset, group, mixed_groups
from tests.support.settings import QUIET
from tests.support.tiny import image, tiny_model, tiny_processor

GROUPS = 4


def make(folder, *, data=None, seed=0, processor=None, **options):
    arguments = dict(
        output_dir=str(folder / "out"),
        reference_cache_dir=str(folder / "cache"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        precompute_ref_log_probs=True,
        **QUIET,
    )
    return SilkieDPOTrainer(
        tiny_model(seed=seed),
        args=SilkieDPOConfig(**{**arguments, **options}),
        train_dataset=data if data is not None else dataset(),
        processing_class=processor or tiny_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )


@pytest.mark.parametrize("second_model", [False, True])
def test_the_scale_of_a_reference_adapter_is_part_of_the_key(tmp_path, computed, second_model):
    trained = make(tmp_path / "first", max_steps=2)
    trained.train()
    trained.save_model(str(tmp_path / "adapter"))

    def again(alpha):
        config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
        config.lora_alpha = alpha
        adapted = PeftModel.from_pretrained(
            tiny_model(), str(tmp_path / "adapter"), config=config, is_trainable=not second_model
        )
        args = make(tmp_path).args
        peft = {"ref_model": adapted, "peft_config": LoraConfig(r=4)} if second_model else {}
        return SilkieDPOTrainer(
            tiny_model() if second_model else adapted,
            args=args,
            train_dataset=dataset(),
            processing_class=tiny_processor(),
            **peft,
        )

    computed.clear()
    for alpha, expected in ((8, GROUPS), (8, 0), (16, GROUPS)):
        again(alpha).train()
        assert len(computed) == expected, alpha
        computed.clear()


@pytest.fixture
def computed(monkeypatch):
    """Groups whose reference was run (and not read)."""
    keys = []
    add = ReferenceStore.add
    monkeypatch.setattr(ReferenceStore, "add", lambda self, key, values: (keys.append(key), add(self, key, values))[1])
    return keys


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_training_is_the_same_and_the_reference_runs_once_per_group(tmp_path, computed, layout):
    live = make(tmp_path, precompute_ref_log_probs=False, layout=layout)
    assert losses(make(tmp_path, layout=layout)) == pytest.approx(losses(live), abs=1e-6)
    assert len(computed) == len(set(computed)) == GROUPS


@pytest.mark.parametrize(
    "again",
    [
        {"beta": 0.5},
        {"loss_type": ["hinge"]},
        {"loss_type": ["ipo"]},
        {"learning_rate": 1.0, "seed": 3},
        {"per_device_train_batch_size": 1},
    ],
    ids=["beta", "hinge", "ipo", "optimizer", "batch size"],
)
def test_another_beta_or_loss_reads_the_cache(tmp_path, computed, again):
    make(tmp_path).train()
    before = len(computed)
    seed = again.get("seed")
    second = make(tmp_path, **{k: v for k, v in again.items() if k != "seed"})
    if seed is not None:
        second.args.seed = seed
    second.train()
    assert before == GROUPS and len(computed) == before


def changed_image():
    rows = mixed_groups()
    rows[0] = {**rows[0], "images": group([image(77)], "x", ["a", "b"], [])["images"]}
    return {"data": dataset(rows)}, 1


def changed_pixel():
    picture = image(0)
    picture.putpixel((3, 3), tuple((v + 1) % 256 for v in picture.getpixel((3, 3))))
    rows = mixed_groups()
    rows[0] = {**rows[0], "images": group([picture], "x", ["a", "b"], [])["images"]}
    return {"data": dataset(rows)}, 1


def changed_response():
    rows = mixed_groups()
    rows[2] = {**rows[2], "responses": ["no", "yes yes", "one two two"]}
    return {"data": dataset(rows)}, 1


def changed_prompt():
    rows = mixed_groups()
    rows[2] = {**rows[2], "prompt": group([], "is there a cat", ["a", "b"], [])["prompt"]}
    return {"data": dataset(rows)}, 1


def with_template(prefix, bos):
    processor = tiny_processor()
    processor.chat_template = prefix + processor.chat_template
    processor.tokenizer.bos_token = bos
    return {"processor": processor}


CHANGES = {
    "image": changed_image,
    "one pixel": changed_pixel,
    "response": changed_response,
    "prompt": changed_prompt,
    "weights": lambda: ({"seed": 1}, GROUPS),
    "layout": lambda: ({"layout": "rows"}, GROUPS),
    "length limit": lambda: ({"max_response_length": 3}, GROUPS),
    "end of a response": lambda: ({"response_end": "end_of_turn"}, GROUPS),
    "log-prob path": lambda: ({"use_fused_logprob": False}, GROUPS),
    "template": lambda: (with_template("a {{ bos_token }}", "<unk>"), GROUPS),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_a_changed_input_is_never_reused(tmp_path, computed, what):
    make(tmp_path).train()
    options, expected = CHANGES[what]()
    changed = losses(make(tmp_path, **options))
    assert len(computed) == GROUPS + expected
    live = losses(make(tmp_path, precompute_ref_log_probs=False, **options))
    assert changed == pytest.approx(live, abs=1e-6)  # nor is anything else mixed up


def test_another_special_token_in_the_template_is_never_reused(tmp_path, computed):
    """The template and the vocabulary stay; what the template writes does not."""
    for count, bos in enumerate(("<unk>", "<|vision_end|>"), 1):
        found = losses(make(tmp_path, **with_template("{{ bos_token }}", bos)))
        assert found == pytest.approx(
            losses(make(tmp_path, precompute_ref_log_probs=False, **with_template("{{ bos_token }}", bos))), abs=1e-6
        )
        assert len(computed) == count * GROUPS


def test_a_template_that_writes_the_date_reuses_nothing_on_another_day(tmp_path, computed, monkeypatch):
    render = GroupEncoder.render
    make(tmp_path).train()
    monkeypatch.setattr(GroupEncoder, "render", lambda self, row: "yes" + render(self, row))
    make(tmp_path).train()
    assert len(computed) == 2 * GROUPS


def each(rows):
    yield from rows


def test_the_images_are_read_once_for_their_hashes(tmp_path, computed, monkeypatch):
    """By preparation, which reads them again where a file has changed."""
    file = tmp_path / "one.png"
    rows = mixed_groups()
    file.write_bytes(rows[0]["images"][0]["bytes"])
    rows[0] = {**rows[0], "images": [{"bytes": None, "path": str(file)}]}
    options = {"features": group_features(()), "cache_dir": str(tmp_path / "arrow"), "gen_kwargs": {"rows": rows}}
    data = Dataset.from_generator(each, **options)
    make(tmp_path, data=data).train()
    digests = []
    monkeypatch.setattr(measure, "image_digest", lambda image, where: digests.append(where) or "x")
    make(tmp_path, data=data).train()
    assert len(computed) == GROUPS and not digests
    monkeypatch.undo()
    add = ReferenceStore.add
    monkeypatch.setattr(
        ReferenceStore, "add", lambda self, key, values: (computed.append(key), add(self, key, values))[1]
    )
    file.write_bytes(group([image(77)], "x", ["a", "b"], [])["images"][0]["bytes"])
    make(tmp_path, data=data).train()
    assert len(computed) == GROUPS + 1


def test_reordered_groups_find_their_numbers(tmp_path, computed):
    make(tmp_path).train()
    turned = dataset(mixed_groups()[::-1])
    assert losses(make(tmp_path, data=turned)) == pytest.approx(
        losses(make(tmp_path, data=turned, precompute_ref_log_probs=False)), abs=1e-6
    )
    assert len(computed) == GROUPS


def test_data_joined_from_two_trainers_finds_its_numbers(tmp_path, computed):
    """Both number their rows from 0."""
    parts = [make(tmp_path, data=dataset(rows)).train_dataset for rows in (mixed_groups()[:2], mixed_groups()[2:])]
    joined = concatenate_datasets(parts)
    assert losses(make(tmp_path, data=joined)) == pytest.approx(
        losses(make(tmp_path, data=joined, precompute_ref_log_probs=False)), abs=1e-6
    )


def test_a_loss_on_tokens_keeps_numbers_of_its_own(tmp_path, computed):
    make(tmp_path).train()
    options = {"loss_type": ["sigmoid"], "ld_alpha": 0.5}
    found = losses(make(tmp_path, **options))
    assert found == pytest.approx(losses(make(tmp_path, precompute_ref_log_probs=False, **options)), abs=1e-6)


KILLED = """
import os, signal, sys
from pathlib import Path
from silkie.training.reference import ReferenceStore
from tests.integration.test_precompute import make
done, add = [], ReferenceStore.add
def add_and_die(self, key, values):
    add(self, key, values)
    done.append(key)
    if len(done) == 2:
        self._file.write(b'{"key": "half a li')
        os.kill(os.getpid(), signal.SIGKILL)
ReferenceStore.add = add_and_die
make(Path(sys.argv[1]), per_device_train_batch_size=1).train()
"""


def test_a_killed_pass_goes_on_where_it_was(tmp_path, computed):
    root = Path(__file__).parents[2]
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=root,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    found = losses(make(tmp_path, per_device_train_batch_size=1))
    assert len(computed) == GROUPS - 2
    assert found == pytest.approx(
        losses(make(tmp_path, per_device_train_batch_size=1, precompute_ref_log_probs=False)), abs=1e-6
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_and_harms_nothing(tmp_path, computed):
    make(tmp_path, data=dataset(mixed_groups()[:2])).train()
    (written,) = (tmp_path / "cache").glob("*/*.jsonl")
    kept = written.rename(written.with_name("earlier.jsonl")).read_text()
    mine = written.with_name(f"{platform.node()}-{os.getpid()}.jsonl")
    mine.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=f"{mine}: the disk is full"):
        make(tmp_path).train()
    mine.unlink()
    assert written.with_name("earlier.jsonl").read_text() == kept
    before = len(computed)
    make(tmp_path).train()
    assert len(computed) - before == GROUPS - 2


def test_numbers_are_kept_bit_for_bit(tmp_path):
    store = ReferenceStore(tmp_path, "key", tokens=True)
    values = [torch.randn(5).numpy(), np.array([-0.0, 1e-38, -3.3333333e7], dtype=np.float32)]
    store.add("group", values)
    store.close()
    again = ReferenceStore(tmp_path, "key", tokens=True)
    assert again.load() == 1
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(again.values["group"], values, strict=True))
    assert ReferenceStore(tmp_path, "key", tokens=False).load() == 0
    assert ReferenceStore(tmp_path, "another", tokens=True).load() == 0


def test_a_writer_with_the_number_of_a_killed_one_loses_nothing(tmp_path):
    first = ReferenceStore(tmp_path, "key")
    first.add("one", [torch.ones(1).numpy()])
    first._file.write(b'{"key": "tw\xff\x00')  # what a disk may hold after a power cut
    first.close()
    second = ReferenceStore(tmp_path, "key")
    second.load()
    second.add("three", [torch.ones(1).numpy()])
    second.close()
    third = ReferenceStore(tmp_path, "key")
    assert third.load() == 2 and set(third.values) == {"one", "three"}
