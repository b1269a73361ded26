"""Each loss in float64 against its equation, written per pair on probabilities with mpmath (50 digits), not on
log-ratios in torch."""

import mpmath
import pytest
import torch
from mpmath import exp, log, mpf

from silkie.losses import LOSSES, f_scores, kl_estimate

mpmath.mp.dps = 50
BETA, SMOOTHING = 0.3, 0.15
PAIRS = 6


def logistic(x):
    return 1 / (1 + exp(-x))


class Pair:
    """Probabilities of a chosen (w) and a rejected (l) response under policy (p) and reference (q)."""

    def __init__(self, *logps, lengths=(1, 1)):
        self.pw, self.pl, self.qw, self.ql = (exp(mpf(x)) for x in logps)
        self.nw, self.nl = lengths

    def prefers(self, beta=BETA):
        """Bradley-Terry probability of the label under the implicit reward beta log(p / q)."""
        win, lose = (self.pw / self.qw) ** beta, (self.pl / self.ql) ** beta
        return win / (win + lose)


def dpo(pair):
    return -log(pair.prefers())


def cdpo(pair):
    return -(1 - SMOOTHING) * log(pair.prefers()) - SMOOTHING * log(1 - pair.prefers())


def normalised(pair):
    win, lose = (pair.pw / pair.qw) ** (BETA / pair.nw), (pair.pl / pair.ql) ** (BETA / pair.nl)
    return log(1 + lose / win)


def rdpo(pair):
    right, flipped = -log(pair.prefers()), -log(1 - pair.prefers())
    return ((1 - SMOOTHING) * right - SMOOTHING * flipped) / (1 - 2 * SMOOTHING)


def rso_hinge(pair):
    return max(mpf(0), 1 - BETA * log(pair.pw * pair.ql / (pair.pl * pair.qw)))


def ipo(pair):
    return (log(pair.pw * pair.ql / (pair.pl * pair.qw)) - 1 / (2 * mpf(BETA))) ** 2


def exo(pair):
    model, label = (pair.prefers(), 1 - pair.prefers()), (mpf(1 - SMOOTHING), mpf(SMOOTHING))
    return sum(p * log(p / q) for p, q in zip(model, label, strict=True))


def nca(pair):
    win, lose = BETA * log(pair.pw / pair.qw), BETA * log(pair.pl / pair.ql)
    return -(log(logistic(win)) + (log(1 - logistic(win)) + log(1 - logistic(lose))) / 2)


def bco(pair):
    shift = mpf("0.4")
    return -log(logistic(BETA * log(pair.pw / pair.qw) - shift)) - log(
        1 - logistic(BETA * log(pair.pl / pair.ql) - shift)
    )


def sppo(pair):
    # Eq. 4.7 asks log(p / q) = (P(y beats the policy) - 1/2) / beta, with P = 1 for the winner and 0 for the loser.
    return sum(
        (log(p / q) - (win - mpf(1) / 2) / BETA) ** 2 for p, q, win in ((pair.pw, pair.qw, 1), (pair.pl, pair.ql, 0))
    )


def apo_zero(pair):
    return -logistic(BETA * log(pair.pw / pair.qw)) + logistic(BETA * log(pair.pl / pair.ql)) + 1


def apo_down(pair):
    return logistic(BETA * log(pair.pw / pair.qw)) - pair.prefers() + 1


def discopop(pair):
    x = BETA * log(pair.pw * pair.ql / (pair.pl * pair.qw))
    gate = logistic(x / mpf("0.05"))
    return (1 - gate) * -log(logistic(x)) + gate * exp(-x)


def simpo(pair):
    return -log(logistic(BETA / mpf(pair.nw) * log(pair.pw) - BETA / mpf(pair.nl) * log(pair.pl) - mpf("0.7")))


def cpo(pair):
    return -log(pair.pw**BETA / (pair.pw**BETA + pair.pl**BETA))


def orpo(pair):
    win, lose = pair.pw ** (1 / mpf(pair.nw)), pair.pl ** (1 / mpf(pair.nl))
    ratio = (win / (1 - win)) / (lose / (1 - lose))
    return -BETA * log(ratio / (1 + ratio))


