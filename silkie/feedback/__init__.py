"""AI feedback: responses from a pool of models, ratings from a judge, a preference dataset from both.

    python -m silkie.feedback sample | rate | build

The pieces are usable on their own: a judge (`OpenAIJudge`, `LocalJudge`, `OracleJudge`), `rate_items` for a plain loop over items,
`write_vlfeedback` for the dataset file; and the three commands as functions: `sample_file`, `rate_file`, `build_dataset`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "build_dataset": "build",
    "Endpoint": "endpoint",
    "AnswerError": "items",
    "AspectRating": "items",
    "JudgeItem": "items",
    "RatedItem": "items",
    "Usage": "items",
    "Verdict": "items",
    "Judge": "judges",
    "LocalJudge": "judges",
    "OpenAIJudge": "judges",
    "OracleJudge": "judges",
    "parse_answer": "parse",
    "parse_json": "parse",
    "parse_markdown": "parse",
    "load_pool": "pool",
    "rate_item": "rate",
    "rate_items": "rate",
    "RateOptions": "rate_run",
    "rate_file": "rate_run",
    "Rubric": "rubric",
    "default_rubric": "rubric",
    "load_rubric": "rubric",
    "SampleOptions": "sample",
    "sample_file": "sample",
    "write_vlfeedback": "vlfeedback",
}
__all__ = [
    "AnswerError",
    "AspectRating",
    "Endpoint",
    "Judge",
    "JudgeItem",
    "LocalJudge",
    "OpenAIJudge",
    "OracleJudge",
    "RateOptions",
    "RatedItem",
    "Rubric",
    "SampleOptions",
    "Usage",
    "Verdict",
    "build_dataset",
    "default_rubric",
    "load_pool",
    "load_rubric",
    "parse_answer",
    "parse_json",
    "parse_markdown",
    "rate_file",
    "rate_item",
    "rate_items",
    "sample_file",
    "write_vlfeedback",
]

if TYPE_CHECKING:
    from silkie.feedback.build import build_dataset
    from silkie.feedback.endpoint import Endpoint
    from silkie.feedback.items import AnswerError, AspectRating, JudgeItem, RatedItem, Usage, Verdict
    from silkie.feedback.judges import Judge, LocalJudge, OpenAIJudge, OracleJudge
    from silkie.feedback.parse import parse_answer, parse_json, parse_markdown
    from silkie.feedback.pool import load_pool
    from silkie.feedback.rate import rate_item, rate_items
    from silkie.feedback.rate_run import RateOptions, rate_file
    from silkie.feedback.rubric import Rubric, default_rubric, load_rubric
    from silkie.feedback.sample import SampleOptions, sample_file
    from silkie.feedback.vlfeedback import write_vlfeedback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"silkie.feedback.{_EXPORTS[name]}"), name)
