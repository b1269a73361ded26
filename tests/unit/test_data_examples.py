"""The examples on data run as they stand, and mixing keeps what it should."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from silkie.data import DataError, load_preferences, mix
from tests.support import preference_files as files

ROOT = Path(__file__).parents[2]


def environment(tmp_path) -> dict[str, str]:
    return {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }


def run(tmp_path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def parts(tmp_path):
    datasets.disable_progress_bars()
    files.write_images(tmp_path, 4)
    rated = files.write_lines(tmp_path / "rated.jsonl", [files.vlfeedback(index) for index in range(4)])
    pairs = files.write_lines(
        tmp_path / "pairs.jsonl", [{"prompt": f"Q{i}", "chosen": "yes", "rejected": "no"} for i in range(30)]
    )
    return rated, pairs


def test_own_data_example(tmp_path):
    output = run(tmp_path, "examples/bring_your_own_data.py", "--out", str(tmp_path / "own"))
    assert output.count("3 rows -> 3 groups with 9 pairs") == 2 and "my_ratings.jsonl (my-ratings)" in output
    pairs = run(
        tmp_path, "examples/build_pairs.py", str(tmp_path / "own" / "groups.jsonl")
    )  # rated on aspects of its own
    assert "Visual Faithfulness counts twice" in pairs and "9 pairs" in pairs


def test_build_pairs_example(tmp_path):
    rated, _ = parts(tmp_path)
    output = run(tmp_path, "examples/build_pairs.py", str(rated), "--best-model", "otter")
    counts = dict(re.findall(r"^(\S.*?) {2,}\d+ groups +(\d+) pairs", output, re.MULTILINE))
    assert (
        counts["all, as in the paper"] == "24"
        and counts["best against worst"] == "4"
        and counts["best against the rest"] == "12"
    )
    assert counts["otter as best (baseline)"] == "12"


def test_mix_sources_example(tmp_path):
    rated, pairs = parts(tmp_path)
    output = run(tmp_path, "examples/mix_sources.py", f"{rated}:1", f"{pairs}:3", "--out", str(tmp_path / "mixed"))
    assert re.search(r"groups from 2 sources: \d+ to train on, 1 held out", output)
    assert set(datasets.load_from_disk(tmp_path / "mixed")) == {"train", "test"}
    few = [sys.executable, "examples/mix_sources.py", f"{rated}:1"]
    told = subprocess.run(few, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True)
    assert told.returncode == 2 and told.stderr.endswith("fewer than all; pass another --test-size\n")
    assert "2 to train on, 2 held out" in run(tmp_path, *few[1:], "--test-size", "0.5")


def test_mixing_aligns_aspects_and_follows_the_weights(tmp_path):
    rated, pairs = (load_preferences(path, cache_dir=tmp_path / "cache") for path in parts(tmp_path))
    other = load_preferences(
        files.write_lines(tmp_path / "o.jsonl", [files.group_record(images=[])]), cache_dir=tmp_path / "cache"
    )
    everything = mix([rated, pairs, other])
    assert len(everything) == 35
    assert everything[0]["ratings"][0] == {
        "Helpfulness": 4.0,
        "Ethical Considerations": 5.0,
        "Visual Faithfulness": 3.0,
        "Help": None,
    }
    assert everything[10]["ratings"] is None and everything[34]["ratings"][0]["Help"] == 5.0
    assert everything["pairs"][:] == rated["pairs"][:] + pairs["pairs"][:] + other["pairs"][:]
    many = mix([pairs, rated], weights=[9, 1], seed=3)
    from_pairs = sum(group["ratings"] is None for group in many)
    assert from_pairs > 3 * (len(many) - from_pairs)
    assert mix([pairs, rated], weights=[9, 1], seed=3)["id"][:] == many["id"][:]


def test_what_cannot_be_mixed(tmp_path):
    pairs = load_preferences(parts(tmp_path)[1], cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="part 1 is not a dataset of preference groups"):
        mix([pairs, pairs.remove_columns("pairs")])
    with pytest.raises(ValueError, match="one for each of the 2 datasets"):
        mix([pairs, pairs], weights=[1])
    with pytest.raises(ValueError, match="must be positive"):
        mix([pairs, pairs], weights=[1, 0])
    with pytest.raises(ValueError, match="nothing to mix"):
        mix([])
