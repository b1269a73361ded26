"""Forked recurrent layers on CUDA, with whatever kernels are installed (flash-linear-attention, causal-conv1d,
FlashQLA): as close to float64 as separate rows are, gradients included. `pytest tests/gpu/test_hybrid_cuda.py -q`."""

import pytest
import torch

from silkie.model.recurrent import CALLS, Calls, install, why_not_forkable
from tests.gpu.test_attention_backends import on_cuda
from tests.support.hybrid import qwen3_5, qwen3_5_config, unequal_groups, with_lora
from tests.support.scoring import collate, gradients, score
from tests.support.tiny import tiny_processor

pytestmark = pytest.mark.gpu
# heads of 128, as Qwen's models have: kernels want many, FlashQLA no others
WIDE = dict(hidden=128, linear_key_head_dim=128, linear_value_head_dim=128)


def run(dtype, layout, backend="sdpa", device="cuda", calls=CALLS):
    model = with_lora(qwen3_5(double=dtype is torch.float64, **WIDE))
    model.load_state_dict(with_lora(qwen3_5(double=True, **WIDE)).state_dict())  # random numbers depend on the dtype
    with torch.no_grad():
        for parameter in model.parameters():  # undo the spread of the tiny model; it would drown bf16 in noise
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    model = model.to(device, dtype).train()
    if layout == "packed":
        assert install(model) == 3
    rows = unequal_groups() * 2
    batch = collate(model, tiny_processor(), rows, layout, None if backend in ("flex", "varlen") else 1)
    batch = on_cuda(batch) if device == "cuda" else batch
    scores = score(model, tiny_processor(), rows, layout, backend, batch=batch, calls=calls)
    return scores.logps.detach().double().cpu(), {
        n: g.double().cpu() for n, g in gradients(model, scores.logps).items()
    }


@pytest.fixture(scope="module")
def truth():
    return run(torch.float64, "rows", device="cpu")  # no kernel, whichever are installed


def error(found, truth):
    size = torch.stack([g.norm() for g in truth.values()]).norm()
    return float(torch.stack([(found[n] - truth[n]).norm() for n in truth]).norm() / size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("backend", "calls"), [("sdpa", CALLS), ("flex", CALLS), ("sdpa", Calls(roots=2, leaves=3))])
def test_forked_layers_are_as_exact_as_separate_rows(truth, dtype, backend, calls):
    try:
        rows = run(dtype, "rows")
    except AssertionError as refusal:  # flash-linear-attention's gated delta rule takes half precision only
        assert dtype is torch.float32 and "float32" in str(refusal)
        pytest.skip(str(refusal))
    packed = run(dtype, "packed", backend, calls=calls)
    noise = (rows[0] - truth[0]).abs().max()
    assert noise > 0 and (packed[0] - truth[0]).abs().max() <= 2 * noise + 1e-4
    assert error(packed[1], truth[1]) <= 2 * error(rows[1], truth[1]) + 1e-5
    assert error(packed[1], truth[1]) < 0.3


def test_the_probe_accepts_the_installed_kernels():
    """Where this fails, a run goes to rows and says why: see which kernel is installed (FlashQLA goes first)."""
    assert why_not_forkable(qwen3_5_config(**WIDE), torch.device("cuda"), torch.bfloat16) is None


def test_a_plan_is_made_without_waiting_for_the_device():
    from silkie.batch.packing import Segment
    from silkie.model.recurrent import fork_plan

    segments = [Segment(0, 0, 7), Segment(0, 7, 9, 0), Segment(0, 9, 10, 0), Segment(1, 0, 3), Segment(1, 3, 10, 3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        fork_plan(segments, 10, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
