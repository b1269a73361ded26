"""The setting of `bench_step.py` as files that other training tools read, and one run of such a tool.

A tool runs in an environment that the user made (README.md says how), on the same weights, images, prompts and pairs,
through its own public entry point: `peer_entry.py`, which imports nothing of silkie."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from step_setting import IMAGE_GRIDS, build_groups, build_model, special_ids

from tests.support.tiny import tiny_processor

PEERS = ("llamafactory", "ms-swift", "unsloth")
ENTRY = Path(__file__).parent / "peer_entry.py"
RESULT = "result: "
# What its class reads of a model's directory; transformers without torchvision, which silkie allows, does not write it.
VIDEO = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}


def write(folder: Path, *, image_tokens: int, k: int, groups_per_step: int, shape: str, timed: int) -> None:
    """Model, processor, images and pairs below `folder`, and what the run shall do in `setting.json`."""
    groups = build_groups(image_tokens, k, groups_per_step)
    model = build_model(shape, "cpu")
    model.save_pretrained(folder / "model")
    processor = tiny_processor(image_side=28 * 40)
    processor.save_pretrained(folder / "model")
    (folder / "model" / "video_preprocessor_config.json").write_text(json.dumps(VIDEO))
    pairs = []
    for number, group in enumerate(groups):
        image = folder / f"{number}.png"
        Image.open(io.BytesIO(group["images"][0]["bytes"])).save(image)
        text = next(part["text"] for part in group["prompt"][0]["content"] if part["type"] == "text")
        pairs += [
            {
                "image": str(image),
                "prompt": text,
                "chosen": group["responses"][chosen],
                "rejected": group["responses"][rejected],
            }
            for chosen, rejected in group["pairs"]
        ]
    rows, columns = IMAGE_GRIDS[image_tokens]
    setting = {
        "folder": str(folder),
        "pairs": pairs,
        "pixels": rows * columns * 28 * 28,
        "image_token_id": special_ids()["image_token_id"],
        "video_token_id": special_ids()["video_token_id"],
        "steps": timed + 1,
        "learning_rate": 1e-4,
        "lora": {"r": 8, "alpha": 16},
        "beta": 0.1,
    }
    (folder / "setting.json").write_text(json.dumps(setting, indent=1))


def run(peer: str, python: str | None, **sizes: Any) -> dict[str, Any]:
    """What a peer measured, in the words of `step_setting.run`; {"reason": ...} where it could not run."""
    if python is None:
        return {"reason": f"no environment given: --peer-python {peer}=PATH (tests/benchmarks/README.md)"}
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        write(Path(name), **sizes)
        env = {v: os.environ[v] for v in os.environ if v not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        done = subprocess.run(
            [python, str(ENTRY), peer, name],
            capture_output=True,
            text=True,
            cwd=name,
            env={**env, "HF_HUB_OFFLINE": "1"},
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        print("\n".join(said[-20:]), flush=True)
        return {"reason": said[-1] if said else f"exit code {done.returncode}"}
    found = json.loads(lines[-1][len(RESULT) :])
    pairs = sizes["k"] * (sizes["k"] - 1) // 2 * sizes["groups_per_step"]
    best = min(found["all_seconds"])
    return {
        "contender": peer,
        "family": "qwen2_5_vl",
        "lengths": "equal",
        "image_tokens": sizes["image_tokens"],
        "questions": 1,
        "k": sizes["k"],
        "pairs": pairs,
        "groups_per_step": sizes["groups_per_step"],
        "seconds": best,
        "best_of_repeats": [best],
        "pairs_per_second": pairs / best,
        **found,
    }
