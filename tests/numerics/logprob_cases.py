"""Cases every fused implementation of `linear_logprob` must pass, on any device. Truth: the reference in float64 on the
same (rounded) inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from silkie.logprob import LogprobStats, linear_logprob

EPS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""Room beside 'at most twice the naive error', for cases the naive path happens to get exactly right: about one rounding of the dtype."""


@dataclass
class Found:
    logps: Tensor
    stats: LogprobStats
    grads: list[Tensor]


def problem(n=17, d=24, v=57, dtype=torch.float64, seed=0, bias=True, device="cpu"):
    """Random hidden [n, d], weight [v, d], target [n], bias [v] or None; logits of a deviation of about 5."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=gen, dtype=torch.float64)
    weight = torch.randn(v, d, generator=gen, dtype=torch.float64) * 5 / math.sqrt(d)
    offset = torch.randn(v, generator=gen, dtype=torch.float64).to(device, dtype) if bias else None
    target = torch.randint(0, v, (n,), generator=gen)
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device), offset


def run(hidden, weight, target, bias, *, impl, train_head=False, **options) -> Found:
    """Log-probs, statistics and the gradients of sum(rows * logps) in hidden and, when it trains, in weight and
    bias."""
    leaf = hidden.detach().requires_grad_()
    head = [x.detach().clone().requires_grad_(train_head) for x in (weight, bias) if x is not None]
    logps, stats = linear_logprob(leaf, head[0], target, *head[1:], impl=impl, return_stats=True, **options)
    rows = torch.linspace(-1, 2, len(target), dtype=logps.dtype, device=logps.device)
    grads = torch.autograd.grad((rows * logps).sum(), [leaf, *(head if train_head else [])])
    return Found(logps.detach(), stats, list(grads))


def assert_no_worse(found: Tensor, naive: Tensor, truth: Tensor, eps: float, what: str) -> None:
    """max |found - truth| <= 2 max |naive - truth| + eps * scale; infinities and NaN must agree with the truth."""
    truth, found, naive = truth.double().cpu(), found.double().cpu(), naive.double().cpu()
    assert found.shape == truth.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(found[~finite], truth[~finite]), f"{what}: {found[~finite]} where the truth is {truth[~finite]}"
    if not finite.any():
        return
    error = (found - truth)[finite].abs().max().item()
    allowed = 2 * (naive - truth)[finite].abs().nan_to_num(0.0, posinf=0.0).max().item() + eps * max(
        1.0, truth[finite].abs().max().item()
    )
    assert error <= allowed, f"{what}: error {error:.3g} > {allowed:.3g}"


def check(hidden, weight, target, bias, *, impl, train_head=False, stats=True, **options) -> Found:
    """Every output no worse than the same-dtype reference, against the float64 reference. Returns what the
    implementation found."""
    wide = [None if x is None else x.double() for x in (hidden, weight, bias)]
    truth = run(wide[0], wide[1], target, wide[2], impl="reference", train_head=train_head, **options)
    naive = run(hidden, weight, target, bias, impl="reference", train_head=train_head, **options)
    found = run(hidden, weight, target, bias, impl=impl, train_head=train_head, **options)
    eps = EPS[hidden.dtype]
    assert found.logps.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    assert_no_worse(found.logps, naive.logps, truth.logps, eps, "logps")
    names = ("hidden", "weight", "bias")
    for name, ours, theirs, true in zip(names, found.grads, naive.grads, truth.grads, strict=False):
        assert ours.dtype == hidden.dtype
        assert_no_worse(ours, theirs, true, eps, f"grad {name}")
    for name in ("mean_logit", "entropy", "log_sum_sq_probs") if stats else ():
        assert_no_worse(
            getattr(found.stats, name), getattr(naive.stats, name), getattr(truth.stats, name), eps * 4, name
        )
    return found


def confident(dtype=torch.float32, device="cpu", misses=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6), d=64, v=500):
    """Rows with p_y = 1 - miss: the target's direction is lifted until the logit exceeds the others' log-sum-exp by
    logit(p_y)."""
    hidden, weight, _, _ = problem(len(misses), d, v, seed=3, bias=False)
    target = torch.arange(len(misses)) * 7
    for i, miss in enumerate(misses):
        direction = weight[target[i]] / weight[target[i]].norm() ** 2
        low, high = -50.0, 200.0
        for _ in range(80):
            middle = (low + high) / 2
            logp = linear_logprob((hidden[i] + middle * direction)[None], weight, target[i : i + 1], impl="reference")
            low, high = (middle, high) if logp.item() < math.log1p(-miss) else (low, middle)
        hidden[i] += low * direction
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def check_confident(impl: str, dtype=torch.float32, device="cpu") -> None:
    """Per row: the relative error of gradient and entropy stays small however confident the row is."""
    hidden, weight, target = confident(dtype, device)
    truth, found = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    linear_logprob(truth, weight.double(), target, impl="reference").sum().backward()
    logps, stats = linear_logprob(found, weight, target, impl=impl, return_stats=True)
    logps.sum().backward()
    _, true_stats = linear_logprob(hidden.double(), weight.double(), target, impl="reference", return_stats=True)
    torch.testing.assert_close(stats.entropy.double(), true_stats.entropy, rtol=2e-4, atol=0)
    relative = (found.grad.double() - truth.grad).norm(dim=1) / truth.grad.norm(dim=1)
    assert relative.max() <= 2e-4, relative


def extreme_rows(dtype, device="cpu", d=8, v=300):
    """Log-probs of about -1e-9, -20, -120, -131 and -1e3: one direction e_0 carries a dominating token 0."""
    gen = torch.Generator().manual_seed(1)
    weight = 0.1 * torch.randn(v, d, generator=gen, dtype=torch.float64)
    weight[:, 0] = 0
    weight[0] = 0
    weight[0, 0] = 1
    hidden = torch.randn(5, d, generator=gen, dtype=torch.float64)
    hidden[:, 0] = torch.tensor([math.log(v) + 20.7, 20, 120, 131, 1000], dtype=torch.float64)
    target = torch.tensor([0, 5, 7, v - 1, 150])
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device), None


def log_ratio_error(impl: str, dtype, device="cpu") -> tuple[float, float]:
    """Largest error of logp(policy) - logp(reference) where the two nearly agree and logits reach 27; ours and the
    naive path's."""
    hidden, weight, target = confident(torch.float64, misses=(0.7, 0.5, 0.3, 0.2, 0.1, 0.05))
    hidden, weight = (hidden * 1.5).to(device, dtype), weight.to(device, dtype)
    gen = torch.Generator().manual_seed(5)
    other = (
        hidden.double()
        + 4e-3 * hidden.double() * torch.randn(hidden.shape, generator=gen, dtype=torch.float64).to(device)
    ).to(dtype)
    target = target.to(device)

    def gap(impl: str, kind=None) -> Tensor:
        a, b, w = (x if kind is None else x.to(kind) for x in (hidden, other, weight))
        ratio = linear_logprob(a, w, target, impl=impl) - linear_logprob(b, w, target, impl=impl)
        return ratio.double()

    truth = gap("reference", torch.float64)
    return (gap(impl) - truth).abs().max().item(), (gap("reference") - truth).abs().max().item()


