"""The objective: exact means over an optimizer step however it is split, the inputs that losses ask for, weights and
state."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silkie.losses import SPECS, GroupLogps, LossOptions, build_objective

ASPECTS = ("Helpfulness", "Visual Faithfulness")
PER_RESPONSE = (
    "lengths",
    "group",
    "logps",
    "ref_logps",
    "ratings",
    "aspect_ratings",
    "corrupted_logps",
    "ref_corrupted_logps",
)
PER_EXAMPLE = ("desirable", "example_weights")
PER_TOKEN = ("owner", "per_token_logps", "ref_per_token_logps", "token_ids", "log_sum_sq_probs")

SELECTIONS = {
    **{
        name: ([name], None, LossOptions(label_smoothing=1e-3 if name == "exo_pair" else 0.0))
        for name in SPECS
        if not SPECS[name].permutes
    },
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], LossOptions()),
    "mdpo": (["sigmoid", "mdpo_image", "mdpo_anchor"], None, LossOptions(mdpo_anchor=0.1)),
    "ld_dpo": (["sigmoid"], None, LossOptions(ld_alpha=0.3)),
    "ddpo": (["sigmoid"], None, LossOptions(ddpo_gamma=5.0)),
    "ddpo_sum": (["sigmoid"], None, LossOptions(ddpo_gamma=5.0, ddpo_normalize=False)),
    "wpo": (["sigmoid", "sft"], [1.0, 0.1], LossOptions(use_weighting=True)),
    "offset": (["sigmoid", "simpo", "cpo"], None, LossOptions(margin="offset", margin_scale=0.5)),
    "weight": (["sigmoid", "plackett_luce", "sft"], None, LossOptions(margin="weight", margin_scale=0.5)),
    "aspects": (
        ["sigmoid", "plackett_luce"],
        None,
        LossOptions(aspect_weights={"Visual Faithfulness": 2.0, "Helpfulness": 1.0}),
    ),
    "f_divergence": (["sigmoid"], None, LossOptions(f_divergence_type="js_divergence")),
}


def make_step(groups=4, seed=0, dtype=torch.float64):
    """A whole optimizer step: groups of 2 to 4 responses with ratings, weighted pairs, tokens; leaf tensors that ask
    for gradients."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=dtype)

    sizes = torch.randint(2, 5, (groups,), generator=generator)
    group = torch.repeat_interleave(torch.arange(groups), sizes)
    responses = len(group)
    aspects = torch.randint(1, 6, (responses, 2), generator=generator).to(dtype)
    ratings = aspects.mean(dim=1)
    pairs = [
        (i, j) for i in range(responses) for j in range(responses) if group[i] == group[j] and ratings[i] > ratings[j]
    ]
    pairs = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    lengths = torch.randint(1, 6, (responses,), generator=generator)
    owner = torch.repeat_interleave(torch.arange(responses), lengths)
    per_token, ref_per_token = -3 * uniform(2, len(owner))

    def total(values):
        return values.new_zeros(responses).index_add(0, owner, values)

    return GroupLogps(
        lengths=lengths,
        pairs=pairs,
        pair_weights=0.5 + uniform(len(pairs)),
        group=group,
        logps=total(per_token).requires_grad_(),
        ref_logps=total(ref_per_token),
        ratings=ratings,
        aspect_ratings=aspects,
        aspects=ASPECTS,
        per_token_logps=per_token.requires_grad_(),
        ref_per_token_logps=ref_per_token,
        owner=owner,
        token_ids=torch.randint(0, 4, (len(owner),), generator=generator),
        log_sum_sq_probs=-uniform(len(owner)),
        examples=torch.arange(responses).repeat(2)[::2],
        desirable=torch.arange(responses) % 3 > 0,
        example_weights=0.5 + uniform(responses),
        kl=torch.tensor(0.3, dtype=dtype),
        corrupted_logps=(-9 * uniform(responses)).requires_grad_(),
        ref_corrupted_logps=-9 * uniform(responses),
    )


