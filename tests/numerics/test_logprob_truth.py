"""The tiled log-prob pass against autograd on full float64 logits: values, gradients and statistics, on every awkward
input."""

import logprob_cases as cases
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from silkie.logprob import linear_logprob

DTYPES = [torch.float32, torch.bfloat16]
TRANSFORMS = [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"logit_scale": 2.0}]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that divide neither N nor V of the default problem: every edge is ragged."""
    monkeypatch.setattr("silkie.logprob.tiled.ROWS", 5)
    monkeypatch.setattr("silkie.logprob.tiled.COLUMNS", 13)


def test_reference_is_log_softmax():
    hidden, weight, target, _ = cases.problem(bias=False)
    expected = -torch.nn.functional.cross_entropy(hidden @ weight.t(), target, reduction="none")
    torch.testing.assert_close(
        linear_logprob(hidden, weight, target, impl="reference"), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES, torch.float16])
def test_values_gradients_and_statistics(small_tiles, dtype, options, train_head, bias):
    hidden, weight, target, offset = cases.problem(dtype=dtype, bias=bias)
    target[3] = -100
    cases.check(hidden, weight, target, offset, impl="tiled", train_head=train_head, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top1_is_the_argmax(small_tiles, dtype):
    hidden, weight, target, bias = cases.problem(n=40, dtype=dtype)
    best = (hidden @ weight.t() + bias).argmax(-1)
    target[::3] = best[::3]
    _, stats = linear_logprob(hidden, weight, target, bias, impl="tiled", return_stats=True)
    assert torch.equal(stats.is_top1, best == target)


def test_confident_rows_keep_their_gradient(small_tiles):
    cases.check_confident("tiled")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train_head", [False, True])
def test_extreme_logprobs(small_tiles, dtype, train_head):
    tensors = cases.extreme_rows(dtype)
    found = cases.check(*tensors, impl="tiled", train_head=train_head)
    truth = linear_logprob(
        *(None if x is None else x.double() if x.is_floating_point() else x for x in tensors), impl="reference"
    )
    # The nearly certain row is -1e-9, which 1 - p in fp32 could not tell from 0.
    torch.testing.assert_close(found.logps.double(), truth, rtol=5e-3 if dtype == torch.bfloat16 else 1e-4, atol=0)


def test_log_ratio_near_the_reference():
    error, _ = cases.log_ratio_error("tiled", torch.float32)
    assert error <= 1e-5
    error, naive = cases.log_ratio_error("tiled", torch.bfloat16)
    assert error < naive / 5, (error, naive)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits(small_tiles, dtype):
    hidden, weight, target, _ = cases.problem(dtype=torch.float64, bias=False)
    logits = hidden @ weight.t()
    scale = 1e4 / logits.abs().max()
    cases.check((hidden * scale).to(dtype), weight.to(dtype), target, None, impl="tiled", train_head=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases.CASES)
def test_case(small_tiles, case, dtype):
    case("tiled", dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_the_truth_ignores_what_is_ignored(dtype):
    cases.check_ignored("reference", dtype)


def test_poisoned_memory_with_a_trainable_head(small_tiles):
    cases.check_poisoned_and_equal_bits("tiled", torch.float32, train_head=True)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6])
@pytest.mark.parametrize("v", [1, 7, 12, 13, 14, 257])
def test_ragged_sizes(small_tiles, n, v):
    # Tiles are 5 x 13: one below, at and above each edge; odd D.
    hidden, weight, target, bias = cases.problem(n, 11, v)
    cases.check(hidden, weight, target, bias, impl="tiled", train_head=True, stats=n > 0)


def test_targets_at_tile_edges(small_tiles):
    hidden, weight, _, bias = cases.problem(8, 24, 57)
    cases.check(hidden, weight, torch.tensor([0, 12, 13, 25, 26, 51, 52, 56]), bias, impl="tiled", train_head=True)


def test_many_tokens_and_a_real_vocabulary():
    hidden, weight, target, _ = cases.problem(70_000, 3, 7, torch.float32, bias=False)
    cases.check(hidden, weight, target, None, impl="tiled")
    hidden, weight, target, _ = cases.problem(3, 9, 151_936, torch.float32, bias=False)
    target[-1] = 151_935
    cases.check(hidden, weight, target, None, impl="tiled")


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS)
def test_gradcheck(small_tiles, options, train_head):
    hidden, weight, target, bias = cases.problem(6, 5, 17)
    target[2] = -100
    leaves = (hidden.requires_grad_(), weight.requires_grad_(train_head), bias.requires_grad_(train_head))
    assert torch.autograd.gradcheck(lambda h, w, b: linear_logprob(h, w, target, b, impl="tiled", **options), leaves)


@pytest.mark.parametrize("train_head", [False, True])
def test_backward_twice_gives_the_same_gradient(small_tiles, train_head):
    hidden, weight, target, _ = cases.problem(bias=False)
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    logps = linear_logprob(hidden, weight, target, impl="tiled")
    first = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)[0]
    second = torch.autograd.grad((2 * logps).sum(), hidden)[0]
    torch.testing.assert_close(second, 2 * first)


def test_any_loss_of_the_logprobs(small_tiles):
    # The stored gradient does not know the loss: a pairwise sigmoid loss over two responses must come out as by
    # autograd.
    hidden, weight, target, _ = cases.problem(16, bias=False)
    grads = []
    for impl in ("tiled", "reference"):
        leaf = hidden.clone().requires_grad_()
        logps = linear_logprob(leaf, weight, target, impl=impl)
        loss = -torch.nn.functional.logsigmoid(0.3 * (logps[:9].sum() - logps[9:].sum())) + logps[:9].exp().mean()
        grads.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("train_head", [False, True])
def test_autocast_is_a_cast_of_the_operands(small_tiles, train_head):
    hidden, weight, target, _ = cases.problem(dtype=torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = cases.run(hidden, weight, target, None, impl="tiled", train_head=train_head)
    plain = cases.run(hidden.bfloat16(), weight.bfloat16(), target, None, impl="tiled", train_head=train_head)
    assert torch.equal(found.logps, plain.logps) and found.logps.dtype == torch.float32
    for ours, cast in zip(found.grads, plain.grads, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, cast.float())


def test_operations_counted():
    """2NVD without a gradient, 4NVD with a frozen head and none in backward, 8NVD with a trainable head."""
    n, d, v = 40, 16, 90
    hidden, weight, target, _ = cases.problem(n, d, v, torch.float32, bias=False)
    unit = n * v * d

    def flops(action) -> float:
        with FlopCounterMode(display=False) as counter:
            action()
        return counter.get_total_flops() / unit

    leaf = hidden.requires_grad_()
    with torch.no_grad():
        assert flops(lambda: linear_logprob(leaf, weight, target, impl="tiled")) == 2
    kept = []
    assert flops(lambda: kept.append(linear_logprob(leaf, weight, target, impl="tiled"))) == 4
    assert flops(lambda: kept[0].sum().backward()) == 0
    weight.requires_grad_()
    assert flops(lambda: linear_logprob(leaf, weight, target, impl="tiled").sum().backward()) == 8


def test_largest_array_is_a_tile(small_tiles):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                # Views of the inputs (a weight slice transposed) hold nothing.
                if isinstance(tensor, torch.Tensor) and tensor._base is None and tensor.data_ptr() not in inputs:
                    self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    hidden, weight, target, _ = cases.problem(60, 4, 500, torch.float32, bias=False)
    inputs = {hidden.data_ptr(), weight.data_ptr(), *(weight[i].data_ptr() for i in range(500))}
    with Largest() as largest:
        leaf = hidden.requires_grad_()
        linear_logprob(leaf, weight, target, impl="tiled", return_stats=True)[0].sum().backward()
    assert largest.numel <= 60 * 4, largest.numel  # the gradient [N, D]; a tile is 5 x 13, the logits would be 30,000