def check_infinities(impl: str, dtype, device="cpu") -> None:
    """Columns at -inf (a masked vocabulary) carry no probability; a target there has log-prob -inf; the mean logit is
    -inf, as in torch."""
    hidden, weight, target, bias = problem(6, 12, 40, dtype, device=device)
    bias[10:20] = -torch.inf
    target = torch.tensor([0, 5, 9, 20, 39, 12], device=device)
    leaf = hidden.clone().requires_grad_()
    logps, stats = linear_logprob(leaf, weight, target, bias, impl=impl, return_stats=True)
    keep = torch.cat([torch.arange(10), torch.arange(20, 40)]).to(device)
    moved = torch.where(target[:5] >= 20, target[:5] - 10, target[:5])
    truth, truth_stats = linear_logprob(
        hidden[:5].double(), weight[keep].double(), moved, bias[keep].double(), impl="reference", return_stats=True
    )
    naive = linear_logprob(hidden[:5], weight[keep], moved, bias[keep], impl="reference")
    assert_no_worse(logps[:5], naive, truth, EPS[dtype], "logps beside -inf columns")
    assert logps[5] == -torch.inf
    assert (stats.mean_logit == -torch.inf).all()
    torch.testing.assert_close(
        stats.entropy[:5].double(), truth_stats.entropy, rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-5
    )
    (grad,) = torch.autograd.grad(logps.sum(), leaf)
    assert grad.isfinite().all()


