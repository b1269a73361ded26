"""Rate items: order shuffled and undone, several votes, unusable answers asked again.

`rate_item` is the core and works with any judge; `rate_items` is the plain loop for judges that cost nothing (the
oracle of the demo);
`silkie.feedback.rate_run` adds what an endpoint needs: concurrency, journal, budget.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from silkie.endpoint.errors import AnswerError, ItemError, Usage
from silkie.endpoint.event_loop import run_to_end
from silkie.feedback.items import AspectRating, JudgeItem, RatedItem, Verdict
from silkie.feedback.judges import Judge

# "Text 3", "text_3", "Texts 1, 2 and 4": the names under which a judge was shown the responses. "Answer 3" may be an
# answer that is 3.
_TEXT_NAMES = re.compile(r"\btext[ _]\d+\b|\btexts \d+(?:(?:, (?:and )?| and | or )\d+)*\b", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """One usable answer: `order[p]` is the response shown at position p; `ratings[i]` belongs to response i (shuffle
    undone)."""

    order: tuple[int, ...]
    ratings: tuple[Mapping[str, AspectRating], ...]
    usage: Usage
    form: str


class UnusableAnswers(Exception):
    """Every attempt at a vote gave an unusable answer; `errors` holds them with their raw texts."""

    def __init__(self, errors: Sequence[AnswerError]) -> None:
        super().__init__(str(errors[-1]))
        self.errors = list(errors)

    @property
    def usage(self) -> Usage:
        return sum((error.usage for error in self.errors), Usage())


def shown_order(item_id: str, count: int, *, seed: int = 0, vote: int = 0, attempt: int = 0) -> tuple[int, ...]:
    """A permutation of range(count) that depends on nothing but its arguments.

    Votes of one item rotate one shuffled order, so that over `count` votes every response stands at every position
    once. A repeated
    question gets a fresh shuffle: an answer that was unusable once may well be so again for the very same text.
    """
    order = list(range(count))
    # seeded by text, not by hash(): Python salts the hashes of strings anew in every process
    random.Random(f"{seed}|{item_id}|{attempt}").shuffle(order)
    turn = vote % count if count else 0
    return tuple(order[turn:] + order[:turn])


def unshuffle(verdict: Verdict, order: Sequence[int]) -> tuple[Mapping[str, AspectRating], ...]:
    """Ratings by response instead of by position shown; a "Text 3" in a rationale becomes the number that this response
    has in the item."""
    if len(verdict.ratings) != len(order):
        raise AnswerError(
            "wrong_count", f"expected {len(order)} ratings, found {len(verdict.ratings)}", usage=verdict.usage
        )

    def number(match: re.Match[str]) -> str:
        shown = int(match[0])
        return str(order[shown - 1] + 1) if 1 <= shown <= len(order) else match[0]

    def renamed(rating: AspectRating) -> AspectRating:
        return replace(rating, rationale=_TEXT_NAMES.sub(lambda names: _NUMBER.sub(number, names[0]), rating.rationale))

    by_response = dict(zip(order, verdict.ratings, strict=True))
    return tuple({name: renamed(rating) for name, rating in by_response[i].items()} for i in range(len(order)))


async def cast_vote(
    item: JudgeItem,
    judge: Judge,
    *,
    vote: int = 0,
    seed: int = 0,
    attempts: int = 3,
    earlier: Sequence[AnswerError] = (),
    on_unusable: Callable[[AnswerError], Awaitable[None]] | None = None,
) -> Vote:
    """One usable answer for `item`, asking at most `attempts` times. Raises UnusableAnswers; ItemError and StopRun pass
    through.

    earlier: unusable answers to this vote that an interrupted run got; they use up attempts. on_unusable: called
    with every further one."""
    errors = list(earlier)
    for attempt in range(len(errors), attempts):
        order = shown_order(item.id, len(item.responses), seed=seed, vote=vote, attempt=attempt)
        try:
            verdict = await judge.arate(item.reordered(order), attempt=attempt)
            ratings = unshuffle(verdict, order)
        except AnswerError as error:
            errors.append(error)
            if on_unusable is not None:
                await on_unusable(error)
            continue
        except ItemError as error:
            error.earlier = errors
            raise
        usage = sum((error.usage for error in errors), verdict.usage)
        return Vote(order=order, ratings=ratings, usage=usage, form=verdict.form)
    raise UnusableAnswers(errors)


def _mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and population standard deviation of the numeric values; (None, None) where there is none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None, None
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / len(numbers))


def combine_votes(item: JudgeItem, votes: Sequence[Vote], aspects: Sequence[str]) -> RatedItem:
    """Mean and spread over the votes of an item. The rationale kept is that of the vote nearest to the mean (the first
    of equals)."""
    ratings: list[dict[str, float | None]] = []
    spread: list[dict[str, float | None]] = []
    rationales: list[dict[str, str]] = []
    for i in range(len(item.responses)):
        ratings.append({})
        spread.append({})
        rationales.append({})
        for name in aspects:
            entries = [vote.ratings[i][name] for vote in votes]
            mean, deviation = _mean_and_spread([entry.rating for entry in entries])
            ratings[i][name], spread[i][name] = mean, deviation
            nearest = min(entries, key=lambda e: math.inf if e.rating is None or mean is None else abs(e.rating - mean))
            rationales[i][name] = nearest.rationale
    return RatedItem(
        id=item.id,
        ratings=ratings,
        rationales=rationales,
        spread=spread,
        orders=[list(vote.order) for vote in votes],
        vote_ratings=[[{name: entry.rating for name, entry in row.items()} for row in vote.ratings] for vote in votes],
        usage=sum((vote.usage for vote in votes), Usage()),
        form=votes[0].form,
    )


async def rate_item(item: JudgeItem, judge: Judge, *, votes: int = 1, seed: int = 0, attempts: int = 3) -> RatedItem:
    """Rate one item with `votes` independent answers. Raises UnusableAnswers when a vote cannot be had."""
    cast = [await cast_vote(item, judge, vote=vote, seed=seed, attempts=attempts) for vote in range(votes)]
    return combine_votes(item, cast, judge.rubric.aspect_names)


def rate_items(
    items: Iterable[JudgeItem], judge: Judge, *, votes: int = 1, seed: int = 0, attempts: int = 3
) -> list[RatedItem]:
    """Rate items one after the other in this process; the first error ends it. For the oracle and small local
    judges."""

    async def run() -> list[RatedItem]:
        return [await rate_item(item, judge, votes=votes, seed=seed, attempts=attempts) for item in items]

    return run_to_end(run())
