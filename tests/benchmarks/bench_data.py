"""Preference data at the size of VLFeedback and beyond: load and inspect a synthetic VLFeedback directory, with peak
memory and throughput.

    python tests/benchmarks/bench_data.py                                   # 100,000 groups of 4 responses, JSONL and an image directory
    python tests/benchmarks/bench_data.py --groups 10000 100000             # two sizes beside each other: is memory flat?
    python tests/benchmarks/bench_data.py --groups 10000 --layout zip parquet
    python tests/benchmarks/bench_data.py --groups 80000 --work DIR --steps "first step again"   # in several calls

Writes `data.json` into --out and prints a table. Each step runs in a process of its own. "heap" is the peak of private
memory (anonymous pages) over what the imports took, sampled 20 times a second and summed over worker processes: the
Arrow cache files are memory-mapped, and the pages of them that happen to be in memory are the kernel's to take back.
"rss" is the largest resident set of a process, imports and mapped pages included; "cache" is what the step has left in
Arrow files on the disk."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
MODELS = [f"model-{letter}" for letter in "abcdefghijkl"]
DECODED = 500  # images
BATCHES = 100  # of one group
STEPS_TIMED = 30
WORDS = "a the red blue small large dog cat table window street person holding sitting behind near with and of on two three".split()
RATING_SHARES = {  # the shares that the paper reports for VLFeedback, in %
    "Helpfulness": (22.8, 14.2, 13.4, 23.4, 26.3),
    "Ethical Considerations": (2.3, 1.2, 1.5, 15.6, 79.4),
    "Visual Faithfulness": (23.1, 11.4, 11.3, 23.3, 30.9),
}


def text(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def record(rng: random.Random, index: int) -> dict[str, Any]:
    """One VLFeedback record of about the real size (5 kB)."""
    models = rng.sample(MODELS, 4)
    completions = []
    for model in models:
        annotations = {}
        for aspect, shares in RATING_SHARES.items():
            rating = "N/A" if rng.random() < 0.002 else str(rng.choices((1, 2, 3, 4, 5), shares)[0])
            annotations[aspect] = {"Rating": rating, "Rationale": text(rng, 15, 40)}
        completions.append({"annotations": annotations, "model": model, "response": text(rng, 10, 120)})
    prompt = f"{text(rng, 6, 25)} {index}?"
    return {
        "id": f"x-{index}",
        "prompt": prompt,
        "models": models,
        "completions": completions,
        "img_path": f"/data/images/{index}.jpg",
    }


def pictures(size: tuple[int, int], count: int = 64) -> list[bytes]:
    """JPEG files with a photograph's bytes per pixel."""
    import numpy as np
    from PIL import Image

    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        noise = Image.fromarray(rng.integers(0, 255, (36, 48, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        noise.save(buffer, format="JPEG", quality=75)
        found.append(buffer.getvalue())
    return found


def write(folder: Path, groups: int, layout: str, size: tuple[int, int] = (640, 480)) -> None:
    """A synthetic VLFeedback: rows.jsonl with images in a directory or a zip, or parquet shards with embedded
    images."""
    rng, images = random.Random(0), pictures(size)
    unique = lambda index: images[index % len(images)] + index.to_bytes(4, "big")  # noqa: E731  (bytes after the end of a JPEG are ignored)
    if layout == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        for start in range(0, groups, 10_000):
            rows = []
            for index in range(start, min(start + 10_000, groups)):
                row = record(rng, index)
                del row["img_path"]
                rows.append({**row, "image": {"bytes": unique(index), "path": f"{index}.jpg"}})
            pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{start:06d}.parquet", row_group_size=1000)
        return
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for index in range(groups):
            file.write(json.dumps(record(rng, index)) + "\n")
    if layout == "zip":
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for index in range(groups):
                archive.writestr(f"images/{index}.jpg", unique(index))
    else:
        (folder / "images").mkdir()
        for index in range(groups):
            (folder / "images" / f"{index}.jpg").write_bytes(unique(index))


def peak_rss() -> int:
    """Largest resident set of this process or of one of its finished children, in MiB."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) // 1024


def disk_mib(folder: Path) -> int:
    """Size of all files below a folder, in MiB."""
    return round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20)


class HeapPeak:
    """Peak of the private memory of this process and its children, in MiB over the start."""

    def __init__(self) -> None:
        self.start, self.peak, self.done = self.now(), 0.0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    @staticmethod
    def now() -> float:
        total = 0
        for process in {os.getpid(), *children(os.getpid())}:
            try:
                status = Path(f"/proc/{process}/status").read_text()
            except OSError:
                continue
            total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        return total / 1024

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.peak = max(self.peak, self.now() - self.start)

    def stop(self) -> float:
        self.done.set()
        self.thread.join()
        return max(self.peak, self.now() - self.start)


def processor_seconds() -> float:
    """Processor time of this process and its finished children, in seconds; unlike wall time it leaves out what other
    jobs take."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def children(process: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def decode(dataset: Any, open_image: Any) -> int:
    """Decode images without keeping them; returns the sum of their widths."""
    return sum(open_image(dataset[index]["images"][0]).width for index in range(DECODED))


def trainer_of(dataset: Any, folder: Path, workers: int | None, model: Any = None, steps: int = 1) -> Any:
    """A run on the data; without a model of its own with one so small that the data is what takes time."""
    from peft import LoraConfig

    from silkie import SilkieDPOConfig, SilkieDPOTrainer
    from tests.support.tiny import tiny_model, tiny_processor

    args = SilkieDPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        max_steps=steps,
        per_device_train_batch_size=1,
        dataloader_num_workers=workers,
    )
    return SilkieDPOTrainer(
        model or tiny_model(),
        args=args,
        train_dataset=dataset,
        processing_class=tiny_processor(image_side=640),
        peft_config=LoraConfig(r=4),
    )


def first_step(dataset: Any, folder: Path) -> None:
    """What a run does before its first step is over: preparation, self-test, identity, the first batch."""
    trainer_of(dataset, folder, None).train()


def batches(dataset: Any, folder: Path, workers: int) -> float:
    """Seconds for 100 groups of a run's own loader, after the first, which starts the workers."""
    loader = iter(trainer_of(dataset, folder, workers).get_train_dataloader())
    next(loader)
    start = time.perf_counter()
    for _ in range(BATCHES):
        next(loader)
    return time.perf_counter() - start


def seconds_of_steps(dataset: Any, folder: Path, workers: int) -> float:
    """Seconds by the clock of steps of a model whose step takes several times as long as its data."""
    from step_setting import build_model
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    trainer = trainer_of(dataset, folder, workers, build_model("tiny", "cpu"), STEPS_TIMED + 1)
    trainer.add_callback(Clock())
    trainer.train()
    return ends[-1] - ends[0]


def step(name: str, folder: Path, layout: str, num_proc: int | None) -> dict[str, Any]:
    """Run one step in this process and measure it."""
    import datasets

    from silkie.data import load_preferences, open_image, split_groups
    from silkie.data.inspect import inspect_preferences

    datasets.disable_progress_bars()
    source = str(folder) if layout == "parquet" else str(folder / "rows.jsonl")
    options: dict[str, Any] = {"cache_dir": folder / "cache", "num_proc": num_proc}
    if layout != "parquet":
        options["image_root"] = str(folder / ("images.zip" if layout == "zip" else "images"))
    actions = {
        "load": lambda: load_preferences(source, **options),
        "load again (cached)": lambda: load_preferences(source, **options),
        "inspect": lambda: inspect_preferences(source, **options),
        "split by image and prompt": lambda: split_groups(load_preferences(source, **options), 0.05, num_proc=num_proc),
        "decode 500 images": lambda: decode(load_preferences(source, **options), open_image),
        "first step": lambda: first_step(load_preferences(source, **options), folder),
        "first step again": lambda: first_step(load_preferences(source, **options), folder),
        "100 batches, no worker": lambda: batches(load_preferences(source, **options), folder, 0),
        "100 batches, one worker": lambda: batches(load_preferences(source, **options), folder, 1),
        "30 steps, no worker": lambda: seconds_of_steps(load_preferences(source, **options), folder, 0),
        "30 steps, one worker": lambda: seconds_of_steps(load_preferences(source, **options), folder, 1),
    }
    heap, cpu, start = HeapPeak(), processor_seconds(), time.perf_counter()
    result = actions[name]()
    seconds, cpu = time.perf_counter() - start, processor_seconds() - cpu
    figures = {"step": name, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "heap_mib": round(heap.stop())}
    figures |= {"rss_mib": peak_rss(), "cache_mib": disk_mib(folder / "cache")}
    if name.startswith("100 batches"):
        figures["groups_per_second"] = round(BATCHES / result, 1)
    if name.startswith("30 steps"):
        figures["seconds_per_step"] = round(result / STEPS_TIMED, 4)
    if name == "load":
        figures["pairs"] = sum(len(pairs) for pairs in result["pairs"])
    if name == "inspect":
        shares = {aspect: row["share"] for aspect, row in result.figures["ratings"].items()}
        figures["rating_shares_percent"] = {
            aspect: [round(100 * share[str(v)], 1) for v in range(1, 6)] for aspect, share in shares.items()
        }
    return figures


STEPS = (
    "load",
    "load again (cached)",
    "inspect",
    "split by image and prompt",
    "decode 500 images",
    "first step",
    "first step again",
    "100 batches, no worker",
    "100 batches, one worker",
    "30 steps, no worker",
    "30 steps, one worker",
)


def measure(
    groups: int, layout: str, num_proc: int | None, work: Path, steps: Sequence[str], pixels: tuple[int, int]
) -> list[dict[str, Any]]:
    folder = work / f"{layout}-{groups}"
    if not (written := folder / "written").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, groups, layout, pixels)
        written.touch()
    size = disk_mib(folder)
    rows = []
    for name in steps:
        command = [
            sys.executable,
            __file__,
            "--step",
            name,
            "--folder",
            str(folder),
            "--layout",
            layout,
            "--num-proc",
            str(num_proc or 0),
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        figures = json.loads(output.splitlines()[-1])
        done = (
            DECODED
            if name.startswith("decode")
            else BATCHES
            if name.startswith("100")
            else STEPS_TIMED
            if name.startswith("30")
            else groups
        )
        figures.update(
            groups=groups,
            pixels=pixels,
            layout=layout,
            data_mib=size,
            groups_per_cpu_second=round(done / max(figures["cpu_seconds"], 0.1)),
        )
        rows.append(figures)
        print(
            f"{layout:8} {groups:>7,} groups, {figures['data_mib']:>6,} MiB  {name:26} {figures['seconds']:>7} s, "
            f"cpu {figures['cpu_seconds']:>6} s  {figures['groups_per_cpu_second']:>7,} groups/cpu-s  heap +{figures['heap_mib']} MiB, "
            f"rss {figures['rss_mib']} MiB, cache {figures['cache_mib']:,} MiB",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[100_000], help=f"at least {2 * DECODED}")
    parser.add_argument("--layout", nargs="+", choices=("folder", "zip", "parquet"), default=["folder"])
    parser.add_argument("--pixels", type=int, nargs=2, default=[640, 480], help="width and height of the images")
    parser.add_argument("--num-proc", type=int, default=0, help="worker processes; 0: none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--name", default="data", help="of the file of figures")
    parser.add_argument("--work", type=Path, help="keep data and caches here, for more calls; their figures are added")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step, args.folder, args.layout[0], args.num_proc or None)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.name}.json"
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        rows = [
            row
            for layout in args.layout
            for groups in args.groups
            for row in measure(
                groups, layout, args.num_proc or None, args.work or Path(temporary), args.steps, tuple(args.pixels)
            )
        ]
    if args.work and file.exists():
        rows = json.loads(file.read_text())["rows"] + rows
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in ("datasets", "pyarrow", "pillow")},
        "command": f"python tests/benchmarks/bench_data.py {' '.join(sys.argv[1:])}".strip(),
        "num_proc": args.num_proc,
        "rows": rows,
    }
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