def micro_batch(step: GroupLogps, groups) -> GroupLogps:
    """The batch of some groups of a step, indices renumbered. Gradients flow to the step's tensors."""
    rows = torch.cat([torch.nonzero(step.group == g).flatten() for g in groups] or [torch.zeros(0, dtype=torch.long)])
    renumbered = torch.full((len(step.group),), -1).scatter(0, rows, torch.arange(len(rows)))
    tokens = torch.cat([torch.nonzero(step.owner == r).flatten() for r in rows] or [torch.zeros(0, dtype=torch.long)])
    kept = renumbered[step.pairs[:, 0]] >= 0
    fields = {name: getattr(step, name)[rows] for name in PER_RESPONSE} | {
        name: getattr(step, name)[tokens] for name in PER_TOKEN
    }
    labelled = renumbered[step.examples] >= 0
    fields |= {name: getattr(step, name)[labelled] for name in PER_EXAMPLE}
    fields |= {"examples": renumbered[step.examples[labelled]], "kl": step.kl}
    fields["owner"] = renumbered[fields["owner"]]
    fields["group"] = torch.unique(fields["group"], return_inverse=True)[1]
    return GroupLogps(
        pairs=renumbered[step.pairs[kept]], pair_weights=step.pair_weights[kept], aspects=step.aspects, **fields
    )


def gradients(loss, step):
    leaves = [step.logps, step.per_token_logps, step.corrupted_logps]
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("selection", SELECTIONS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_micro_batches_add_up_to_the_step(selection, data):
    """Any split of the groups over micro-batches and ranks, empty ones included, gives the loss and gradient of the
    step in one batch."""
    groups = data.draw(st.integers(1, 5), label="groups")
    step = make_step(groups, seed=data.draw(st.integers(0, 999), label="seed"))
    place = data.draw(st.lists(st.integers(0, 3), min_size=groups, max_size=groups), label="micro-batch of each group")
    objective = build_objective(*SELECTIONS[selection])
    whole, _ = objective(step)
    batches = [micro_batch(step, [g for g in range(groups) if place[g] == m]) for m in range(4)]
    units = [objective.units(dataclasses.replace(batch, logps=None, per_token_logps=None)) for batch in batches]
    totals = {unit: torch.stack([share[unit] for share in units]).sum() for unit in units[0]}
    split = sum(objective(batch, totals)[0] for batch in batches)
    torch.testing.assert_close(split, whole)
    for part, expected in zip(gradients(split, step), gradients(whole, step), strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradients_reach_the_policy(selection):
    step = make_step()
    loss, _ = build_objective(*SELECTIONS[selection])(step)
    assert any(gradient.abs().max() > 0 for gradient in gradients(loss, step))


def test_weighted_mean_over_pairs():
    step = make_step()
    loss, metrics = build_objective("sigmoid")(step)
    chosen, rejected = step.pairs.T
    margins = (step.logps - step.ref_logps)[chosen] - (step.logps - step.ref_logps)[rejected]
    expected = torch.log(1 + torch.exp(-0.1 * margins))
    torch.testing.assert_close(loss, (expected * step.pair_weights).sum() / step.pair_weights.sum())
    torch.testing.assert_close(metrics["loss/sigmoid"], expected)
    torch.testing.assert_close(metrics["rewards/margins"], 0.1 * margins)
    torch.testing.assert_close(metrics["logps/chosen"], step.logps[chosen])
    assert not any(value.requires_grad for value in metrics.values())


def test_no_weights_is_weight_one():
    step = make_step()
    ones = dataclasses.replace(step, pair_weights=torch.ones(len(step.pairs), dtype=torch.long))
    none = dataclasses.replace(step, pair_weights=None)
    torch.testing.assert_close(build_objective("sigmoid")(none)[0], build_objective("sigmoid")(ones)[0])


def test_sft_is_the_mean_over_chosen_tokens():
    step = make_step()
    chosen = step.pairs[:, 0]
    expected = -(step.pair_weights * step.logps[chosen]).sum() / (step.pair_weights * step.lengths[chosen]).sum()
    torch.testing.assert_close(build_objective("sft")(step)[0], expected)


def test_loss_weights_scale_the_terms():
    step = make_step()
    parts = {name: build_objective(name)(step)[0] for name in ("sigmoid", "bco_pair", "sft")}
    mixed, _ = build_objective(list(parts), [0.8, 0.2, 1.0])(step)
    torch.testing.assert_close(mixed, 0.8 * parts["sigmoid"] + 0.2 * parts["bco_pair"] + parts["sft"])


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "sft", "mdpo_image", "plackett_luce"])
def test_half_precision_is_computed_in_single(name):
    step, fields = make_step(groups=8), ("logps", "ref_logps", "corrupted_logps", "ref_corrupted_logps")
    half = dataclasses.replace(
        step, pair_weights=None, **{field: getattr(step, field).detach().bfloat16() for field in fields}
    )
    single = dataclasses.replace(half, **{field: getattr(half, field).float() for field in fields})
    (loss, metrics), (expected, _) = build_objective(name)(half), build_objective(name)(single)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert metrics["rewards/margins"].dtype == torch.float32


