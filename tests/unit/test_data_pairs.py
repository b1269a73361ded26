"""`build_pairs`: properties over random ratings, and the rules of each strategy."""

from __future__ import annotations

import math

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silkie.data import PairOptions, RowError, build_pairs, load_preferences, parse_rating, rebuild_pairs, repair_pairs
from silkie.data.pairs import filter_given, response_score
from silkie.data.regroup import join_groups
from tests.support import preference_files as files
from tests.support.preference_files import ASPECTS

number = st.sampled_from([1, 2, 3, 4, 5, "1", "4", "5", 2.5])
rating = st.fixed_dictionaries(
    {aspect: st.one_of(number, st.sampled_from(["N/A", None, "", math.nan])) for aspect in ASPECTS}
)
clean = st.fixed_dictionaries(dict.fromkeys(ASPECTS, number))
RATINGS = [{"a": 5, "b": 1}, {"a": 1, "b": 3}, {"a": 3, "b": 3}, {"a": 3, "b": 3}]  # means 3, 2, 3, 3


def mean(values):
    numbers = [parse_rating(value) for value in values.values()]
    return None if None in numbers else sum(numbers) / len(numbers)


@given(st.lists(rating, max_size=6))
def test_all_pairs_are_exactly_the_strictly_ordered_ones(ratings):
    means = [mean(value) for value in ratings]
    expected = {
        (i, j)
        for i, left in enumerate(means)
        for j, right in enumerate(means)
        if left is not None and right is not None and left > right + 1e-9
    }
    pairs = build_pairs(ratings)
    assert len(pairs) == len(set(pairs)) and set(pairs) == expected
    assert pairs.weights == [1.0] * len(pairs)
    for (i, j), margin in zip(pairs, pairs.margins, strict=True):
        assert margin == pytest.approx(means[i] - means[j]) and margin > 0
    rated = sum(value is not None for value in means)
    assert pairs.dropped["rating not a number"] == len(ratings) - rated
    assert len(pairs) + pairs.dropped["tie"] == rated * (rated - 1) // 2


@given(st.lists(clean, min_size=2, max_size=5), st.randoms())
def test_renumbering_the_responses_renumbers_the_pairs(ratings, random):
    order = list(range(len(ratings)))
    random.shuffle(order)
    shuffled = build_pairs([ratings[index] for index in order])
    assert {(order[i], order[j]) for i, j in shuffled} == set(build_pairs(ratings))


@given(st.lists(clean, min_size=2, max_size=6), st.sampled_from(["best_vs_worst", "best_vs_rest", "random"]))
def test_every_strategy_takes_a_subset_of_all_pairs(ratings, strategy):
    everything, pairs = build_pairs(ratings), build_pairs(ratings, strategy, key="k")
    assert set(pairs) <= set(everything)
    assert bool(pairs) == bool(everything)
    scores = [response_score(value) for value in ratings]
    if strategy == "best_vs_rest":
        assert set(pairs) == {(i, j) for i, j in everything if scores[i] >= max(scores) - 1e-9}
    elif pairs:
        assert len(pairs) == 1
        if strategy == "best_vs_worst":
            assert scores[pairs[0][0]] == pytest.approx(max(scores)) and scores[pairs[0][1]] == pytest.approx(
                min(scores)
            )


@given(st.lists(clean, max_size=6), st.floats(0, 4))
def test_min_margin_splits_the_pairs_in_two(ratings, threshold):
    everything, pairs = build_pairs(ratings), build_pairs(ratings, min_margin=threshold)
    kept = {pair for pair, margin in zip(everything, everything.margins, strict=True) if margin >= threshold - 1e-9}
    assert set(pairs) == kept
    assert pairs.dropped["below min_margin"] == len(everything) - len(kept)


@given(st.lists(clean, max_size=6))
def test_margin_weights_and_ties(ratings):
    weighted = build_pairs(ratings, weight_by_margin=True)
    assert weighted.weights == weighted.margins
    tied = build_pairs(ratings, keep_ties=True)
    assert len(tied) == len(ratings) * (len(ratings) - 1) // 2
    assert {pair for pair, margin in zip(tied, tied.margins, strict=True) if margin > 0} == set(build_pairs(ratings))
    assert all(i < j for (i, j), margin in zip(tied, tied.margins, strict=True) if margin == 0)


@given(st.lists(clean, min_size=2, max_size=5), st.permutations(ASPECTS))
def test_equal_means_are_ties_whatever_the_order_of_the_aspects(ratings, order):
    turned = [{aspect: value[aspect] for aspect in order} for value in ratings]
    assert set(build_pairs(turned)) == set(build_pairs(ratings))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda pair: pair[0] != pair[1]), max_size=12),
    st.integers(0, 9),
)
def test_given_pairs_are_filtered_never_invented(pairs, seed):
    for strategy in ("all", "best_vs_worst", "best_vs_rest", "random"):
        kept = filter_given(pairs, strategy, seed=seed, key="k")
        assert kept == sorted(set(kept)) and all(0 <= position < len(pairs) for position in kept)
        if strategy == "best_vs_rest":
            assert all(pairs[position][0] not in {rejected for _, rejected in pairs} for position in kept)
    assert len(filter_given(pairs, "all")) == len(pairs)


