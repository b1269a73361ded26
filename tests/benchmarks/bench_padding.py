"""What the padding of recurrent layers costs: a language model of Qwen3.5's layers on packed rows, the states of prompts
forked in few and more calls, against a plain row of as many tokens (which computes something else, but has
no padding at all).

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_padding.py

Prints a table and writes `padding_cpu.json` into --out. FLOPs are torch's count of forward and backward with frozen
weights, which is what LoRA costs but for its own small products; seconds are processor seconds of the same, best of
--repeats, in which the contenders take turns."""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
from bench_step import device_name
from step_setting import build_model

from silkie.batch.packing import PromptAndResponses, pack, visible
from silkie.model.recurrent import CALLS, Calls, ForkPlan, fork_plan, install
from silkie.model.recurrent.calls import choose_calls, padding
from silkie.model.recurrent.plan import SHORTEST, row_lengths

# name -> (tokens of the prompt, of each response) per group
CASES: dict[str, list[tuple[int, list[int]]]] = {
    "4 x 120": [(636, [120] * 4)],
    "48, 188": [(636, [48, 188])],
    "30, 60, 120, 270": [(636, [30, 60, 120, 270])],
    "4 groups, 16 responses of 20 to 270": [(636, random.Random(seed).sample(range(20, 271), 4)) for seed in range(4)],
    "4 groups, prompts of 120 to 1340": [(length, [120] * 4) for length in (120, 316, 636, 1340)],
}


def batch_of(groups: list[tuple[int, list[int]]]) -> Any:
    def one(prompt: int, responses: list[int]) -> PromptAndResponses:
        ids = [torch.zeros(n, dtype=torch.long) for n in responses]
        return PromptAndResponses(
            prompt_ids=torch.zeros(prompt, dtype=torch.long),
            prompt_positions=torch.arange(prompt).expand(3, -1),
            responses=ids,
        )

    return pack([one(*group) for group in groups], "packed", pad_id=0)


class Contender:
    """The language model on one batch, its recurrent layers along a plan (None: along the row)."""

    def __init__(self, model: Any, batch: Any, plan: ForkPlan | None) -> None:
        self.model = model
        mask = visible(batch.segment_index, batch.subtree_end, batch.logical_positions)
        self.inputs = {
            "position_ids": batch.position_ids,
            "attention_mask": {"full_attention": mask, "linear_attention": plan},
            "use_cache": False,
        }
        shape = (*batch.input_ids.shape, model.config.hidden_size)
        self.hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        self.seconds = math.inf

    def run(self) -> None:
        self.model(inputs_embeds=self.hidden, **self.inputs).last_hidden_state.sum().backward()

    def flops(self) -> int:
        with FlopCounterMode(display=False) as counter:
            self.run()
        return counter.get_total_flops()

    def time(self) -> None:
        start = time.process_time()
        self.run()
        self.seconds = min(self.seconds, time.process_time() - start)


def measure(model: Any, name: str, repeats: int) -> dict[str, Any]:
    batch = batch_of(CASES[name])
    length = batch.input_ids.shape[1]
    roots, leaves = row_lengths(batch.segments, CALLS)
    chosen, told = choose_calls(CALLS, [(roots, leaves)], SHORTEST)
    ways = dict.fromkeys([*(Calls(leaves=n) for n in range(1, chosen.leaves + 1)), chosen])
    plans = {calls: fork_plan(batch.segments, length, torch.device("cpu"), calls=calls) for calls in ways}
    plain, forked = Contender(model, batch, None), {c: Contender(model, batch, plan) for c, plan in plans.items()}
    flops = {contender: contender.flops() for contender in (plain, *forked.values())}
    for _ in range(repeats):
        for contender in flops:
            contender.time()
    return {
        "case": name,
        "groups": CASES[name],
        "chosen": told,
        "calls": [
            {
                "prompts": calls.roots,
                "responses": calls.leaves,
                "chosen": calls == chosen,
                "padding_prompts": padding([roots], calls.roots),
                "padding_responses": padding([leaves], calls.leaves, SHORTEST),
                "flops": flops[contender] / flops[plain],
                "seconds": contender.seconds / plain.seconds,
            }
            for calls, contender in forked.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    model = build_model("tiny", "cpu", "qwen3_5").model.language_model.train().requires_grad_(False)
    install(model)
    print(
        "| lengths | calls: prompts + responses | padding of prompts, responses | FLOPs | CPU seconds |"
        + "\n|"
        + "---|" * 5
    )
    results = []
    for name in CASES:
        results.append(measure(model, name, args.repeats))
        for c in results[-1]["calls"]:
            mark = " (what a run takes)" if c["chosen"] else ""
            print(
                f"| {name} | {c['prompts']} + {c['responses']}{mark} | {c['padding_prompts']:.0%},"
                f" {c['padding_responses']:.0%} | {c['flops']:.2f} | {c['seconds']:.2f} |",
                flush=True,
            )
    facts = {
        "command": " ".join(["python", "tests/benchmarks/bench_padding.py"]),
        "date": date.today().isoformat(),
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "padding_cpu.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
