"""Log-prob core against its peers: time, extra memory and error against float64, in one run.

    python tests/benchmarks/bench_logprob.py                       # this machine's default: CPU settings, or CUDA where there is a device
    python tests/benchmarks/bench_logprob.py --n 8192 --dims 3584 2048 --dtypes bfloat16 --device cuda
    python tests/benchmarks/bench_logprob.py --n 256 --vocab 4096 --dims 64 --repeats 1 --no-memory      # a quick look

Prints a table and writes `logprob_<device>.json` and `.png` into --out. The head is frozen, as under LoRA. Contenders
take turns within each repeat and the best repeat counts, so that a busy machine disturbs all of them alike. CPU times
are processor seconds of the process (all threads), CUDA times are device events. Extra memory is the peak over the
inputs: on a CPU the resident-set peak of a fresh process per contender (after a small warm-up call loaded the
libraries), on CUDA the allocator's peak."""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from peers_logprob import Contender, contenders, matrix_products

FLOOR = "matrix products alone"


def inputs(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden, weight, target with logits like a language model's: noise of deviation 2, target logits from 5 to 27 (p
    1e-4 to 1 - 1e-5)."""
    gen = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=gen) / math.sqrt(d)
    target = torch.randint(0, v, (n,), generator=gen)
    lift = torch.linspace(5, 27, n)[torch.randperm(n, generator=gen)]
    hidden = 2 * torch.randn(n, d, generator=gen) + lift[:, None] * weight[target]
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def run_once(score: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            score(hidden, weight, target)
        return
    leaf = hidden.detach().requires_grad_()
    result = score(leaf, weight, target)
    if result.requires_grad:
        result.sum().backward()


def seconds(score: Any, tensors: tuple[torch.Tensor, ...], backward: bool) -> float:
    if tensors[0].is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run_once(score, *tensors, backward)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.process_time()
    run_once(score, *tensors, backward)
    return time.process_time() - before


def peak_memory_cuda(score: Any, tensors: tuple[torch.Tensor, ...], backward: bool) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(score, *tensors, backward)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident(field: str) -> float:
    """MB of `VmRSS` or `VmHWM` (the peak) of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def child_memory(args: argparse.Namespace) -> None:
    """In a fresh process: prints the extra MB of one contender."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtypes[0])
    score = next(c.score for c in contenders("cpu", only=args.child)[0] if c.name == args.child)
    run_once(score, *inputs(64, args.dims[0], 4096, dtype, "cpu"), args.backward)
    tensors = inputs(args.n, args.dims[0], args.vocab, dtype, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size
    before = resident("VmRSS")
    run_once(score, *tensors, args.backward)
    print(f"extra_mb={resident('VmHWM') - before:.1f}")


def peak_memory_cpu(name: str, args: argparse.Namespace, d: int, dtype: str, backward: bool) -> float:
    shape = [
        "--n",
        str(args.n),
        "--vocab",
        str(args.vocab),
        "--dims",
        str(d),
        "--dtypes",
        dtype,
        "--threads",
        str(args.threads),
    ]
    command = [sys.executable, __file__, "--child", name, *shape, *(["--backward"] if backward else [])]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(found.rsplit("extra_mb=", 1)[1])


def errors(score: Any, tensors: tuple[torch.Tensor, ...], rows: int = 256) -> dict[str, float]:
    """Against float64 on the first `rows` tokens: rms and largest log-prob error, relative error of the gradient."""
    hidden, weight, target = tensors[0][:rows], tensors[1], tensors[2][:rows]
    truth_leaf = hidden.double().requires_grad_()
    truth = -torch.nn.functional.cross_entropy(truth_leaf @ weight.double().t(), target, reduction="none")
    truth.sum().backward()
    leaf = hidden.detach().requires_grad_()
    found = score(leaf, weight, target)
    found.sum().backward()
    gap = found.detach().double() - truth.detach()
    assert leaf.grad is not None and truth_leaf.grad is not None
    relative = (leaf.grad.double() - truth_leaf.grad).norm() / truth_leaf.grad.norm()
    return {
        "logp_rms": gap.square().mean().sqrt().item(),
        "logp_max": gap.abs().max().item(),
        "grad_relative": relative.item(),
    }


def peers(args: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """The contenders that run here, and the reason for each one that does not. A peer that fails on a small problem is
    left out: it must not end a run of many minutes. silkie's own failures do end it."""
    found, absent = contenders(args.device)
    for contender in list(found):
        for dtype in args.dtypes:
            try:
                run_once(contender.score, *inputs(64, 64, 4096, getattr(torch, dtype), args.device), True)
            except Exception as error:
                if contender.name.startswith("silkie"):
                    raise
                absent[contender.name] = f"{dtype}: {type(error).__name__}: {error}".splitlines()[0]
                print(f"left out: {contender.name}: {absent[contender.name]}", file=sys.stderr)
                found.remove(contender)
                break
    return found, absent


