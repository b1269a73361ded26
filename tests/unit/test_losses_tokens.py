"""Token weights of a pair: alignment (DDPO), shared length (LD-DPO), on-policy weights (WPO)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silkie.losses import (
    GroupLogps,
    LossOptions,
    build_objective,
    changed_tokens,
    ddpo_token_weights,
    ld_token_weights,
    wpo_response_weights,
)
from silkie.losses.tokens import token_positions, weighted_logps

TOKENS = st.lists(st.integers(0, 4), max_size=20)


@given(TOKENS, TOKENS)
def test_unchanged_tokens_are_a_common_subsequence(chosen, rejected):
    changed = changed_tokens(chosen, rejected)
    assert [len(side) for side in changed] == [len(chosen), len(rejected)]
    kept = [
        [t for t, is_changed in zip(ids, side, strict=True) if not is_changed]
        for ids, side in zip((chosen, rejected), changed, strict=True)
    ]
    assert kept[0] == kept[1]


@given(TOKENS, TOKENS)
def test_a_token_that_both_hold_is_aligned(chosen, rejected):
    assert all(changed_tokens(chosen, rejected)[0]) == (not set(chosen) & set(rejected))


@given(TOKENS)
def test_equal_responses_have_no_changed_token(ids):
    assert changed_tokens(ids, ids) == ([False] * len(ids), [False] * len(ids))


@given(TOKENS, st.lists(st.integers(5, 9), min_size=1, max_size=5), st.lists(st.integers(10, 14), max_size=5), TOKENS)
def test_a_correction_between_equal_parts_is_what_changed(head, correct, wrong, tail):
    """Corrected words that occur nowhere else are changed, and nothing else is, wherever they are inserted or
    replaced."""
    chosen, rejected = changed_tokens(head + correct + tail, head + wrong + tail)
    # Tokens of head and tail may align across the correction, but never with its words.
    assert all(chosen[len(head) : len(head) + len(correct)])
    assert all(rejected[len(head) : len(head) + len(wrong)])


def test_distinct_words_align_exactly():
    # a red cat sat on the mat . / a black cat lay there on the mat .
    chosen, rejected = [1, 2, 3, 4, 5, 6, 7, 8], [1, 12, 3, 14, 15, 5, 6, 7, 8]
    assert changed_tokens(chosen, rejected) == (
        [False, True, False, True, False, False, False, False],
        [False, True, False, True, True, False, False, False, False],
    )


def test_frequent_tokens_of_long_responses_align():
    """difflib's default drops tokens that make up more than 1 % of 200 or more."""
    ids = [0, 1] * 150
    chosen, rejected = changed_tokens([7, *ids, 7], [8, *ids, 8])
    assert chosen == rejected == [True] + [False] * 300 + [True]


@pytest.fixture
def tokens():
    """Three responses of 4, 2 and 3 tokens; the pairs share responses."""
    lengths = torch.tensor([4, 2, 3])
    owner = torch.repeat_interleave(torch.arange(3), lengths)
    ids = torch.tensor([1, 2, 3, 4, 1, 3, 9, 2, 3])
    return {"lengths": lengths, "owner": owner}, ids, torch.tensor([[0, 1], [0, 2], [2, 1]])


def test_positions(tokens):
    layout, *_ = tokens
    assert token_positions(**layout).tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_positions_skip_a_response_without_tokens():
    assert token_positions(torch.tensor([0, 0, 2]), torch.tensor([2, 0, 1])).tolist() == [0, 1, 0]


def test_ld_weights(tokens):
    layout, _, pairs = tokens
    weights = ld_token_weights(pairs[:, 0], pairs[:, 1], alpha=0.3, dtype=torch.float64, **layout)
    assert weights.tolist() == [
        [1, 1, 0.3, 0.3, 0, 0, 0, 0, 0],
        [1, 1, 1, 0.3, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 0.3],
    ]
    assert ld_token_weights(pairs[:, 1], pairs[:, 0], alpha=0.3, **layout).sum(dim=1).tolist() == [2, 3, 2]


