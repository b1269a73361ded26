"""The callbacks that evaluate a policy while it trains."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from silkie.evaluation.callback import BenchmarkCallback
from silkie.evaluation.sample_answers import Reporting, SampleAnswers


def callbacks(host: Reporting, args: Any, held_out: Any) -> list[TrainerCallback]:
    """What `eval_benchmarks` and `log_answers` ask for.

    Args:
        host: the trainer.
        args: its options.
        held_out: its evaluation data, one dataset or several by name.

    Raises:
        ValueError: `log_answers` without evaluation data; a model that reads no images.
    """
    if isinstance(host.processing_class, PreTrainedTokenizerBase):
        option = "eval_benchmarks" if args.eval_benchmarks else "log_answers"
        raise ValueError(
            f"`{option}` asks questions about images, through a processor; this model has a tokenizer only."
        )
    made: list[TrainerCallback] = []
    if args.eval_benchmarks:
        limit, every = args.eval_benchmark_limit, args.eval_benchmark_steps
        made.append(BenchmarkCallback(args.eval_benchmarks, every, limit=limit, seed=args.seed, trainer=host))
    if args.log_answers:
        data = next(iter(held_out.values())) if isinstance(held_out, dict) else held_out
        if data is None:
            raise ValueError("`log_answers` answers prompts of the evaluation data: pass an eval_dataset.")
        made.append(SampleAnswers(data, args.log_answers, trainer=host, seed=args.seed))
    return made