def measure(args: argparse.Namespace, found: list[Contender], d: int, dtype: str) -> dict[str, dict[str, float]]:
    """One setting: rows of figures by contender."""

    def every_contender(backward: bool) -> list[Contender]:
        return [*found, Contender(FLOOR, matrix_products(backward), per_token=False)]

    tensors = inputs(args.n, d, args.vocab, getattr(torch, dtype), args.device)
    table: dict[str, dict[str, float]] = {}
    for repeat in range(args.repeats + (args.device == "cuda")):  # on CUDA the first repeat compiles
        for backward, field in ((False, "forward_s"), (True, "forward_backward_s")):
            for contender in every_contender(backward):
                if not contender.per_token and contender.name != FLOOR and not backward:
                    continue  # a scalar loss with its gradient computed in the forward pass has no forward-only form
                took = seconds(contender.score, tensors, backward)
                if args.device == "cuda" and repeat == 0:
                    continue
                row = table.setdefault(contender.name, {})
                row[field] = min(took, row.get(field, math.inf))
    for backward, field in ((False, "forward_mb"), (True, "forward_backward_mb")):
        for contender in every_contender(backward) if args.memory else []:
            if contender.name == FLOOR or (not contender.per_token and not backward):
                continue
            if args.device == "cuda":
                table[contender.name][field] = peak_memory_cuda(contender.score, tensors, backward)
            else:
                table[contender.name][field] = peak_memory_cpu(contender.name, args, d, dtype, backward)
    for contender in every_contender(True):
        if contender.per_token:
            table[contender.name].update(errors(contender.score, tensors))
    return table


COLUMNS = {
    "forward_s": ("forward", "{:.3f} s"),
    "forward_backward_s": ("fwd + bwd", "{:.3f} s"),
    "ratio": ("x silkie", "{:.2f}"),
    "forward_mb": ("fwd extra", "{:.0f} MB"),
    "forward_backward_mb": ("f+b extra", "{:.0f} MB"),
    "logp_rms": ("logp rms err", "{:.1e}"),
    "logp_max": ("logp max err", "{:.1e}"),
    "grad_relative": ("grad rel err", "{:.1e}"),
}


def render(title: str, table: dict[str, dict[str, float]]) -> str:
    """A markdown table; 'x silkie' is the time of forward + backward over the first silkie row's."""
    base = next(row for name, row in table.items() if name.startswith("silkie"))["forward_backward_s"]
    lines = [
        f"### {title}",
        "",
        "| | " + " | ".join(head for head, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, row in table.items():
        row = {**row, "ratio": row["forward_backward_s"] / base}
        lines.append(
            f"| {name} | " + " | ".join(f.format(row[k]) if k in row else "" for k, (_, f) in COLUMNS.items()) + " |"
        )
    return "\n".join(lines)


def plot(results: dict[str, dict[str, dict[str, float]]], path: Path, device: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(results), figsize=(4.2 * len(results), 6.4), squeeze=False, layout="constrained")
    for column, (title, table) in enumerate(results.items()):
        for row, (field, label) in enumerate(
            (("forward_backward_s", "forward + backward, s"), ("forward_backward_mb", "extra memory, MB"))
        ):
            names = [name for name in reversed(table) if field in table[name]]
            values = [table[name][field] for name in names]
            axis = axes[row][column]
            colours = [
                "#1f6f8b" if name.startswith("silkie") else "#d9a441" if name == FLOOR else "#b8b8b8" for name in names
            ]
            bars = axis.barh(names, values, color=colours)
            axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
            axis.set_xlabel(label)
            axis.margins(x=0.18)
            axis.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axis.set_title(title, fontsize=10)
            if column:
                axis.set_yticklabels([])
    figure.suptitle(f"Log-probs of the target tokens, frozen head ({device})", fontsize=11)
    figure.savefig(path, dpi=130)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())
    flags = next((x for x in lines if x.startswith("flags")), "")
    extras = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags]
    return f"{name} ({', '.join(extras) or 'no AVX-512'})"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def parse() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--n", type=int, default=8192 if cuda else 2048, help="scored tokens")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dims", type=int, nargs="+", default=[2048, 3584] if cuda else [256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"] if cuda else ["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10 if cuda else 3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child:
        child_memory(args)
        return
    torch.set_num_threads(args.threads)
    found, absent = peers(args)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for d in args.dims:
        for dtype in args.dtypes:
            title = f"N={args.n}, V={args.vocab}, D={d}, {dtype}"
            results[title] = measure(args, found, d, dtype)
            print(render(title, results[title]), flush=True)
            print()
            write(args, results, absent)


def write(args: argparse.Namespace, results: dict[str, dict[str, dict[str, float]]], absent: dict[str, str]) -> None:
    """JSON and plot of the settings measured so far."""
    args.out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": "python tests/benchmarks/bench_logprob.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "device": device_name(args.device),
        "threads": args.threads,
        "time": "CUDA events" if args.device == "cuda" else "CPU seconds of the process",
        "repeats": args.repeats,
        "versions": versions(),
        "absent": absent,
        "results": results,
    }
    (args.out / f"logprob_{args.device}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, args.out / f"logprob_{args.device}.png", device_name(args.device))


if __name__ == "__main__":
    main()
