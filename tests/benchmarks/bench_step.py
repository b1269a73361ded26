"""One optimizer step of the same preference data: stock TRL DPOTrainer against silkie's layouts, in one run.

    python tests/benchmarks/bench_step.py                                                # CPU: Qwen2.5-VL's shape scaled down
    python tests/benchmarks/bench_step.py --device cuda --shape 3b --groups 2            # CUDA: 3B parameters, random weights, bf16
    python tests/benchmarks/bench_step.py --family qwen3_5 --lengths equal unequal       # a hybrid model
    python tests/benchmarks/bench_step.py --questions-per-image 1 3 6 --ks 4             # prefix trees
    python tests/benchmarks/bench_step.py --image-tokens 16 --ks 2 --timed 1 --repeats 1 # a quick look
    python tests/benchmarks/bench_step.py --model photographs --ks 4 --repeats 1         # real weights, see photographs_setting.py
    python tests/benchmarks/bench_step.py --peer llamafactory --peer-python llamafactory=PATH --contenders TRL packed

Prints a table and writes `step_<device>.json` and `.png` into --out, after every process; settings of an earlier call
with the same model stay in the file, each result with its command and date, and --resume leaves them out. A step is everything: images and text to tensors,
reference pass, policy pass, backward, optimizer; LoRA on the language model, vision frozen. All contenders checkpoint
every layer, which is TRL's default, but those whose names say otherwise.
Every contender runs in a process of its own; the contenders of a setting take turns in each repeat, and the best step counts. Time is
processor seconds of the process on a CPU (set OMP_NUM_THREADS=1 and it is the time of one undisturbed core), the clock
on CUDA. FLOPs are torch's count of one step; of causal attention on a CPU, what its kernel
computes (results before 2026-11-28 22:30 count it as dense). Memory: on a CPU the resident peak of
the steps over what the process held before them, on CUDA the allocator's peak. The precomputed reference is made before
the first step and not part of it: it is paid once, for all epochs."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import peer_data
from step_setting import CONTENDERS, FAMILIES, HYBRID, IMAGE_GRIDS, KEPT, RESPONSE_WORDS, SHAPES, SHARED, run

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
ORDER = (*CONTENDERS, *peer_data.PEERS)
_RESULT = peer_data.RESULT


def in_own_process(
    contender: str, image_tokens: int, k: int, lengths: str, questions: int, args: argparse.Namespace
) -> dict[str, Any]:
    """One contender in a fresh process: no memory, caches or compiled code of another."""
    call = {"command": args.command, "date": date.today().isoformat()}
    if contender in peer_data.PEERS:
        sizes = {"image_tokens": image_tokens, "k": k, "groups_per_step": args.groups, "shape": args.shape}
        found = peer_data.run(contender, args.peer_python.get(contender), **sizes, timed=args.timed)
        if "reason" not in found:
            return {**found, **call}
        args.absent[contender] = found["reason"]
        print(f"{contender}: no result: {found['reason']}", flush=True)
        return {}
    one = {
        "contender": contender,
        "k": k,
        "questions": questions,
        "groups_per_step": args.groups * questions,
        "timed": args.timed,
    }
    if args.model == "shape":
        one |= {
            "image_tokens": image_tokens,
            "shape": args.shape,
            "device": args.device,
            "backend": args.backend,
            "family": args.family,
            "lengths": lengths,
        }
    command = [sys.executable, __file__, "--model", args.model, "--one", json.dumps(one)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        reason = "out of memory" if "OutOfMemoryError" in done.stderr else done.stderr.strip()[-2000:]
        print(f"{contender}, {image_tokens} image tokens, k={k}: no result: {reason}", flush=True)
        return {}
    return {**json.loads(lines[-1][len(_RESULT) :]), **call}


def _repeats(result: dict[str, Any]) -> list[float]:
    """The best step of each repeat; files of older versions keep the best of all."""
    return result.get("best_of_repeats") or [result["seconds"]]


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The faster of two results; times of both, the larger peak."""
    if not old or not new:
        return old or new
    best, other = (old, new) if old["seconds"] <= new["seconds"] else (new, old)
    return {
        **best,
        "all_seconds": old["all_seconds"] + new["all_seconds"],
        "best_of_repeats": _repeats(old) + _repeats(new),
        "extra_bytes": max(best["extra_bytes"], other["extra_bytes"]),
    }


