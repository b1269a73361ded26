"""What `linear_logprob` accepts and refuses, and what its dispatch says."""

import logging

import logprob_cases as cases
import pytest
import torch

from silkie.logprob import api, linear_logprob


@pytest.mark.parametrize("bad", [57, 1000, -1, -99])
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_target_outside_the_vocabulary_raises(bad, impl):
    hidden, weight, target, _ = cases.problem(bias=False)
    target[4] = bad
    with pytest.raises(ValueError, match=f"target token {bad} lies outside"):
        linear_logprob(hidden, weight, target, impl=impl)


def test_mismatches_raise_with_what_was_found():
    hidden, weight, target, bias = cases.problem()
    for arguments, message in (
        ((hidden[:, :5], weight, target), r"found \(17, 5\) and \(57, 24\)"),
        ((hidden[None], weight, target), r"expected hidden \[N, D\]"),
        ((hidden, weight, target[:3]), r"expected target of shape \(17,\)"),
        ((hidden, weight, target.int()), "torch.int64"),
        ((hidden, weight, target, bias[:3]), r"expected bias of shape \(57,\)"),
        ((hidden, weight.float(), target), "weight is torch.float32"),
        ((hidden, weight.to("meta"), target), "weight is on meta"),
        ((hidden, weight[:0], target), "is empty; a sharded head must be gathered first"),
        ((hidden, weight.new_empty(0), target), r"weight of shape \(0,\) is empty"),
        ((hidden.long(), weight.long(), target), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_logprob(*arguments)
    for softcap in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="softcap must be positive and finite"):
            linear_logprob(hidden, weight, target, softcap=softcap)
    with pytest.raises(ValueError, match="logit_scale must be finite, found nan"):
        linear_logprob(hidden, weight, target, logit_scale=float("nan"))
    with pytest.raises(ValueError, match="impl must be one of auto, reference, tiled, triton"):
        linear_logprob(hidden, weight, target, impl="fast")


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, target, _ = cases.problem(dtype=torch.float32, bias=False)
    with pytest.raises(ValueError, match="cannot run here: the tensors are on cpu"):
        linear_logprob(hidden, weight, target, impl="triton")
    with pytest.raises(ValueError, match="no float64 form"):
        linear_logprob(hidden.double(), weight.double(), target, impl="triton")


def test_dispatch_logs_its_choice_once(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    api._announce.cache_clear()
    hidden, weight, target, _ = cases.problem(dtype=torch.float32, bias=False)
    with caplog.at_level(logging.INFO, logger="silkie.logprob.api"):
        for _ in range(3):
            linear_logprob(hidden, weight, target)
    assert [r.message for r in caplog.records] == [
        "linear_logprob: impl=auto -> tiled on cpu (the tensors are on cpu, it needs CUDA)"
    ]
    assert linear_logprob(hidden, weight, target).equal(linear_logprob(hidden, weight, target, impl="tiled"))


def test_nothing_tracked_stores_nothing():
    hidden, weight, target, _ = cases.problem(bias=False)
    assert linear_logprob(hidden, weight, target).grad_fn is None
    hidden.requires_grad_()
    with torch.no_grad():
        assert linear_logprob(hidden, weight, target).grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_logprob(hidden, weight, target, impl="tiled")
    assert [tuple(x.shape) for x in saved if x.is_floating_point()] == [
        tuple(hidden.shape)
    ]  # and the mask of ignored rows


def test_only_the_bias_trains():
    hidden, weight, target, bias = cases.problem()
    grads = []
    for impl in ("tiled", "reference"):
        leaf = bias.clone().requires_grad_()
        linear_logprob(hidden, weight, target, leaf, impl=impl).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_second_derivative_needs_the_reference():
    hidden, weight, target, _ = cases.problem(bias=False)
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(
        linear_logprob(hidden, weight, target, impl="tiled").square().sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    (grad,) = torch.autograd.grad(
        linear_logprob(hidden, weight, target, impl="reference").square().sum(), hidden, create_graph=True
    )
    grad.sum().backward()


def test_a_head_partitioned_between_the_passes_raises():
    hidden, weight, target, _ = cases.problem(bias=False)
    weight.requires_grad_()
    logps = linear_logprob(hidden, weight, target, impl="tiled")
    weight.data = torch.empty(0, dtype=weight.dtype)
    with pytest.raises(RuntimeError, match="partitioned again"):
        logps.sum().backward()