NEEDS = {
    "sigmoid": {"reference"},
    "simpo": set(),
    "cpo": set(),
    "orpo": set(),
    "sft": {"reference"},  # its rewards are those of TRL
    "plackett_luce": {"reference", "groups"},
    "kto": {"reference", "labels", "kl"},
    "apo_zero_unpaired": {"reference", "labels"},
    "mdpo_anchor": {"reference"},
    "mdpo": {"reference", "corrupted"},
    "ld_dpo": {"reference", "tokens", "reference_tokens"},
    "ddpo": {"reference", "tokens", "reference_tokens", "token_ids"},
    "wpo": {"reference", "tokens", "stats"},
    "offset": {"reference", "ratings"},
    "weight": {"reference", "ratings", "groups"},
    "aspects": {"reference", "aspects", "groups"},
}
CARRIERS = {
    "reference": ("ref_logps",),
    "tokens": ("per_token_logps", "owner"),
    "reference_tokens": ("ref_per_token_logps",),
    "token_ids": ("token_ids",),
    "stats": ("log_sum_sq_probs",),
    "corrupted": ("corrupted_logps", "ref_corrupted_logps"),
    "ratings": ("ratings",),
    "aspects": ("aspect_ratings",),
    "groups": ("group",),
    "labels": ("examples", "desirable", "example_weights"),
    "kl": ("kl",),
}


@pytest.mark.parametrize("selection", NEEDS)
def test_needs(selection):
    assert build_objective(*SELECTIONS[selection]).needs == NEEDS[selection]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_needs_are_enough_and_necessary(selection):
    """A batch that carries just what the objective needs works, and without any one of them it fails with an error that
    names it."""
    step = make_step()
    objective = build_objective(*SELECTIONS[selection])
    carried = [field for need in objective.needs for field in CARRIERS[need]]
    if "reference_tokens" in objective.needs:
        carried.remove("ref_logps")  # the reference is then read by token
    minimal = GroupLogps(lengths=step.lengths, pairs=step.pairs, logps=step.logps, aspects=step.aspects)
    minimal = dataclasses.replace(minimal, **{field: getattr(step, field) for field in carried})
    objective(minimal)
    for field in carried:
        with pytest.raises(ValueError, match=f"needs `{field}`"):
            objective(dataclasses.replace(minimal, **{field: None}))


def test_mixtures_without_reference_run_none():
    assert build_objective(["simpo", "orpo", "cpo", "sft"]).needs == frozenset()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_batch_without_pairs_is_zero_and_has_a_gradient(selection):
    labels = {name: getattr(make_step(), name)[:0] for name in ("examples", *PER_EXAMPLE)}
    pairs = {"pairs": torch.zeros(0, 2, dtype=torch.long), "pair_weights": torch.zeros(0)}
    empty = dataclasses.replace(make_step(), **pairs, **labels)
    loss, _ = build_objective(*SELECTIONS[selection])(empty)
    assert loss.item() == 0.0
    assert all((gradient == 0).all() for gradient in gradients(loss, empty))


