"""Image features on disk: the same numbers, encoded once per run, and never those of another tower."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from silkie.model import vision_cache
from silkie.model.vision import vision_parameters
from silkie.model.vision_cache import NotCacheable, VisionCache
from tests.integration.test_trainer import adapter, assert_same, losses, make
from tests.support.data import dataset, mixed_groups
from tests.support.tiny import tiny_model

TREES = 3  # groups of the mixed data that have images


@pytest.fixture
def opened(monkeypatch):
    """The caches of the trainers of a test, in order."""
    found = []
    init = VisionCache.__init__
    monkeypatch.setattr(VisionCache, "__init__", lambda self, **k: (init(self, **k), found.append(self))[0])
    return found


def run(folder, **options):
    trainer = make(folder, **{"per_device_train_batch_size": 1, "dataloader_num_workers": 0, **options})
    trainer.train()
    return trainer


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_features_are_encoded_once_and_training_has_the_same_bits(tmp_path, opened, family):
    """qwen3_vl: the features of the deepstack levels are several tensors more."""
    off = run(tmp_path / "off", family=family, vision_cache="off")
    assert not opened
    cold = run(tmp_path / "cold", family=family, vision_cache=str(tmp_path / "kept"))
    warm = run(tmp_path / "warm", family=family, vision_cache=str(tmp_path / "kept"))
    assert opened[0].encoded == TREES
    assert opened[1].encoded == 0 and opened[1].read > TREES
    for trainer in (cold, warm):
        assert losses(trainer) == losses(off)
        assert_same(adapter(trainer), adapter(off), 0.0)


def test_a_batch_of_several_groups_is_equal_in_float64(tmp_path):
    models = [tiny_model().double() for _ in range(2)]
    off, on = (
        run(tmp_path, model=model, vision_cache=kind, per_device_train_batch_size=4)
        for model, kind in zip(models, ("off", str(tmp_path / "kept")), strict=True)
    )
    assert losses(on) == pytest.approx(losses(off), abs=1e-12)
    assert_same(adapter(on), adapter(off), 1e-9)


def test_another_tower_finds_nothing(tmp_path, opened):
    folder = str(tmp_path / "kept")
    run(tmp_path, vision_cache=folder, max_steps=4)
    changed = tiny_model()
    with torch.no_grad():
        vision_parameters(changed)[0].view(-1)[0] += 1e-3
    run(tmp_path, model=changed, vision_cache=folder, max_steps=4)
    assert opened[0].directory != opened[1].directory and opened[1].encoded == TREES


def test_a_changed_image_is_encoded(tmp_path, opened):
    folder, rows = str(tmp_path / "kept"), mixed_groups()
    run(tmp_path, vision_cache=folder, max_steps=4)
    rows[0] = {**rows[0], "images": rows[3]["images"]}
    rows[3] = {**rows[3], "images": rows[1]["images"][:1]}
    run(tmp_path, vision_cache=folder, max_steps=4, data=dataset(rows))
    assert opened[1].encoded == 1  # the other was known


def test_a_trained_tower_is_refused(tmp_path):
    options = dict(model=tiny_model(), ref_model=tiny_model(), peft=False, freeze_vision=False)
    with pytest.raises(ValueError, match="cannot be kept on disk: the vision tower trains"):
        run(tmp_path, vision_cache=str(tmp_path / "kept"), **options)
    assert run(tmp_path, max_steps=1, **options).passes.vision_cache is None


@pytest.mark.parametrize("damage", ["cut", "a bit"])
def test_a_damaged_file_is_encoded_again(tmp_path, opened, caplog, damage):
    folder = tmp_path / "kept"
    first = run(tmp_path, vision_cache=str(folder))
    file = sorted(folder.rglob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    if damage == "cut":
        del content[-7:]
    else:
        content[-7] ^= 1
    file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        again = run(tmp_path, vision_cache=str(folder))
    assert losses(again) == losses(first) and opened[1].encoded == 1
    assert f"{file}: damaged" in caplog.text
    with safe_open(file, framework="pt") as mended:
        assert mended.keys()


def test_a_killed_writer_leaves_nothing_that_is_read(tmp_path, opened, monkeypatch):
    folder = tmp_path / "kept"
    monkeypatch.setattr("silkie.model.vision_cache.os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, vision_cache=str(folder))
    assert not list(folder.rglob("*.safetensors"))
    monkeypatch.undo()
    assert run(tmp_path, vision_cache=str(folder)).state.global_step


KILLED = """
import os, signal, sys
from pathlib import Path
from silkie.model import vision_cache
from tests.integration.test_vision_cache import run
written, save = [], vision_cache.save_file
def half_a_file(tensors, file, metadata):
    save(tensors, file, metadata)
    written.append(file)
    if len(written) == 2:
        os.truncate(file, os.path.getsize(file) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
vision_cache.save_file = half_a_file
run(Path(sys.argv[1]), vision_cache=sys.argv[2])
"""


def test_a_run_killed_while_it_writes_trains_the_same_bits_when_started_again(tmp_path, opened):
    root, kept = Path(__file__).parents[2], tmp_path / "kept"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(kept)],
        cwd=root,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    assert len(list(kept.rglob("*.safetensors"))) == 1 and len(list(kept.rglob("*.part"))) == 1
    again, off = run(tmp_path / "run", vision_cache=str(kept)), run(tmp_path / "off", vision_cache="off")
    assert opened[0].encoded == TREES - 1
    assert losses(again) == losses(off)
    assert_same(adapter(again), adapter(off), 0.0)


def test_a_disk_that_takes_no_more_is_no_error(tmp_path, opened, monkeypatch, caplog):
    resource = pytest.importorskip("resource")
    save = vision_cache.save_file

    def no_room(*args, **kwargs):
        """The system refuses the write itself, as on a full disk."""
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    off = run(tmp_path / "off", vision_cache="off")
    monkeypatch.setattr(vision_cache, "save_file", no_room)
    with caplog.at_level(logging.WARNING):
        full = run(tmp_path / "full", vision_cache=str(tmp_path / "kept"))
    assert losses(full) == losses(off)
    assert caplog.text.count("cannot be written") == 1 and "File too large" in caplog.text
    assert opened[0].encoded > TREES and not [f for f in (tmp_path / "kept").rglob("*") if f.is_file()]


def test_a_full_cache_is_no_error(tmp_path, opened, caplog):
    off = run(tmp_path, vision_cache="off")
    with caplog.at_level(logging.WARNING):
        small = run(tmp_path, vision_cache=str(tmp_path / "kept"), vision_cache_gb=1e-9)
    assert losses(small) == losses(off) and not list((tmp_path / "kept").rglob("*.safetensors"))


def test_an_encoder_that_mixes_images_is_refused(tmp_path, monkeypatch):
    model = tiny_model()
    inner, compute = type(model.base_model), type(model.base_model).get_image_features

    def mixing(self, pixel_values, image_grid_thw=None, **kwargs):
        out = compute(self, pixel_values, image_grid_thw, **kwargs)
        mean = torch.cat(list(out.pooler_output)).mean(0)
        out.pooler_output = tuple(t + mean for t in out.pooler_output)
        return out

    monkeypatch.setattr(inner, "get_image_features", mixing)
    with pytest.raises(ValueError, match="depend on the other images") as caught:
        run(tmp_path, model=model, vision_cache=str(tmp_path / "kept"))
    assert isinstance(caught.value.__cause__, NotCacheable)


def test_the_reference_pass_and_evaluation_share_it(tmp_path, opened):
    trainer = run(tmp_path, vision_cache=str(tmp_path / "kept"), precompute_ref_log_probs=True, num_train_epochs=1)
    encoded = opened[0].encoded
    trainer.evaluate(dataset())
    assert encoded == opened[0].encoded == TREES
