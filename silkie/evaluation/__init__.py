"""Benchmarks for vision-language models: run, score, compare.

`silkie.stats` imports nothing but numpy; the scorers need no model. `run` and the trainer callback load torch and
transformers when called.
"""

from silkie.evaluation.benchmark import Benchmark
from silkie.evaluation.benchmarks import BENCHMARKS, get_benchmark
from silkie.evaluation.records import Question, ResultError
from silkie.evaluation.scoring import Item, Score
from silkie.stats import bootstrap_mean, mcnemar_exact

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Item",
    "Question",
    "ResultError",
    "Score",
    "bootstrap_mean",
    "get_benchmark",
    "mcnemar_exact",
    "score",
]


def score(benchmark: str, results: str, annotations: str | None = None, *, variant: str | None = None) -> Score:
    """Score a results file with a benchmark's official rule, or a variant of it (see the benchmark's module for its
    layouts and variants)."""
    return get_benchmark(benchmark).score(results, annotations, variant=variant)
