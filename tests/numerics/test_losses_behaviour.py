"""What holds for whole families of losses: derivatives, invariances, values at the reference, extreme log-ratios."""

import math

import pytest
import torch

from silkie.losses import LOSSES, SPECS, LossOptions, f_scores, plackett_luce

PAIRWISE = sorted(name for name, spec in SPECS.items() if spec.inputs == "reference")
DIFFERENCE = ["sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm"]
LENGTHS = torch.tensor([3, 8, 1, 20]), torch.tensor([6, 2, 1, 5])


def call(name, logps, lengths=LENGTHS, **options):
    """The loss `name` on its four log-probs (reference-free ones take two and the lengths)."""
    spec = SPECS[name]
    if spec.normalized:
        options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    if spec.inputs in ("reference", "image"):
        return spec.fn(*logps, **options)
    if spec.inputs == "lengths":
        return spec.fn(logps[0], logps[1], *lengths, **options)
    if spec.inputs == "anchor":
        return spec.fn(logps[0], logps[2], **options)
    if spec.inputs == "listwise":
        policy, reference = torch.cat(logps[:2]), torch.cat(logps[2:])
        rows = torch.arange(len(logps[0]))
        return spec.fn(policy, reference, torch.stack([rows, rows + len(rows)], dim=1), **options)
    if spec.inputs == "labelled":
        label = torch.tensor([True, False]).repeat(len(logps[0]) // 2)
        return spec.fn(logps[0], logps[2], label, **options) + spec.fn(logps[1], logps[3], ~label, **options)
    return spec.fn(logps[0])


def random_logps(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [-15 * torch.rand(4, generator=generator, dtype=dtype) for _ in range(4)]


@pytest.mark.parametrize("name", SPECS)
def test_gradcheck(name):
    logps = [x.requires_grad_() for x in random_logps()]
    assert torch.autograd.gradcheck(lambda *x: call(name, x), logps)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_gradcheck_scores(divergence):
    logratios = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: f_scores(x, divergence, 0.3), [logratios])


@pytest.mark.parametrize("name", PAIRWISE)
def test_only_log_ratios_matter(name):
    """Adding the same amount to the policy's and the reference's log-prob of a response changes nothing."""
    logps = random_logps()
    shift = torch.tensor([5.0, -7.0, 0.3, 11.0], dtype=torch.float64)
    for moved in ((0, 2), (1, 3)):
        if name == "aot":  # pairs the sorted policy margins with the sorted reference margins, which a shift reorders
            shift = torch.full_like(shift, 5.0)
        shifted = [x + shift if index in moved else x for index, x in enumerate(logps)]
        torch.testing.assert_close(call(name, shifted), call(name, logps))


@pytest.mark.parametrize("name", sorted(set(DIFFERENCE) - {"sigmoid_norm", "ipo"}))
def test_a_shift_of_both_log_ratios_changes_nothing(name):
    chosen, rejected, ref_chosen, ref_rejected = logps = random_logps()
    torch.testing.assert_close(call(name, [chosen + 4, rejected + 4, ref_chosen, ref_rejected]), call(name, logps))


def test_swapping_the_responses():
    """Swapping chosen and rejected turns the label around: probabilities of both labels add up to 1, and margins change
    sign."""
    chosen, rejected, ref_chosen, ref_rejected = logps = random_logps()
    swapped = [rejected, chosen, ref_rejected, ref_chosen]
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(torch.exp(-LOSSES["sigmoid"](*logps)) + torch.exp(-LOSSES["sigmoid"](*swapped)), one)
    torch.testing.assert_close(
        LOSSES["sigmoid"](*logps, label_smoothing=0.2),
        LOSSES["sigmoid"](*swapped, label_smoothing=0.8),
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(LOSSES["apo_zero"](*logps) + LOSSES["apo_zero"](*swapped), 2 * one)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    torch.testing.assert_close(LOSSES["ipo"](*swapped, beta=0.1) - LOSSES["ipo"](*logps, beta=0.1), 4 * margin / 0.2)
    torch.testing.assert_close(LOSSES["hinge"](*swapped, beta=1e-3) - LOSSES["hinge"](*logps, beta=1e-3), 2e-3 * margin)
    smoothed, reverse = (LOSSES["exo_pair"](*logps, label_smoothing=e) for e in (0.3, 0.7))
    torch.testing.assert_close(reverse, LOSSES["exo_pair"](*swapped, label_smoothing=0.3))
    assert not torch.allclose(smoothed, reverse)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sigmoid", math.log(2)),
        ("sigmoid_norm", math.log(2)),
        ("robust", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("exo_pair", -math.log(2) - (math.log(1e-3) + math.log1p(-1e-3)) / 2),
        ("nca_pair", 2 * math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("sppo_hard", 50.0),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("discopop", (math.log(2) + 1) / 2),
    ],
)
def test_value_where_the_policy_is_the_reference(name, value):
    chosen, rejected, *_ = random_logps()
    loss = call(name, [chosen, rejected, chosen.clone(), rejected.clone()], beta=0.1)
    torch.testing.assert_close(loss, torch.full((4,), value, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(set(PAIRWISE) - {"discopop"}))
def test_a_step_down_the_gradient_raises_the_margin(name):
    chosen, rejected, *_ = random_logps()
    policy = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
    gradients = torch.autograd.grad(call(name, [*policy, chosen, rejected]).sum(), policy)
    assert (gradients[0] < gradients[1]).all()


def test_discopop_lowers_margins_near_zero():
    """Its published shape has a hump around 0; the docstring warns of it."""
    margin = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64).requires_grad_()
    zeros = torch.zeros_like(margin)
    (gradient,) = torch.autograd.grad(LOSSES["discopop"](margin, zeros, zeros, zeros, beta=1.0, tau=0.05).sum(), margin)
    assert (gradient > 0).tolist() == [False, True, False]


EXTREMES = [0.0, 1.0, 1e2, 1e3, 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", sorted(set(SPECS) - {"simpo", "cpo", "orpo", "sft"}))
def test_extreme_log_ratios(name, dtype):
    """|beta ratio| up to 1e4, every sign and size of the chosen against every sign and size of the rejected
    log-ratio."""
    beta = 0.1
    values = torch.tensor([sign * x / beta for x in EXTREMES for sign in (1, -1)], dtype=dtype)
    chosen, rejected = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    zeros = torch.zeros_like(chosen)
    lengths = torch.ones(len(zeros), dtype=torch.long)
    loss = call(name, [chosen, rejected, zeros, zeros], (lengths, lengths), beta=beta)
    gradients = torch.autograd.grad(loss.sum(), [chosen, rejected], allow_unused=True)
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("name", DIFFERENCE)
@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_under_f_divergences(name, divergence, dtype):
    """Scores grow exponentially, so that a square of one may overflow to inf: never NaN."""
    values = torch.tensor([sign * x / 0.1 for x in EXTREMES for sign in (1, -1)], dtype=dtype)
    chosen, rejected = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    scores = [f_scores(x, divergence, 0.3) for x in (chosen, rejected)]
    zeros, lengths = torch.zeros_like(chosen), torch.ones(chosen.shape[0], dtype=torch.long)
    loss = call(name, [*scores, zeros, zeros], (lengths, lengths), beta=0.1)
    gradients = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert not torch.isnan(loss).any()
    assert not any(torch.isnan(gradient).any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_extreme_log_probs_without_reference(name, dtype):
    """Means per token from certainty (exactly 0) down to -1e4 / beta, and everything near 0 where 1 - p cancels."""
    values = torch.tensor([0.0, -1e-30, -1e-9, -1e-4, -0.69, -0.7, -20.0, -1e3, -1e5], dtype=dtype)
    chosen, rejected = (x.flatten().requires_grad_() for x in torch.meshgrid(values, values, indexing="ij"))
    ones = torch.ones(chosen.shape[0], dtype=torch.long)
    loss = SPECS[name].fn(chosen, rejected, ones, ones, beta=0.1)
    gradients = torch.autograd.grad(loss.sum(), [chosen, rejected])
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rewards_in_a_ranking(dtype):
    logps = torch.tensor([1e5, -1e5, 0.0, 1e5, -1e5, 3.0], dtype=dtype).requires_grad_()
    pairs = torch.combinations(torch.arange(6))
    for order in (pairs, pairs.flip(1)):
        loss = plackett_luce(logps, torch.zeros_like(logps), order, beta=0.1)
        (gradient,) = torch.autograd.grad(loss.sum(), logps)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_exo_refuses_zero_smoothing():
    with pytest.raises(ValueError, match="0 < label_smoothing < 1, got 0"):
        LOSSES["exo_pair"](*random_logps(), label_smoothing=0.0)


def test_robust_refuses_labels_that_say_nothing():
    with pytest.raises(ValueError, match="0 <= label_smoothing < 0.5, got 0.5"):
        LOSSES["robust"](*random_logps(), label_smoothing=0.5)


def test_ipo_refuses_one_length():
    with pytest.raises(ValueError, match="Pass both"):
        LOSSES["ipo"](*random_logps(), chosen_lengths=LENGTHS[0])


def test_defaults_of_functions_and_options_agree():
    """What a loss does alone by default is what it does in the objective by default, but for the values that differ on
    purpose."""
    import inspect

    on_purpose = {
        ("simpo", "beta"),
        ("exo_pair", "label_smoothing"),
    }  # papers' values; the options hold TRL's for all losses
    for name, spec in SPECS.items():
        parameters = inspect.signature(spec.fn).parameters
        for keyword, field in spec.options.items():
            if (name, keyword) not in on_purpose:
                assert parameters[keyword].default == getattr(LossOptions(), field), (name, keyword)
