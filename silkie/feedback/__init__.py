"""AI feedback: responses from a pool of models, ratings from a judge, a preference dataset from both.

    python -m silkie.feedback sample | rate | build

The pieces are usable on their own: a judge (`OpenAIJudge`, `LocalJudge`, `OracleJudge`), `rate_items` for a plain loop over items,
`write_vlfeedback` for the dataset file.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AspectRating": "items",
    "AnswerError": "items",
    "JudgeItem": "items",
    "RatedItem": "items",
    "Usage": "items",
    "Verdict": "items",
    "Judge": "judges",
    "LocalJudge": "judges",
    "OracleJudge": "judges",
    "parse_answer": "parse",
    "parse_json": "parse",
    "parse_markdown": "parse",
    "rate_item": "rate",
    "rate_items": "rate",
    "Rubric": "rubric",
    "default_rubric": "rubric",
    "load_rubric": "rubric",
    "write_vlfeedback": "vlfeedback",
}
__all__ = [
    "AnswerError",
    "AspectRating",
    "Judge",
    "JudgeItem",
    "LocalJudge",
    "OracleJudge",
    "RatedItem",
    "Rubric",
    "Usage",
    "Verdict",
    "default_rubric",
    "load_rubric",
    "parse_answer",
    "parse_json",
    "parse_markdown",
    "rate_item",
    "rate_items",
    "write_vlfeedback",
]

if TYPE_CHECKING:
    from silkie.feedback.items import AnswerError, AspectRating, JudgeItem, RatedItem, Usage, Verdict
    from silkie.feedback.judges import Judge, LocalJudge, OracleJudge
    from silkie.feedback.parse import parse_answer, parse_json, parse_markdown
    from silkie.feedback.rate import rate_item, rate_items
    from silkie.feedback.rubric import Rubric, default_rubric, load_rubric
    from silkie.feedback.vlfeedback import write_vlfeedback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"silkie.feedback.{_EXPORTS[name]}"), name)