SMOOTH = {"label_smoothing": SMOOTHING}
REFERENCED = {
    "sigmoid": (dpo, {}),
    "sigmoid/cdpo": (cdpo, SMOOTH),
    "robust": (rdpo, SMOOTH),
    "hinge": (rso_hinge, {}),
    "ipo": (ipo, {}),
    "exo_pair": (exo, SMOOTH),
    "nca_pair": (nca, {}),
    "bco_pair": (bco, {"reward_shift": 0.4}),
    "sppo_hard": (sppo, {}),
    "apo_zero": (apo_zero, {}),
    "apo_down": (apo_down, {}),
    "discopop": (discopop, {}),
    "mdpo_image": (dpo, {}),
}
WITH_LENGTHS = {"simpo": (simpo, {"gamma": 0.7}), "cpo": (cpo, {}), "orpo": (orpo, {})}
TESTED_BELOW = {"sigmoid_norm", "mdpo_anchor", "sft", "aot", "aot_unpaired", "kto", "apo_zero_unpaired"}
TESTED_ELSEWHERE = {"plackett_luce"}  # tests/unit/test_losses_listwise.py


def test_every_loss_has_an_equation():
    named = {name.split("/")[0] for name in REFERENCED} | WITH_LENGTHS.keys() | TESTED_BELOW | TESTED_ELSEWHERE
    assert set(LOSSES) == named


@pytest.fixture
def logps():
    generator = torch.Generator().manual_seed(3)
    return tuple(-12 * torch.rand(4, PAIRS, generator=generator, dtype=torch.float64))


@pytest.fixture
def lengths():
    return torch.tensor([[1, 4, 9, 2, 30, 7], [5, 4, 1, 11, 3, 8]])


def truth(equation, logps, lengths=None):
    sizes = lengths.T.tolist() if lengths is not None else [(1, 1)] * PAIRS
    values = [
        equation(Pair(*row, lengths=size)) for row, size in zip(torch.stack(logps).T.tolist(), sizes, strict=True)
    ]
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("name", REFERENCED)
def test_equation(name, logps):
    equation, options = REFERENCED[name]
    loss = LOSSES[name.split("/")[0]](*logps, beta=BETA, **options)
    torch.testing.assert_close(loss, truth(equation, logps), rtol=1e-12, atol=1e-13)


