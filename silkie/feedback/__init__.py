"""AI feedback: responses from a pool of models, ratings from a judge, a preference dataset from both.

    python -m silkie.feedback sample | rate | injections | build

The pieces are usable on their own: a judge (`OpenAIJudge`, `LocalJudge`, `OracleJudge`), `rate_items` for a plain loop
over items, `write_vlfeedback` for the dataset file; and the three commands as functions: `sample_file`, `rate_file`,
`build_dataset`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "build_dataset": "silkie.feedback.build",
    "Endpoint": "silkie.endpoint.client",
    "AnswerError": "silkie.endpoint.errors",
    "AspectRating": "silkie.feedback.items",
    "JudgeItem": "silkie.feedback.items",
    "RatedItem": "silkie.feedback.items",
    "Usage": "silkie.endpoint.errors",
    "Verdict": "silkie.feedback.items",
    "Judge": "silkie.feedback.judges",
    "LocalJudge": "silkie.feedback.judges",
    "OpenAIJudge": "silkie.feedback.judges",
    "OracleJudge": "silkie.feedback.judges",
    "parse_answer": "silkie.feedback.parse",
    "parse_json": "silkie.feedback.parse",
    "parse_markdown": "silkie.feedback.parse",
    "load_pool": "silkie.feedback.pool",
    "rate_item": "silkie.feedback.rate",
    "rate_items": "silkie.feedback.rate",
    "RateOptions": "silkie.feedback.options",
    "rate_file": "silkie.feedback.rate_run",
    "Rubric": "silkie.feedback.rubric",
    "default_rubric": "silkie.feedback.rubric",
    "load_rubric": "silkie.feedback.rubric",
    "SampleOptions": "silkie.feedback.options",
    "sample_file": "silkie.feedback.sample",
    "write_vlfeedback": "silkie.feedback.vlfeedback",
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
    from silkie.endpoint.client import Endpoint
    from silkie.endpoint.errors import AnswerError, Usage
    from silkie.feedback.build import build_dataset
    from silkie.feedback.items import AspectRating, JudgeItem, RatedItem, Verdict
    from silkie.feedback.judges import Judge, LocalJudge, OpenAIJudge, OracleJudge
    from silkie.feedback.options import RateOptions, SampleOptions
    from silkie.feedback.parse import parse_answer, parse_json, parse_markdown
    from silkie.feedback.pool import load_pool
    from silkie.feedback.rate import rate_item, rate_items
    from silkie.feedback.rate_run import rate_file
    from silkie.feedback.rubric import Rubric, default_rubric, load_rubric
    from silkie.feedback.sample import sample_file
    from silkie.feedback.vlfeedback import write_vlfeedback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
