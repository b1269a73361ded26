"""The log-prob core on a CUDA device: the numerics cases, large shapes, memory, no host synchronisation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "numerics"))
import logprob_cases as cases

from silkie.logprob import linear_logprob

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"logit_scale": 2.0}]
IMPLS = ["triton", "tiled"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_gradients_and_statistics(impl, dtype, options, train_head):
    hidden, weight, target, bias = cases.problem(300, 264, 15_000, dtype, device="cuda")
    target[3] = -100
    cases.check(hidden, weight, target, bias, impl=impl, train_head=train_head, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases.CASES)
def test_case(impl, case, dtype):
    case(impl, dtype, "cuda")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train_head", [False, True])
def test_extreme_logprobs(impl, dtype, train_head):
    cases.check(*cases.extreme_rows(dtype, "cuda"), impl=impl, train_head=train_head)


@pytest.mark.parametrize("impl", IMPLS)
def test_confident_rows_and_log_ratios(impl):
    cases.check_confident(impl, torch.float32, "cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert cases.log_ratio_error(impl, dtype, "cuda")[0] <= 1e-5


def test_auto_is_triton():
    hidden, weight, target, _ = cases.problem(64, 64, 999, torch.bfloat16, bias=False, device="cuda")
    assert torch.equal(linear_logprob(hidden, weight, target), linear_logprob(hidden, weight, target, impl="triton"))


@pytest.mark.parametrize("n", [1, 127, 129, 70_000])
def test_token_counts(n):
    hidden, weight, target, _ = cases.problem(n, 16, 257, torch.float32, bias=False, device="cuda")
    cases.check(hidden, weight, target, None, impl="triton")


def test_real_vocabulary_past_two_to_the_31():
    # 20,000 x 151,936 logits: row offsets pass 2^31. Checked against float64 on a few rows from both ends.
    hidden, weight, target, _ = cases.problem(20_000, 128, 151_936, torch.bfloat16, bias=False, device="cuda")
    leaf = hidden.clone().requires_grad_()
    logps = linear_logprob(leaf, weight, target, impl="triton")
    logps.sum().backward()
    rows = [0, 1, 9_999, 19_998, 19_999]
    truth_leaf = hidden[rows].double().requires_grad_()
    truth = linear_logprob(truth_leaf, weight.double(), target[rows], impl="reference")
    truth.sum().backward()
    torch.testing.assert_close(logps[rows].double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(leaf.grad[rows].double(), truth_leaf.grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("n", "train_head"), [(16_384, False), (100_000, False), (16_384, True)])
def test_workspace_stays_under_one_gigabyte(n, train_head):
    hidden, weight, target, _ = cases.problem(n, 1024, 151_936, torch.bfloat16, bias=False, device="cuda")
    leaf, head = hidden.requires_grad_(), weight.requires_grad_(train_head)
    results = 2 * hidden.nbytes + train_head * (
        hidden.nbytes + head.nbytes
    )  # gradients; hidden's is stored, or summed in fp32
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_logprob(leaf, head, target, impl="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before - results < 1e9


@pytest.mark.parametrize("train_head", [False, True])
def test_no_host_synchronisation(train_head):
    hidden, weight, target, _ = cases.problem(64, 64, 999, torch.bfloat16, bias=False, device="cuda")
    leaf, head = hidden.requires_grad_(), weight.requires_grad_(train_head)

    def step():
        logps, _ = linear_logprob(leaf, head, target, impl="triton", return_stats=True)
        logps.sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bad_target_fails_a_device_assertion():
    # In a child process: a device-side assertion ends the context.
    code = (
        "import torch; from silkie.logprob import linear_logprob\n"
        "h, w = torch.randn(4, 16, device='cuda'), torch.randn(9, 16, device='cuda')\n"
        "linear_logprob(h, w, torch.tensor([0, 1, 9, 2], device='cuda')); torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode != 0 and "assert" in done.stderr.lower()


def test_autocast():
    hidden, weight, target, _ = cases.problem(64, 64, 999, torch.float32, bias=False, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        found = linear_logprob(hidden, weight, target, impl="triton")
    assert torch.equal(found, linear_logprob(hidden.bfloat16(), weight.bfloat16(), target, impl="triton"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_the_current_one():
    hidden, weight, target, bias = cases.problem(40, 24, 999, torch.bfloat16, device="cuda:1")
    assert torch.cuda.current_device() == 0
    cases.check(hidden, weight, target, bias, impl="triton", train_head=True)
