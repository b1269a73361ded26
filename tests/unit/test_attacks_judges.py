"""Replies of judges that a lenient reader takes for another grade."""

import json

import pytest

from silkie.endpoint.errors import AnswerError
from silkie.evaluation.benchmarks.mmvet import read_grade
from silkie.feedback.parse import parse_answer
from silkie.feedback.rubric import default_rubric

RUBRIC = default_rubric()


@pytest.mark.parametrize(
    "reply",
    [
        "Score: 1/10",
        "score: 1 / 5",
        "Score: 1 out of 10",
        "Correctness: 1 of 10",
        "Score: 0,5",
        "Score: 0-1; the answer is right",
        "Score: 0 to 1",
        "Score: 10",
    ],
)
def test_a_grade_on_another_scale_is_no_grade(reply):
    """They were read as 1.0, or as 0.0: ten times too much, or nothing."""
    assert read_grade(reply) is None


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("Score: 0.7/1", 0.7), ("Score: 1.0/1.0", 1.0), ("score: 0.3 out of 1", 0.3), ("Score: 0.7, 2 errors", 0.7)],
)
def test_a_grade_on_its_own_scale_is_read(reply, grade):
    assert read_grade(reply) == grade


def answer(entry, name="text_1"):
    return json.dumps({aspect.name: {name: {"rationale": "x", "rating": 4}} for aspect in RUBRIC.aspects}).replace(
        '{"rationale": "x", "rating": 4}', entry
    )


def test_a_rating_that_comes_twice_in_another_case_is_an_error():
    """The last one won."""
    with pytest.raises(AnswerError, match="once per text"):
        parse_answer(answer('{"rating": 1, "Rating": 5}'), RUBRIC, 1)
    ((rating,),) = [
        {found.rating for found in text.values()} for text in parse_answer(answer('{"Rating": 5}'), RUBRIC, 1)[0]
    ]
    assert rating == 5


def test_a_text_number_without_end_is_an_error_of_the_answer():
    """Python reads no integer of more than 4300 digits: the run ended with a ValueError."""
    with pytest.raises(AnswerError):
        parse_answer(answer('{"rating": 4}', name="text_" + "1" * 5000), RUBRIC, 1)
