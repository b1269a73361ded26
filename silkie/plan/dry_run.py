"""One optimizer step on a run's real data: the plan, the planner's estimate, the time and the peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from silkie.config import SilkieDPOConfig
from silkie.io.posix import resource
from silkie.plan.workload import plan_of

if TYPE_CHECKING:
    from silkie.trainer import SilkieDPOTrainer


def dry_run(trainer: SilkieDPOTrainer) -> None:
    """Train one step, print the plan and what the step took; nothing is saved."""
    # The estimate first: `one_step` turns off the reference precomputation that the estimate accounts for.
    estimated = estimate_lines(trainer)
    measured = one_step(trainer.args, trainer.train)
    if trainer.accelerator.is_main_process:
        print("\n".join(["", "Plan", *(f"  {line}" for line in (*trainer.plan_lines(), *estimated, measured))]))


def one_step(args: SilkieDPOConfig, train: Callable[[], object]) -> str:
    """Run `train` for one optimizer step without saving or evaluating; a line with its time and peak memory."""
    args.max_steps, args.save_strategy, args.eval_strategy, args.logging_steps = 1, "no", "no", 1
    # The precomputation runs over all groups; the step computes the reference of its own groups instead.
    args.precompute_ref_log_probs = False
    start = time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    if torch.cuda.is_available():
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # bytes that ru_maxrss counts in
        peak = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB of process memory"
    return f"first step (with start-up checks): {seconds:.1f} s, peak {peak}"


def estimate_lines(trainer: SilkieDPOTrainer) -> list[str]:
    """The planner's lines for the first micro-batch, or why there are none: a run needs no estimate."""
    try:
        estimate, memory = plan_of(trainer, next(iter(trainer.get_train_dataloader())))
    except ValueError as error:
        return [f"no estimate: {error}"]
    return [*estimate.lines(), f"memory of the GPU: {memory}"]
