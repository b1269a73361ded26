"""Attention of packed rows on a CPU: sdpa with the dense mask against sdpa segment by segment
(silkie.model.attention.segments), in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_attention.py

Prints a table and writes `attention_cpu.json` into --out. Times are processor seconds of forward + backward, best of
--repeats; the two take turns."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from bench_step import device_name

from silkie.batch.packing import Segment, visible
from silkie.model.attention import segments

HEADS = ((8, 2, 32), (16, 2, 128))  # query heads, key-value heads, head size
ROWS = (
    (4, 40, 10, 4),
    (4, 80, 40, 4),
    (4, 150, 50, 4),
    (1, 316, 120, 4),
    (1, 636, 120, 2),
    (1, 636, 120, 4),
    (1, 1340, 120, 4),
)


def one_row(prompt: int, response: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segment indices, subtree ends and positions [1, T] of a group."""
    segment = torch.cat([torch.zeros(prompt, dtype=torch.long), torch.arange(1, k + 1).repeat_interleave(response)])
    position = torch.cat([torch.arange(prompt), torch.arange(prompt, prompt + response).repeat(k)])
    end = torch.where(segment == 0, k + 1, segment + 1)
    return segment[None], end[None], position[None]


def seconds(run: Callable[[], Tensor], repeats: int) -> float:
    best = math.inf
    for _ in range(repeats + 1):
        start = time.process_time()
        run().sum().backward()
        best = min(best, time.process_time() - start)
    return best


def measure(shape: tuple[int, int, int], rows: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
    (heads, kv_heads, size), (batch, prompt, response, k) = shape, rows
    segment, end, position = (x.expand(batch, -1) for x in one_row(prompt, response, k))
    spans = []
    for row in range(batch):
        parent = len(spans)
        spans.append(Segment(row, 0, prompt))
        starts = range(prompt, prompt + k * response, response)
        spans += [Segment(row, start, start + response, parent) for start in starts]
    torch.manual_seed(0)
    tensors = [torch.randn(batch, h, segment.shape[1], size, requires_grad=True) for h in (heads, kv_heads, kv_heads)]

    def dense() -> Tensor:
        mask = visible(segment, end, position)
        return torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True).transpose(
            1, 2
        )

    def by_segment() -> Tensor:
        return segments.attention(torch.nn.Identity(), *tensors, segments.segment_mask(spans, segment.device))[0]

    difference = float((dense() - by_segment()).detach().abs().max())
    found = {"dense_s": seconds(dense, repeats), "segments_s": seconds(by_segment, repeats)}
    sizes = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "rows": batch,
        "prompt": prompt,
        "response": response,
        "k": k,
    }
    return {
        **sizes,
        "tokens": segment.shape[1],
        **found,
        "speed_up": found["dense_s"] / found["segments_s"],
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    results = [measure(shape, rows, args.repeats) for shape in HEADS for rows in ROWS]
    print(
        "| heads x size | rows | tokens of a row (prompt + k x response) | dense, ms | by segment, ms | speed-up |\n"
        + "|---" * 6
        + "|"
    )
    for r in results:
        row = f"{r['tokens']} ({r['prompt']} + {r['k']} x {r['response']})"
        print(
            f"| {r['heads']} x {r['head_size']} | {r['rows']} | {row} | {r['dense_s'] * 1e3:.1f} | {r['segments_s'] * 1e3:.1f} | {r['speed_up']:.2f}x |"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "command": f"python tests/benchmarks/bench_attention.py --repeats {args.repeats}",
        "date": date.today().isoformat(),
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "results": results,
    }
    (args.out / "attention_cpu.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
