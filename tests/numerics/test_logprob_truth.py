"""`linear_logprob` against autograd on full float64 logits: values, gradients and statistics."""

import pytest
import torch

from silkie.logprob import linear_logprob

TRANSFORMS = [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"logit_scale": 2.0}]


def problem(n=17, d=24, v=57, dtype=torch.float64, seed=0, bias=True):
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=gen, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=gen, dtype=torch.float64).to(dtype)
    offset = torch.randn(v, generator=gen, dtype=torch.float64).to(dtype) if bias else None
    target = torch.randint(0, v, (n,), generator=gen)
    return hidden, weight, target, offset


def run(hidden, weight, target, bias, *, impl, train_head, rows=None, **options):
    """(logps, stats, gradients of sum(rows * logps) in hidden and, when it trains, weight and bias)."""
    leaves = [hidden.clone().requires_grad_()]
    head = [x.clone().requires_grad_(train_head) for x in (weight, bias) if x is not None]
    logps, stats = linear_logprob(leaves[0], head[0], target, *head[1:], impl=impl, return_stats=True, **options)
    rows = torch.linspace(-1, 2, len(target), dtype=logps.dtype) if rows is None else rows
    grads = torch.autograd.grad((rows * logps).sum(), leaves + (head if train_head else []))
    return logps.detach(), stats, grads


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_tiled_equals_the_reference_in_float64(monkeypatch, options, train_head, bias):
    # Tiles that divide neither N nor V: every edge is ragged.
    monkeypatch.setattr("silkie.logprob.tiled.ROWS", 5)
    monkeypatch.setattr("silkie.logprob.tiled.COLUMNS", 13)
    hidden, weight, target, offset = problem(bias=bias)
    target[3] = -100
    expected = run(hidden, weight, target, offset, impl="reference", train_head=train_head, **options)
    found = run(hidden, weight, target, offset, impl="tiled", train_head=train_head, **options)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)
    for name in ("mean_logit", "entropy", "is_top1", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(found[1], name), getattr(expected[1], name), rtol=1e-11, atol=1e-11)
    assert len(found[2]) == len(expected[2])
    for ours, truth in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def test_reference_is_log_softmax():
    hidden, weight, target, _ = problem(bias=False)
    expected = -torch.nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="none")
    torch.testing.assert_close(linear_logprob(hidden, weight, target, impl="reference"), expected, rtol=1e-12, atol=1e-12)