def check_duplicates(impl: str, dtype, device="cpu") -> None:
    """k equal maxima far above the rest: logp = -log k, gradient W_y - mean of the k rows; only the first of them is
    top-1."""
    weight = torch.zeros(50, 8, device=device, dtype=dtype)
    weight[[3, 17, 44], 0] = 1
    weight[:, 1] = torch.arange(50, device=device) % 3
    hidden = torch.zeros(4, 8, device=device, dtype=dtype)
    hidden[:, 0] = 200
    target = torch.tensor([3, 17, 44, 0], device=device)
    leaf = hidden.clone().requires_grad_()
    logps, stats = linear_logprob(leaf, weight, target, impl=impl, return_stats=True)
    expected = torch.tensor([-math.log(3)] * 3 + [-200 - math.log(3)], device=device)
    torch.testing.assert_close(logps.detach().float(), expected, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(logps.sum(), leaf)
    mean = weight[[3, 17, 44]].double().mean(0)
    torch.testing.assert_close(
        grad.double(), weight[target].double() - mean, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2
    )
    assert stats.is_top1.tolist() == [True, False, False, False]


def check_ignored(impl: str, dtype, device="cpu") -> None:
    """Ignored rows: 0, no gradient, no influence, whatever their hidden state holds."""
    hidden, weight, target, bias = problem(9, 12, 40, dtype, device=device)
    clean = run(hidden, weight, target, bias, impl=impl)
    hidden[[2, 8]] = torch.nan
    masked = target.clone()
    masked[[2, 8]] = -7
    found = run(hidden, weight, masked, bias, impl=impl, ignore_index=-7)
    keep = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(found.logps[keep], clean.logps[keep]) and torch.equal(found.grads[0][keep], clean.grads[0][keep])
    for value in (
        found.logps,
        found.grads[0],
        found.stats.mean_logit,
        found.stats.entropy,
        found.stats.log_sum_sq_probs,
        found.stats.is_top1,
    ):
        assert (value[[2, 8]] == 0).all()
    leaf = hidden.clone().requires_grad_()
    upstream = torch.linspace(-1, 2, 9, dtype=found.logps.dtype, device=device)
    upstream[[2, 8]] = torch.inf  # of a mean over no token, or a logarithm of the 0 that stands there
    (grad,) = torch.autograd.grad(
        linear_logprob(leaf, weight, masked, bias, impl=impl, ignore_index=-7), leaf, upstream
    )
    assert (grad[[2, 8]] == 0).all() and torch.equal(grad[keep], found.grads[0][keep])
    # Of a head that trains every row sums over the tokens, the ignored ones too
    poisoned = run(hidden, weight, masked, bias, impl=impl, train_head=True, ignore_index=-7)
    zeroed = run(hidden.nan_to_num(), weight, masked, bias, impl=impl, train_head=True, ignore_index=-7)
    assert all(a.isfinite().all() and torch.equal(a, b) for a, b in zip(poisoned.grads, zeroed.grads, strict=True))


def check_strides(impl: str, dtype, device="cpu") -> None:
    """Every second entry of a wider array, and a head stored transposed, give the bits of their contiguous copies."""
    hidden, weight, target, bias = problem(9, 24, 40, dtype, device=device)
    wide = torch.full((9, 48), torch.nan, device=device, dtype=dtype)
    wide[:, ::2] = hidden
    offset = torch.full((80,), torch.nan, device=device, dtype=dtype)
    offset[::2] = bias
    for train_head in (False, True):
        leaf = wide[:, ::2].requires_grad_()
        head = weight.clone().requires_grad_(train_head), offset[::2].detach().requires_grad_(train_head)
        logps = linear_logprob(leaf, head[0], target.repeat_interleave(2)[::2], head[1], impl=impl)
        rows = torch.linspace(-1, 2, 9, dtype=logps.dtype, device=device)
        grads = torch.autograd.grad((rows * logps).sum(), [leaf, *(head if train_head else [])])
        expected = run(hidden, weight, target, bias, impl=impl, train_head=train_head)
        assert torch.equal(logps.detach(), expected.logps)
        assert all(torch.equal(a, b) for a, b in zip(grads, expected.grads, strict=True))
    check(hidden, weight.t().contiguous().t(), target, bias, impl=impl, train_head=True)


def check_backward_under_autocast(impl: str, dtype, device="cpu") -> None:
    """A backward pass that runs where autocast is on computes what it computes elsewhere."""
    grads = []
    for enabled in (False, True):
        hidden, weight, target, bias = problem(9, 24, 40, dtype, device=device)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        logps = linear_logprob(hidden, weight, target, bias, impl=impl)
        with torch.autocast(device, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(logps.sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def check_poisoned_and_equal_bits(impl: str, dtype, device="cpu", train_head=False) -> None:
    """With uninitialised memory filled with NaN nothing leaks, and a second run gives the same bits."""
    tensors = problem(19, 24, 57, dtype, device=device)
    first = run(*tensors, impl=impl, train_head=train_head)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        second = run(*tensors, impl=impl, train_head=train_head)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    assert second.logps.isfinite().all()
    for a, b in zip(
        [first.logps, *first.grads, first.stats.entropy],
        [second.logps, *second.grads, second.stats.entropy],
        strict=True,
    ):
        assert torch.equal(a, b)


CASES = [
    check_infinities,
    check_duplicates,
    check_ignored,
    check_strides,
    check_backward_under_autocast,
    check_poisoned_and_equal_bits,
]
"""All that are called as `case(impl, dtype, device)`."""
