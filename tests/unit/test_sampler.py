"""Batches of groups: every group once, the budget held, deterministic, the same number of batches in every epoch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silkie.batch.companies import Company
from silkie.batch.sampler import _COST_STEP, GroupBatchSampler, WithEmptyGroups

COSTS = st.lists(st.integers(1, 3000), min_size=1, max_size=60)
SHAPES = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 1000)), min_size=1, max_size=60)
BUDGET = st.one_of(st.none(), st.integers(64, 8000))
MANY = settings(max_examples=200, deadline=None)


def sampler(costs, budget, **more):
    shapes = [cost if isinstance(cost, tuple) else (1, cost) for cost in costs]
    return GroupBatchSampler(shapes, **{"batch_size": 3, "max_tokens": budget, **more})


def epoch(source, number):
    source.set_epoch(number)
    return list(source)


@MANY
@given(st.one_of(COSTS, SHAPES), BUDGET, st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_every_group_comes_exactly_once_and_every_rank_has_as_many_batches(costs, budget, world, seed, padded):
    source = sampler(costs, budget, world_size=world, seed=seed, padded=padded)
    for number in range(3):
        batches = epoch(source, number)
        real = [i for batch in batches for i in batch if i < len(costs)]
        assert sorted(real) == list(range(len(costs)))
        assert len(batches) == len(source) and len(batches) % world == 0
        assert all(batches)
        copies = [i for batch in batches for i in batch if i >= len(costs)]
        assert len(copies) < world  # at most one round is filled up


@MANY
@given(SHAPES, st.integers(64, 8000), st.booleans())
def test_the_budget_is_held(shapes, budget, padded):
    """A long group of few rows beside a short one of many: all rows are padded to the longest."""
    for batch in sampler(shapes, budget, padded=padded):
        rows, lengths = zip(*(shapes[i] for i in batch), strict=True)
        total = sum(rows) * max(lengths) if padded else sum(r * n for r, n in zip(rows, lengths, strict=True))
        assert total <= budget or len(batch) == 1


@MANY
@given(COSTS, BUDGET, st.integers(0, 3))
def test_it_depends_on_seed_and_epoch_alone(costs, budget, seed):
    assert epoch(sampler(costs, budget, seed=seed), 2) == epoch(sampler(costs, budget, seed=seed), 2)


@pytest.mark.parametrize("budget", [None, 2000])
def test_epochs_and_seeds_differ(budget):
    costs = [100 + i for i in range(50)]
    source = sampler(costs, budget)
    orders = [epoch(source, 0), epoch(source, 1), epoch(sampler(costs, budget, seed=1), 0)]
    assert orders[0] != orders[1] and orders[0] != orders[2]


def test_groups_of_a_batch_cost_about_the_same():
    costs = [100, 3000] * 20
    for batch in sampler(costs, 6400):
        assert max(costs[i] for i in batch) - min(costs[i] for i in batch) < _COST_STEP or len(batch) == 1


def test_batches_of_a_round_cost_about_the_same():
    """Ranks wait for the slowest: neighbours in cost go together."""
    costs = [10 * i + 50 for i in range(64)]
    batches = list(sampler(costs, 2000, world_size=2))
    for a, b in zip(batches[::2], batches[1::2], strict=True):
        top = [max(costs[i] for i in batch) * len(batch) for batch in (a, b)]
        assert max(top) <= 2000 and min(top) > 0.4 * max(top)


def test_a_budget_uses_most_of_itself():
    costs = [300] * 100
    sizes = [len(batch) for batch in sampler(costs, 3200)]
    assert sum(sizes) == 100 and sorted(sizes)[1] == 3200 // 320


def test_copies_that_fill_a_round_weigh_nothing():
    rows = [{"pairs": [[0, 1], [1, 2]], "pair_weights": [2.0, 1.0]}]
    filled = WithEmptyGroups(rows)
    assert filled[0]["pair_weights"] == [2.0, 1.0]
    assert filled[1] == {"pairs": [[0, 1], [1, 2]], "pair_weights": [0.0, 0.0], "empty": True}
    assert rows[0]["pair_weights"] == [2.0, 1.0]


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="max_tokens_per_batch must be positive"):
        sampler([1], 0)


PARTIES = st.lists(st.lists(st.integers(300, 900), min_size=1, max_size=5), min_size=1, max_size=12)


def parties(lengths, *, stem=200, **more):
    """A sampler of groups of one row each; each inner list is a company, its groups far from each other."""
    flat = sorted((place, n, length) for n, own in enumerate(lengths) for place, length in enumerate(own))
    numbers = [tuple(i for i, (_, owner, _) in enumerate(flat) if owner == n) for n in range(len(lengths))]
    companies = [Company(groups, stem) for groups in numbers if len(groups) > 1]
    shapes = [(1, length) for *_, length in flat]
    return GroupBatchSampler(shapes, **{"batch_size": 6, "companies": companies, **more}), companies, shapes


@MANY
@given(PARTIES, st.one_of(st.none(), st.integers(4000, 9000)), st.integers(1, 3), st.booleans())
def test_groups_of_a_company_come_together_and_every_group_once(lengths, budget, world, padded):
    source, companies, shapes = parties(lengths, max_tokens=budget, world_size=world, padded=padded)
    orders = []
    for number in range(3):
        batches = epoch(source, number)
        real = [[i for i in batch if i < len(shapes)] for batch in batches]
        assert sorted(i for batch in real for i in batch) == list(range(len(shapes)))
        assert len(batches) == len(source) and len(batches) % world == 0 and all(batches)
        orders.append(batches)
        divided = sum(not any(set(c.groups) <= set(batch) for batch in real) for c in companies)
        if budget is None:
            assert all(len(batch) <= 6 for batch in batches)
            assert divided <= (len(batches) if world == 1 else len(companies))
        else:
            assert not divided
            for batch in real:
                whole = [c for c in companies if set(c.groups) <= set(batch)]
                rows = [c.tokens([n for _, n in shapes]) for c in whole]
                rows += [shapes[i][1] for i in batch if not any(i in c.groups for c in whole)]
                assert (len(rows) * max(rows, default=0) if padded else sum(rows)) <= budget or len(rows) == 1
    assert orders[0] == epoch(parties(lengths, max_tokens=budget, world_size=world, padded=padded)[0], 0)


def test_small_groups_fill_the_places_that_companies_leave():
    source, companies, _ = parties([[500] * 4] * 6 + [[500]] * 12)
    for number in range(5):
        batches = epoch(source, number)
        assert all(len(batch) == 6 for batch in batches)
        assert all(any(set(c.groups) <= set(batch) for batch in batches) for c in companies)
    assert epoch(source, 0) != epoch(source, 1)


def test_without_companies_nothing_changes():
    plain = GroupBatchSampler([(1, 100)] * 20, batch_size=3)
    assert epoch(plain, 1) == epoch(GroupBatchSampler([(1, 100)] * 20, batch_size=3, companies=[]), 1)