def test_corrupted_images_are_read_for_chosen_responses_only():
    step = make_step()
    never_chosen = torch.ones(len(step.group), dtype=torch.bool).scatter(0, step.pairs[:, 0], False)
    assert never_chosen.any()
    objective = build_objective(*SELECTIONS["mdpo"])
    holes = dataclasses.replace(step, corrupted_logps=step.corrupted_logps.masked_fill(never_chosen, torch.nan))
    torch.testing.assert_close(objective(holes)[0], objective(step)[0])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_losses_refuse_unequal_weights(name):
    step = make_step()
    with pytest.raises(ValueError, match="sorts the margins"):
        build_objective(name)(step)
    build_objective(name)(dataclasses.replace(step, pair_weights=None))


def bco():
    return build_objective("bco_pair", None, LossOptions(bco_reward_shift="running_mean"))


def weighted_rewards(step):
    ratios = 0.1 * (step.logps - step.ref_logps).detach()
    rewards = (ratios[step.pairs[:, 0]] + ratios[step.pairs[:, 1]]) / 2
    return (rewards * step.pair_weights).sum(), step.pair_weights.sum()


def test_running_mean_shifts_the_rewards_of_later_steps():
    first, second = make_step(seed=1), make_step(seed=2)
    objective, plain = bco(), build_objective("bco_pair")
    torch.testing.assert_close(objective(first)[0], plain(first)[0])
    objective.end_step()
    total, count = weighted_rewards(first)
    chosen, rejected = second.pairs.T
    ratios = 0.1 * (second.logps - second.ref_logps) - total / count
    rows = torch.log1p(torch.exp(-ratios[chosen])) + torch.log1p(torch.exp(ratios[rejected]))
    torch.testing.assert_close(objective(second)[0], (rows * second.pair_weights).sum() / second.pair_weights.sum())
    objective.end_step()
    totals = torch.stack([torch.stack(weighted_rewards(step)) for step in (first, second)]).sum(dim=0)
    assert objective.state_dict()["reward_mean"]["past"] == pytest.approx(totals.tolist())


def test_running_mean_does_not_depend_on_the_split_or_order():
    step, later = make_step(groups=5, seed=3), make_step(seed=4)
    losses = []
    for split in ([[0, 1, 2, 3, 4]], [[4], [0, 2], [1, 3]], [[1, 3], [4], [0, 2]]):
        objective = bco()
        totals = objective.units(step)
        for groups in split:
            objective(micro_batch(step, groups), totals)
        objective.end_step()
        losses.append(objective(later)[0])
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_running_mean_over_ranks():
    """Two ranks that each see half a step end with the state of one rank that saw all of it; a rank without pairs takes
    part."""
    step = make_step(groups=4, seed=5)
    alone = bco()
    alone(step)
    alone.end_step()
    ranks = [bco(), bco(), bco()]
    totals = alone.units(step)
    for rank, groups in zip(ranks[:2], ([0, 3], [1, 2]), strict=True):
        rank(micro_batch(step, groups), totals)
    sent = []
    for rank in ranks:
        rank.end_step(lambda tensor: sent.append(tensor) or tensor)
    reduced = torch.stack(sent).sum(dim=0)
    rank = bco()
    rank(micro_batch(step, [0, 3]), totals)
    rank.end_step(lambda _: reduced)
    torch.testing.assert_close(rank.state_dict()["reward_mean"]["past"], alone.state_dict()["reward_mean"]["past"])


def test_evaluation_leaves_the_running_mean_alone():
    objective = bco()
    objective(make_step(), training=False)
    objective.end_step()
    assert objective.state_dict() == {"reward_mean": {"past": [0.0, 0.0]}}


def test_state_survives_a_restart():
    objective, restarted = bco(), bco()
    objective(make_step(seed=6))
    objective.end_step()
    restarted.load_state_dict(objective.state_dict())
    later = make_step(seed=7)
    torch.testing.assert_close(restarted(later)[0], objective(later)[0], rtol=0, atol=0)


def test_state_of_other_losses():
    assert build_objective("bco_pair").state_dict() == {}
    build_objective("sigmoid").load_state_dict({})
    with pytest.raises(ValueError, match="holds no `reward_mean`"):
        bco().load_state_dict({})
