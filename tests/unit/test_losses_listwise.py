"""The Plackett-Luce objective over the responses of a group."""

import itertools
import math

import pytest
import torch

from silkie.losses import LOSSES, GroupLogps, LossOptions, build_objective, plackett_luce

LOGPS = torch.tensor([-3.0, -8.0, -5.0, -6.0], dtype=torch.float64)
REFERENCE = torch.tensor([-4.0, -4.0, -9.0, -7.0], dtype=torch.float64)


def ranking_pairs(order):
    """All pairs of a ranking, best first."""
    return torch.tensor(list(itertools.combinations(order, 2))).reshape(-1, 2)


def brute_force(order, beta):
    """-log of the probability to draw the ranking without replacement, with weights (policy / reference)^beta."""
    weights = [math.exp(beta * (p - q)) for p, q in zip(LOGPS.tolist(), REFERENCE.tolist(), strict=True)]
    left, probability = sum(weights), 1.0
    for response in order:
        probability *= weights[response] / left
        left -= weights[response]
    return -math.log(probability)


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_ranking_likelihood(order):
    loss = plackett_luce(LOGPS, REFERENCE, ranking_pairs(order), beta=0.4).sum()
    assert loss.item() == pytest.approx(brute_force(order, 0.4), rel=1e-12)


def test_probabilities_of_all_rankings_add_up():
    total = sum(
        torch.exp(-plackett_luce(LOGPS, REFERENCE, ranking_pairs(order)).sum())
        for order in itertools.permutations(range(4))
    )
    assert total.item() == pytest.approx(1.0)


def test_two_responses_are_dpo():
    loss = plackett_luce(LOGPS, REFERENCE, torch.tensor([[2, 1]]), beta=0.3)
    dpo = LOSSES["sigmoid"](LOGPS[2:3], LOGPS[1:2], REFERENCE[2:3], REFERENCE[1:2], beta=0.3)
    torch.testing.assert_close(loss.sum(), dpo.sum())
    assert loss[[0, 1, 3]].tolist() == [0, 0, 0]


def test_tied_responses_do_not_compete():
    """0 > {1, 2} > 3: the term of 1 sees 3 only."""
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]])
    rewards = 0.1 * (LOGPS - REFERENCE)
    loss = plackett_luce(LOGPS, REFERENCE, pairs)
    torch.testing.assert_close(loss[1], torch.logsumexp(rewards[[1, 3]], 0) - rewards[1])
    torch.testing.assert_close(loss[0], torch.logsumexp(rewards, 0) - rewards[0])


def test_inactive_pairs_are_left_out():
    pairs = ranking_pairs([3, 0, 2, 1])
    active = torch.tensor([True, False, True, True, True, False])
    torch.testing.assert_close(
        plackett_luce(LOGPS, REFERENCE, pairs, active=active), plackett_luce(LOGPS, REFERENCE, pairs[active])
    )


def batch(pairs, weights=None, group=(0, 0, 1, 1)):
    return GroupLogps(
        logps=LOGPS,
        ref_logps=REFERENCE,
        lengths=torch.ones(4, dtype=torch.long),
        pairs=torch.tensor(pairs),
        group=torch.tensor(group),
        pair_weights=None if weights is None else torch.tensor(weights, dtype=torch.float64),
    )


def test_mean_over_groups_that_rank():
    objective = build_objective("plackett_luce")
    one = batch([[0, 1]])
    both = batch([[0, 1], [3, 2]])
    assert objective.units(one)["group"].item() == 1
    assert objective.units(both)["group"].item() == 2
    terms = plackett_luce(LOGPS, REFERENCE, both.pairs)
    torch.testing.assert_close(objective(both)[0], terms.sum() / 2)


def test_objective_of_a_full_ranking():
    order = [2, 0, 3, 1]
    ranked = batch(ranking_pairs(order).tolist(), group=(0, 0, 0, 0))
    assert build_objective("plackett_luce")(ranked)[0].item() == pytest.approx(brute_force(order, 0.1), rel=1e-12)


def test_two_response_groups_with_weights_are_weighted_dpo():
    weighted = batch([[0, 1], [3, 2]], [0.5, 2.0])
    torch.testing.assert_close(build_objective("plackett_luce")(weighted)[0], build_objective("sigmoid")(weighted)[0])


def test_a_pair_of_weight_zero_is_no_part_of_the_ranking():
    objective, group = build_objective("plackett_luce"), (0, 0, 0, 0)
    without = batch([[0, 1], [0, 2]], [1.0, 1.0], group)
    with_zero = batch([[0, 1], [0, 2], [0, 3], [3, 1]], [1.0, 1.0, 0.0, 0.0], group)
    torch.testing.assert_close(objective(with_zero)[0], objective(without)[0])


def test_weights_scale_whole_groups():
    """Doubling the weights of one group counts it twice."""
    objective = build_objective("plackett_luce", None, LossOptions(beta=0.2))
    first, second = objective(batch([[0, 1]]))[0], objective(batch([[3, 2]]))[0]
    torch.testing.assert_close(objective(batch([[0, 1], [3, 2]], [2.0, 1.0]))[0], (2 * first + second) / 3)
