"""Ratings at training time: offsets, weights and the mix of aspects."""

import dataclasses
import math

import pytest
import torch

from silkie.losses import GroupLogps, LossOptions, build_objective
from silkie.losses.margins import agreement, margin_offset, margin_weight, mix_aspects, rating_margins

NAN = math.nan


@pytest.fixture
def batch():
    """Two rated responses 4 and 1 points apart from the best, and an unrated one."""
    return GroupLogps(
        logps=torch.tensor([-3.0, -8.0, -5.0, -6.0]),
        ref_logps=torch.tensor([-4.0, -4.0, -9.0, -7.0]),
        lengths=torch.tensor([2, 4, 3, 1]),
        pairs=torch.tensor([[0, 1], [0, 2], [0, 3]]),
        ratings=torch.tensor([5.0, 1.0, 4.0, NAN]),
        aspect_ratings=torch.tensor([[5.0, 5.0], [1.0, 1.0], [2.0, 6.0], [NAN, 3.0]]),
        aspects=("help", "faith"),
    )


def rows(batch, name="sigmoid", **options):
    return build_objective(name, None, LossOptions(**options))(batch)[1][f"loss/{name}"]


def test_margins(batch):
    torch.testing.assert_close(
        rating_margins(batch.ratings, batch.pairs), torch.tensor([4.0, 1.0, NAN]), equal_nan=True
    )


@pytest.mark.parametrize("name", ["sigmoid", "cpo", "simpo", "hinge"])
def test_offset_moves_the_logit(batch, name):
    """Each loss equals its plain form at a logit that is lower by scale * gap; the unrated pair has no offset."""
    shift = torch.tensor([4.0, 1.0, 0.0]) * 0.5
    with_offset = rows(batch, name, margin="offset", margin_scale=0.5)
    chosen, rejected = batch.logps[batch.pairs[:, 0]], batch.logps[batch.pairs[:, 1]]
    if name in ("sigmoid", "hinge"):
        ratios = batch.logps - batch.ref_logps
        logits = 0.1 * (ratios[batch.pairs[:, 0]] - ratios[batch.pairs[:, 1]]) - shift
    elif name == "cpo":
        logits = 0.1 * (chosen - rejected) - shift
    else:
        means = batch.logps / batch.lengths
        logits = 0.1 * (means[batch.pairs[:, 0]] - means[batch.pairs[:, 1]]) - 0.5 - shift
    expected = torch.relu(1 - logits) if name == "hinge" else torch.log1p(torch.exp(-logits))
    torch.testing.assert_close(with_offset, expected)


def test_weight(batch):
    loss, metrics = build_objective("sigmoid", None, LossOptions(margin="weight", margin_scale=0.5))(batch)
    weights = torch.tensor([3.0, 1.5, 1.0])
    torch.testing.assert_close(loss, (weights * metrics["loss/sigmoid"]).sum() / weights.sum())


def test_weight_multiplies_the_weights_of_the_data(batch):
    weighted = dataclasses.replace(batch, pair_weights=torch.tensor([1.0, 0.0, 2.0]))
    objective = build_objective("sigmoid", None, LossOptions(margin="weight", margin_scale=0.5))
    assert objective.units(weighted)["pair"].item() == pytest.approx(3.0 + 2.0)


def test_given_margins_win_over_ratings(batch):
    given = dataclasses.replace(batch, margins=torch.tensor([1.0, 1.0, 1.0]))
    objective = build_objective("sigmoid", None, LossOptions(margin="weight"))
    assert objective.units(given)["pair"].item() == pytest.approx(6.0)


def test_negative_gap_never_gives_a_negative_weight():
    assert margin_weight(torch.tensor([-3.0, NAN, 2.0]), 0.5).tolist() == [0, 1, 2]
    assert margin_offset(torch.tensor([-3.0, NAN, 2.0]), 0.5).tolist() == [-1.5, 0, 1]


def test_mix_of_aspects_skips_what_is_not_rated(batch):
    mixed = mix_aspects(batch.aspect_ratings, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(mixed, torch.tensor([5.0, 1.0, 5.0, 3.0]))
    only_help = mix_aspects(batch.aspect_ratings, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(only_help, torch.tensor([5.0, 1.0, 2.0, NAN]), equal_nan=True)


def test_agreement():
    assert agreement(torch.tensor([0.5, 0.0, -1.0, NAN])).tolist() == [1, 0, 0, 1]


def test_pairs_that_the_chosen_aspects_contradict_do_not_count(batch):
    """faith alone rates response 2 above response 0: the second pair is dropped; help alone keeps it."""
    faith = build_objective("sigmoid", None, LossOptions(aspect_weights={"faith": 1.0}))
    metrics = faith(batch)[1]
    torch.testing.assert_close(faith(batch)[0], metrics["loss/sigmoid"][[0, 2]].mean())
    assert faith.units(batch)["pair"].item() == 2
    assert build_objective("sigmoid", None, LossOptions(aspect_weights={"help": 1.0})).units(batch)["pair"].item() == 3


def test_aspects_set_the_margin_too(batch):
    objective = build_objective(
        "sigmoid", None, LossOptions(aspect_weights={"help": 1.0, "faith": 0.0}, margin="weight")
    )
    assert objective.units(batch)["pair"].item() == pytest.approx(5.0 + 4.0 + 1.0)


def test_unknown_aspect(batch):
    with pytest.raises(ValueError, match=r"names \['ethics'\]; the data is rated on \['help', 'faith'\]"):
        build_objective("sigmoid", None, LossOptions(aspect_weights={"ethics": 1.0}))(batch)