@given(st.lists(clean, min_size=2, max_size=5))
def test_given_pairs_of_a_full_order_filter_like_ratings(ratings):
    scores = [response_score(value) for value in ratings]
    if len({round(value, 6) for value in scores}) < len(scores):
        return  # with ties the pairs alone do not say which response is best
    everything = list(build_pairs(ratings))
    for strategy in ("best_vs_worst", "best_vs_rest"):
        assert [everything[position] for position in filter_given(everything, strategy)] == list(
            build_pairs(ratings, strategy)
        )


def test_the_paper_rule_on_an_example():
    pairs = build_pairs(RATINGS)
    assert set(pairs) == {(0, 1), (2, 1), (3, 1)}
    assert pairs.dropped == {"tie": 3}


def test_aspects_and_weights():
    assert set(build_pairs(RATINGS, aspects=["a"])) == {(0, 1), (0, 2), (0, 3), (2, 1), (3, 1)}
    assert set(build_pairs(RATINGS, aspects={"a": 0, "b": 2})) == {(1, 0), (2, 0), (3, 0)}
    heavy = build_pairs(RATINGS, aspects={"a": 3, "b": 1})  # (3a + b) / 4: 4, 1.5, 3, 3
    assert dict(zip(heavy, heavy.margins, strict=True))[(0, 1)] == pytest.approx(2.5)


def test_a_rating_that_does_not_count_may_be_missing():
    ratings = [{"a": 2, "b": "N/A"}, {"a": 1, "b": 1}]
    assert list(build_pairs(ratings)) == [] and build_pairs(ratings).dropped == {"rating not a number": 1}
    assert list(build_pairs(ratings, aspects=["a"])) == [(0, 1)]


@given(st.lists(st.dictionaries(st.sampled_from(ASPECTS), st.integers(1, 5)), max_size=5))
def test_only_responses_rated_on_every_aspect_of_the_group_are_compared(ratings):
    """A mean over fewer aspects is another quantity: [{a: 5}, {a: 1, b: 5}] orders nothing."""
    named = {aspect for value in ratings for aspect in value}
    full = [index for index, value in enumerate(ratings) if value and value.keys() == named]
    expected = {(i, j) for i in full for j in full if sum(ratings[i].values()) > sum(ratings[j].values())}
    assert set(build_pairs(ratings)) == expected
    assert build_pairs(ratings).dropped["rating not a number"] == len(ratings) - len(full)


def test_an_aspect_that_some_responses_lack_takes_only_those_out():
    ratings = [{"a": 5}, {"a": 1, "b": 2}, {"b": 1}, None]
    pairs = build_pairs(ratings, aspects=["b"])
    assert list(pairs) == [(1, 2)] and pairs.dropped == {"rating not a number": 2}
    assert list(build_pairs([None, {}], aspects=["b"])) == []
    with pytest.raises(KeyError, match="aspect 'b' is not among the rated ones: none"):
        build_pairs([1, 2], aspects=["b"])


def test_plain_numbers_are_ratings_too():
    assert list(build_pairs([1, "3", None])) == [(1, 0)]


@pytest.mark.parametrize(
    ("value", "parsed"),
    [
        ("4", 4.0),
        (" 4.5 ", 4.5),
        (3, 3.0),
        ("N/A", None),
        ("", None),
        (None, None),
        (math.nan, None),
        ("inf", None),
        (True, None),
        ([4], None),
        pytest.param(10**400, None, id="huge integer"),
    ],
)
def test_parse_rating(value, parsed):
    assert parse_rating(value) == parsed


def test_baselines_ignore_the_ratings():
    responses, models = ["short", "a longer one", "mid one"], ["A", "gpt4v", "B"]
    assert list(build_pairs(None, "longest", responses=responses)) == [(1, 0), (1, 2)]
    assert list(build_pairs(None, "model:GPT4V", responses=responses, models=models)) == [(1, 0), (1, 2)]
    assert build_pairs(None, "longest", responses=["ab", "cd"]).dropped == {"no single longest response": 1}
    assert build_pairs(None, "model:x", models=models).dropped == {"model absent": 1}
    assert list(build_pairs(None, "model:A", models=models)) == [(0, 1), (0, 2)]


def test_identical_responses_make_no_pair():
    pairs = build_pairs([3, 2, 1], responses=["same  text", "same text", "other"])
    assert list(pairs) == [(0, 2), (1, 2)] and pairs.dropped == {"identical responses": 1}