def test_ddpo_weights(tokens):
    layout, ids, pairs = tokens
    chosen, rejected = ddpo_token_weights(pairs, token_ids=ids, gamma=5.0, normalize=False, **layout)
    assert chosen.tolist() == [
        [1, 5, 1, 5, 0, 0, 0, 0, 0],  # 1 2 3 4 against 1 3
        [5, 1, 1, 5, 0, 0, 0, 0, 0],  # 1 2 3 4 against 9 2 3
        [0, 0, 0, 0, 0, 0, 5, 5, 1],  # 9 2 3 against 1 3
    ]
    assert rejected.tolist() == [
        [0, 0, 0, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 5, 1, 1],
        [0, 0, 0, 0, 5, 1, 0, 0, 0],
    ]


def test_ddpo_score_is_the_weighted_mean(tokens):
    """(sum over unchanged + gamma sum over changed) / (|unchanged| + gamma |changed|)."""
    layout, ids, pairs = tokens
    logps = torch.tensor([-1.0, -2, -3, -4, -5, -6, -7, -8, -9], dtype=torch.float64)
    chosen, rejected = ddpo_token_weights(pairs, token_ids=ids, gamma=5.0, dtype=torch.float64, **layout)
    expected = [(-1 - 3 + 5 * (-2 - 4)) / 12, (-2 - 3 + 5 * (-1 - 4)) / 12, (-9 + 5 * (-7 - 8)) / 11]
    torch.testing.assert_close(weighted_logps(chosen, logps), torch.tensor(expected, dtype=torch.float64))
    expected = [(-5 - 6) / 2, (-8 - 9 + 5 * -7) / 7, (-6 + 5 * -5) / 6]
    torch.testing.assert_close(weighted_logps(rejected, logps), torch.tensor(expected, dtype=torch.float64))


def test_ddpo_in_the_objective(tokens):
    layout, ids, pairs = tokens
    generator = torch.Generator().manual_seed(0)
    policy, reference = -torch.rand(2, 9, generator=generator, dtype=torch.float64)
    batch = GroupLogps(
        pairs=pairs,
        token_ids=ids,
        per_token_logps=policy,
        ref_per_token_logps=reference,
        logps=torch.zeros(3),
        **layout,
    )
    loss, _ = build_objective("sigmoid", None, LossOptions(ddpo_gamma=5.0, beta=0.5))(batch)
    gaps = policy - reference
    expected = 0.0
    for sides in (([1, 5, 1, 5], [1, 1], 0, 4), ([5, 1, 1, 5], [5, 1, 1], 0, 6), ([5, 5, 1], [5, 1], 6, 4)):
        weights_c, weights_r, start_c, start_r = sides
        score_c = sum(w * gaps[start_c + i] for i, w in enumerate(weights_c)) / sum(weights_c)
        score_r = sum(w * gaps[start_r + i] for i, w in enumerate(weights_r)) / sum(weights_r)
        expected += math.log1p(math.exp(-0.5 * (score_c - score_r))) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gamma_one_without_normalisation_is_dpo(tokens):
    layout, ids, pairs = tokens
    chosen, rejected = ddpo_token_weights(pairs, token_ids=ids, gamma=1.0, normalize=False, **layout)
    for weights, responses in ((chosen, pairs[:, 0]), (rejected, pairs[:, 1])):
        assert torch.equal(weights, (layout["owner"][None] == responses[:, None]).float())


def test_tokens_of_other_responses_never_count():
    """A log-prob of -inf elsewhere in the batch must not turn a sum into NaN, nor its gradient."""
    logps = torch.tensor([-1.0, -torch.inf], requires_grad=True)
    total = weighted_logps(torch.tensor([[2.0, 0.0]]), logps)
    total.backward()
    assert total.item() == -2.0
    assert logps.grad.tolist() == [2.0, 0.0]


def test_wpo_weights(tokens):
    layout, *_ = tokens
    logps = torch.linspace(-3, -1, 9, dtype=torch.float64).requires_grad_()
    squares = torch.linspace(-0.5, -2, 9, dtype=torch.float64)
    weights = wpo_response_weights(logps, squares, **layout)
    ratios = [math.exp(a - b) for a, b in zip(logps.tolist(), squares.tolist(), strict=True)]
    expected = [math.prod(ratios[a:b]) ** (1 / (b - a)) for a, b in ((0, 4), (4, 6), (6, 9))]
    assert weights.tolist() == pytest.approx(expected)
    assert not weights.requires_grad