def test_length_normalised(logps, lengths):
    sizes = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    torch.testing.assert_close(
        LOSSES["sigmoid_norm"](*logps, beta=BETA, **sizes), truth(normalised, logps, lengths), rtol=1e-12, atol=0
    )
    means = tuple(x / n for x, n in zip(logps, (lengths[0], lengths[1]) * 2, strict=True))
    torch.testing.assert_close(LOSSES["ipo"](*logps, beta=BETA, **sizes), truth(ipo, means), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_reference_free(name, logps, lengths):
    equation, options = WITH_LENGTHS[name]
    loss = LOSSES[name](logps[0], logps[1], lengths[0], lengths[1], beta=BETA, **options)
    torch.testing.assert_close(loss, truth(equation, logps, lengths), rtol=1e-11, atol=1e-13)


def test_mdpo_anchor(logps):
    expected = truth(lambda pair: -log(logistic(BETA * log(pair.pw / pair.qw) - mpf("0.25"))), logps)
    torch.testing.assert_close(
        LOSSES["mdpo_anchor"](logps[0], logps[2], beta=BETA, anchor=0.25), expected, rtol=1e-12, atol=0
    )


def test_sft(logps, lengths):
    torch.testing.assert_close(LOSSES["sft"](logps[0]), truth(lambda pair: -log(pair.pw), logps))
    per_token = LOSSES["sft"](logps[0], lengths[0]).mean()
    torch.testing.assert_close(per_token, -logps[0].sum() / lengths[0].sum())


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_aot_is_the_cost_of_the_sorted_coupling(logps, smoothing):
    def cost(upper, lower):
        gaps = [mpf(a) - mpf(b) for a, b in zip(sorted(upper.tolist()), sorted(lower.tolist()), strict=True)]
        values = [
            -(1 - smoothing) * log(logistic(BETA * gap)) - smoothing * log(1 - logistic(BETA * gap)) for gap in gaps
        ]
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    chosen, rejected, ref_chosen, ref_rejected = logps
    options = {"beta": BETA, "label_smoothing": smoothing}
    torch.testing.assert_close(
        LOSSES["aot"](*logps, **options), cost(chosen - rejected, ref_chosen - ref_rejected), rtol=1e-12, atol=0
    )
    unpaired = cost(chosen - ref_chosen, rejected - ref_rejected)
    torch.testing.assert_close(LOSSES["aot_unpaired"](*logps, **options), unpaired, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_labelled(name, logps):
    """KTO's eq. 8: w_y - v(x, y), with v the logistic value of the reward against the reference point z0."""
    zero = mpf("0.8") if name == "kto" else mpf(0)

    def desirable(pair):
        return 2 - 2 * logistic(BETA * (log(pair.pw / pair.qw) - zero))

    def undesirable(pair):
        return mpf("0.5") - logistic(BETA * (zero - log(pair.pw / pair.qw))) / 2

    labels = torch.arange(PAIRS) % 2 == 0
    expected = torch.where(labels, truth(desirable, logps), truth(undesirable, logps))
    options = {"beta": BETA, "desirable_weight": 2.0, "undesirable_weight": 0.5}
    options |= {"kl": torch.tensor(0.8, dtype=torch.float64)} if name == "kto" else {}
    torch.testing.assert_close(LOSSES[name](logps[0], logps[2], labels, **options), expected, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(LOSSES[name](logps[0], logps[2], ~labels, **options), expected)


def test_kl_estimate_over_ranks(logps):
    """The mean over the responses of all ranks, never below 0, and no gradient flows through it."""
    policy, reference = logps[2].clone().requires_grad_(), logps[0]
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    whole = kl_estimate(policy, reference, weights)
    mean = ((policy - reference) * weights).sum() / 6
    torch.testing.assert_close(whole, mean.detach().clamp(min=0))
    assert not whole.requires_grad and whole > 0
    assert kl_estimate(reference, policy, weights) == 0
    parts = [(policy[i], reference[i], weights[i]) for i in (slice(0, 2), slice(2, 6))]
    sums = [torch.stack([(w * (p - r)).sum(), w.sum()]) for p, r, w in parts]
    for part in parts:
        torch.testing.assert_close(kl_estimate(*part, lambda _: sum(sums)), whole)
    assert kl_estimate(policy[:0], reference[:0], weights[:0]) == 0


@pytest.mark.parametrize(
    ("divergence", "f"),
    [
        ("reverse_kl", lambda t: t * log(t) - t),
        ("forward_kl", lambda t: -log(t) + t),
        ("js_divergence", lambda t: t * log(2 * t / (1 + t)) + log(2 / (1 + t))),
        ("alpha_divergence", lambda t: (t ** mpf("0.3") - mpf("0.3") * t) / (mpf("0.3") * (mpf("0.3") - 1))),
    ],
)
def test_scores_are_the_derivative_of_f(divergence, f):
    """f is a divergence's generator up to a linear term c t + d, whose derivative is a constant that cancels in a
    difference of scores."""
    ratios = [mpf("0.01"), mpf("0.4"), mpf(1), mpf("2.5"), mpf(70)]
    logratios = torch.tensor([float(log(t)) for t in ratios], dtype=torch.float64)
    expected = torch.tensor([float(mpmath.diff(f, t)) for t in ratios], dtype=torch.float64)
    scores = f_scores(logratios, divergence, alpha=0.3)
    torch.testing.assert_close(scores - scores[2], expected - expected[2], rtol=1e-10, atol=1e-12)


def test_unknown_divergence():
    with pytest.raises(ValueError, match="unknown f_divergence_type 'kl'"):
        f_scores(torch.zeros(1), "kl")