def test_random_depends_on_seed_and_key_only():
    ratings = [1, 2, 3, 4, 5, 6]
    draws = {
        (seed, key): tuple(build_pairs(ratings, "random", seed=seed, key=key))
        for seed in range(4)
        for key in ("a", "b")
    }
    assert len(set(draws.values())) > 3
    assert all(draws[seed, key] == tuple(build_pairs(ratings, "random", seed=seed, key=key)) for seed, key in draws)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "best"}, "pairs='best' is not known"),
        ({"strategy": "model"}, "'model:NAME'"),
        ({"model": "x"}, "'model:NAME'"),
        ({"min_margin": -1}, "must be a number >= 0"),
        ({"keep_ties": True, "weight_by_margin": True}, "a tie has margin 0"),
        ({"strategy": "longest", "aspects": ["a"]}, "does not look at ratings"),
        ({"aspects": {"a": -1}}, "aspect weights must be finite and >= 0"),
        ({"aspects": {"a": math.nan}}, "aspect weights must be finite"),
        ({"aspects": {"a": math.inf}}, "aspect weights must be finite"),
        ({"aspects": {"a": 0}}, "with a positive sum"),
        ({"aspects": "a"}, r"write \['a'\]"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        PairOptions(**options)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="pairs='all' needs the ratings"):
        build_pairs(None)
    with pytest.raises(ValueError, match="pairs='longest' needs the responses"):
        build_pairs(None, "longest")
    with pytest.raises(KeyError, match="aspect 'c' is not among the rated ones: 'a', 'b'"):
        build_pairs(RATINGS, aspects=["c"])
    with pytest.raises(ValueError, match="one entry per response, but there are 3 ratings, 1 responses"):
        build_pairs([1, 2, 3], responses=["a"])
    with pytest.raises(ValueError, match=r"load_preferences\(pairs=function\)"):
        build_pairs([1, 2], lambda group: [(1, 0)])


texts = st.sampled_from(["r", "s", "t", "u"])
row = st.tuples(texts, texts, st.sampled_from([0.5, 1.0, 2.0])).filter(lambda item: item[0] != item[1])


@given(st.lists(row, min_size=1, max_size=10))
def test_joining_pair_rows_keeps_every_weighted_preference(rows):
    """The multiset of weighted (chosen text, rejected text) is what the loss is made of: it must be the same before and
    after."""
    groups = [
        {"responses": [a, b], "pairs": [[0, 1]], "pair_weights": [weight], "models": None} for a, b, weight in rows
    ]
    joined = join_groups(groups)
    before: dict = {}
    for a, b, weight in rows:
        before[a, b] = before.get((a, b), 0.0) + weight
    names = joined["responses"]
    after = {
        (names[i], names[j]): weight for (i, j), weight in zip(joined["pairs"], joined["pair_weights"], strict=True)
    }
    assert after == pytest.approx(before)
    assert len(names) == len(set(names)) and len(joined["pairs"]) == len(set(map(tuple, joined["pairs"])))


@pytest.fixture
def stored(tmp_path):
    datasets.disable_progress_bars()
    return lambda *records, **options: load_preferences(
        files.write_lines(tmp_path / "rows.jsonl", list(records)),
        cache_dir=tmp_path / "cache",
        keep_unpaired=True,
        **options,
    )


@pytest.mark.parametrize("strategy", ["all", "best_vs_worst", "best_vs_rest", "random"])
def test_pairs_of_stored_groups_are_those_of_the_records(strategy, stored):
    """Whatever pairs a group was stored with, and where float32 would tell 3.3 + 4.7 from 4 + 4."""
    ratings = [{"a": 3.3, "b": 4.7}, {"a": 4, "b": 4}, {"a": 4.1, "b": 3.9}, {"a": 2.7, "b": 4.4}]
    record = files.group_record(images=[], responses=["p", "longest", "q", "r"], ratings=ratings)
    expected = build_pairs(ratings, strategy, key="g")
    for first in ("all", "longest", "best_vs_worst"):
        groups, dropped = rebuild_pairs(stored(record, pairs=first), strategy)
        assert [tuple(pair) for pair in groups[0]["pairs"]] == list(expected) and not dropped
    assert groups[0]["ratings"][0] == ratings[0]


def test_the_name_of_earlier_versions_still_works():
    assert repair_pairs is rebuild_pairs


def test_rebuilding_keeps_what_has_no_ratings_and_names_the_row_that_fails(stored):
    groups = stored(
        files.group_record(images=[], ratings=..., pairs=[[1, 0]]),
        files.group_record(images=[], ratings=[{"Help": 1}] * 2),
    )
    kept, dropped = rebuild_pairs(groups, "all")
    assert kept["pairs"][:] == [[[1, 0]]] and dropped == [("row 1", "no pairs: tie")]
    with pytest.raises(
        RowError, match=r"mine, row 0, column '\(record\)': found a record that raised ZeroDivisionError"
    ):
        rebuild_pairs(groups, lambda group: 1 / 0, source="mine")