def measure(
    args: argparse.Namespace, earlier: list[dict[str, Any]], save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The cells of this call in place of earlier ones of the same setting, whose other cells stay as they are. A
    setting is measured whole, all contenders in turn, before the next: a run that is cut off leaves whole settings.

    Args:
        earlier: results of an earlier call.
        save: gets all results after every process.
    """
    settings = itertools.product(args.lengths, args.image_tokens, args.questions_per_image, args.ks)
    results = {(*_setting(r), r["contender"]): r for r in earlier}
    for setting in settings:
        alone = args.groups * setting[2] == 1  # nothing to share, and features are kept of several images only
        contenders = [c for c in args.contenders if not (alone and (c == SHARED or c.endswith(KEPT)))]
        if args.resume and all((*setting, c) in results for c in contenders):
            continue
        kept = {c: results[(*setting, c)] for c in contenders if args.add and (*setting, c) in results}
        found: dict[str, dict[str, Any]] = dict(kept)
        for _, contender in itertools.product(range(args.repeats), contenders):
            lengths, tokens, questions, k = setting
            one = in_own_process(contender, tokens, k, lengths, questions, args)
            found[contender] = merge(found.get(contender, {}), one)
            if found[contender]:
                print(row(found[contender], found.get(CONTENDERS[0], {})), flush=True)
                results[(*setting, contender)] = found[contender]
                save(_ordered(results))
    return _ordered(results)


def _ordered(results: dict[tuple[Any, ...], dict[str, Any]]) -> list[dict[str, Any]]:
    return [results[key] for key in sorted(results, key=lambda key: (*key[:-1], ORDER.index(key[-1])))]


def earlier_results(file: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of an earlier call that measured the same model on the same kind of machine; none otherwise."""
    if not file.exists():
        return []
    old = json.loads(file.read_text())
    same = [name for name in facts if name not in ("command", "date")]
    return old["results"] if all(old.get(name) == facts[name] for name in same) else []


def row(result: dict[str, Any], stock: dict[str, Any]) -> str:
    speed = f"{result['pairs_per_second'] / stock['pairs_per_second']:5.2f}x" if stock else "    -"
    if stock and len(_repeats(result)) > 1:
        low, high = interval(result, stock)
        speed += f" ({low:.2f}-{high:.2f})"
    flops = f"{stock['flops'] / result['flops']:5.2f}x" if stock and result["flops"] else "    -"
    losses = " ".join(f"{loss:.4f}" for loss in result["losses"][:3])
    return (
        f"| {result['lengths']:7s} | {result['image_tokens']:5d} | {result['questions']} | {result['k']} | {result['contender']:50s} | {result['seconds']:8.3f} | {result['pairs_per_second']:8.3f} | {speed} "
        f"| {result['flops'] / 1e9:10.1f} | {flops} | {result['extra_bytes'] / 2**20:8.0f} | {losses} |"
    )


def interval(result: dict[str, Any], stock: dict[str, Any]) -> tuple[float, float]:
    """Smallest and largest speed-up of a repeat: its best step against TRL's best of the same repeat."""
    ratios = [t / s for s, t in zip(_repeats(result), _repeats(stock), strict=False)]
    return min(ratios), max(ratios)


def table(results: list[dict[str, Any]]) -> str:
    head = (
        "| responses | image tokens | questions | k | contender | s / step | pairs / s | speed-up | GFLOP | fewer | peak MiB | first losses |\n"
        + "|---" * 12
        + "|"
    )
    stock = {_setting(r): r for r in results if r["contender"] == CONTENDERS[0]}
    return "\n".join([head, *(row(r, stock.get(_setting(r), {})) for r in results)])


def _setting(result: dict[str, Any]) -> tuple[Any, ...]:
    return result.get("lengths", "equal"), result["image_tokens"], result.get("questions", 1), result["k"]


def plot(results: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = sorted({(r["lengths"], r["questions"], r["k"]) for r in results})
    tokens = sorted({r["image_tokens"] for r in results})
    ran = [c for c in ORDER if any(r["contender"] == c for r in results)]
    width = 0.8 / len(ran)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.8), squeeze=False)
    for axis, (lengths, questions, k) in zip(axes[0], panels, strict=True):
        for n, contender in enumerate(ran):
            bars = [
                (i, r["pairs_per_second"])
                for i, t in enumerate(tokens)
                for r in results
                if (*_setting(r), r["contender"]) == (lengths, t, questions, k, contender)
            ]
            left = (n - (len(ran) - 1) / 2) * width
            axis.bar([i + left for i, _ in bars], [v for _, v in bars], width, label=contender)
        axis.set(
            title=f"{questions} x {k} responses of {lengths} length, {k * (k - 1) // 2} pair{'s' if k > 2 else ''}",
            xlabel="image tokens",
            ylabel="pairs per second",
            xticks=range(len(tokens)),
            xticklabels=tokens,
        )
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def setting(model: str) -> Callable[..., dict[str, Any]]:
    """What runs one contender."""
    if model == "shape":
        return run
    from photographs_setting import run as run_photographs  # wants packages that are no dependency of silkie

    return run_photographs


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{model.group(1) if model else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", choices=("shape", "photographs"), default="shape", help="random weights, or real ones"
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--family", choices=FAMILIES, default=FAMILIES[0], help="whose shape the model has")
    parser.add_argument("--lengths", nargs="+", choices=tuple(RESPONSE_WORDS), default=["equal"], help="of responses")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--peer", nargs="+", choices=("trl", *peer_data.PEERS), default=[], help="other tools as well")
    parser.add_argument(
        "--peer-python", nargs="+", default=[], metavar="PEER=PATH", help="the interpreter that has the tool"
    )
    parser.add_argument("--image-tokens", type=int, nargs="+", choices=tuple(IMAGE_GRIDS), default=[256, 576, 1280])
    parser.add_argument("--ks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--questions-per-image", type=int, nargs="+", default=[1], help="groups that have one image")
    parser.add_argument("--groups", type=int, default=1, help="images per optimizer step")
    parser.add_argument("--backend", default="auto", help="attention_backend of the packed layout")
    parser.add_argument("--timed", type=int, default=2, help="timed steps per run")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--add", action="store_true", help="add the repeats to those that the results file has")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", default=None, help="file name without suffix; default: step[_<family>]_<device>")
    parser.add_argument("--resume", action="store_true", help="leave out the settings that the file already has")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(_RESULT + json.dumps(setting(args.model)(**json.loads(args.one))))
        return
    if args.model == "photographs":
        fixed = ("device", "shape", "backend", "family", "lengths", "image_tokens")
        if touched := [name for name in fixed if getattr(args, name) != parser.get_default(name)]:
            parser.error(
                f"--model photographs is one model and one prompt on the CPU: leave {', '.join(touched)} alone"
            )
        args.image_tokens, args.name = [4], args.name or "photographs_cpu"
    if args.family == "qwen3_5" and args.shape not in HYBRID:
        parser.error(f"--family qwen3_5 has the shapes {', '.join(HYBRID)}")
    args.absent, args.peer_python = {}, dict(word.split("=", 1) for word in args.peer_python)
    stock = ["TRL"] if args.peer else []
    args.contenders = list(dict.fromkeys([*stock, *args.contenders, *(peer for peer in args.peer if peer != "trl")]))
    args.out.mkdir(parents=True, exist_ok=True)
    family = "" if args.family == FAMILIES[0] else f"_{args.family}"
    file = args.out / f"{args.name or f'step{family}_{args.device}'}.json"
    given = [a for before, a in itertools.pairwise(sys.argv) if "--out" not in (before, a)]
    given = [f"{a.split('=')[0]}=PATH" if a.startswith(tuple(f"{p}=" for p in peer_data.PEERS)) else a for a in given]
    args.command = " ".join(["python", "tests/benchmarks/bench_step.py", *given])
    facts = {
        "command": args.command,
        "date": date.today().isoformat(),
        "device": device_name(args.device),
        "python": platform.python_version(),
        "packages": {p: metadata.version(p) for p in PACKAGES},
        "family": args.family if args.model == "shape" else "llava",
        "shape": SHAPES[args.shape] if args.model == "shape" else "recipes/studies/photographs",
    }

    def save(found: list[dict[str, Any]]) -> None:
        """After every process: a long measurement that is cut off keeps what it has."""
        absent = {"absent": args.absent} if args.absent else {}
        file.write_text(json.dumps({**facts, **absent, "results": found}, indent=1) + "\n")

    results = measure(args, earlier_results(file, facts), save)
    print("\n" + table(results))
    plot(results, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
