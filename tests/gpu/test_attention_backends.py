"""FlexAttention and varlen attention for real: as close to float64 as the model's own attention on separate rows is."""

import pytest
import torch

from silkie.model.attention import probe, why_not_available
from tests.support.scoring import collate, gradients, groups, score, with_lora
from tests.support.tiny import tiny_model, tiny_processor

pytestmark = pytest.mark.gpu
FAMILY = "qwen2_5_vl"


def build(dtype):
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 6, 6],
    }  # heads of 32: the kernels want 16 or more
    model = tiny_model(FAMILY, hidden=128, layers=3, rope_parameters=rope)
    with torch.no_grad():
        for parameter in model.parameters():  # undo the spread of the tiny model; it would drown bf16 in noise
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    return with_lora(model).to("cuda", dtype).train()


def on_cuda(batch):
    def move(value):
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return move(batch)


def run(dtype, layout, backend):
    model, processor = build(dtype), tiny_processor(FAMILY)
    rows = groups(FAMILY) * 8  # 24 groups, 72 responses: many blocks, all in one row
    batch = on_cuda(collate(model, processor, rows, layout, None if backend in ("flex", "varlen") else 1))
    scores = score(model, processor, rows, layout, backend, batch=batch)
    return scores.logps.detach().double(), {n: g.double() for n, g in gradients(model, scores.logps).items()}


@pytest.fixture(scope="module")
def truth():
    return run(torch.float64, "rows", "sdpa")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["sdpa", "segments", "flex", "varlen"])
def test_packed_backends_are_as_exact_as_separate_rows(truth, backend, dtype):
    if backend == "varlen":
        if dtype is torch.float32:
            pytest.skip("flash kernels compute in half precision only")
        if reason := why_not_available("varlen", build(dtype).config, torch.device("cuda")):
            pytest.skip(reason)
    stock_logps, stock_gradients = run(dtype, "rows", "sdpa")
    logps, found = run(dtype, "packed", backend)
    noise = (stock_logps - truth[0]).abs().max()
    assert noise > 0
    assert (logps - truth[0]).abs().max() <= 2 * noise + 1e-4

    def error(gradients):
        return torch.stack([(gradients[n] - truth[1][n]).norm() for n in truth[1]]).norm()

    size = torch.stack([g.norm() for g in truth[1].values()]).norm()
    assert error(found) <= 2 * error(stock_gradients) + 1e-6 * size
    assert error(found) < 0.1 * size


def test_a_wrong_block_mask_shows(truth):
    """Negative control: with siblings visible the numbers leave the noise."""
    model, processor = build(torch.float32), tiny_processor(FAMILY)
    rows = groups(FAMILY) * 8
    batch = on_cuda(collate(model, processor, rows, "packed", None))
    same = batch["segment_ids"] >= 1
    batch["subtree_end"] = torch.where(same, len(batch["segments"]), batch["subtree_end"])
    batch["logical_positions"] = torch.where(
        same, torch.arange(same.shape[1], device="cuda")[None], batch["logical_positions"]
    )
    with torch.no_grad():
        wrong = score(model, processor, rows, "packed", "flex", batch=batch).logps.double()
    assert (wrong - truth[0]).abs().max() > 0.1


def test_the_trial_at_start_up_runs_every_backend_that_is_there(monkeypatch):
    """What it takes depends on the machine; what it says of a backend is a figure, not an error."""
    monkeypatch.setattr(probe, "_WORTHWHILE", 1e-9)  # no backend is fast enough, so that all are tried
    config, device = build(torch.bfloat16).config, torch.device("cuda")
    sizes = probe.sizes_of(config, [(300, [60, 80, 40]), (500, [120, 30])], torch.bfloat16)
    backend, why = probe.fastest(config, sizes, device)
    assert backend == "sdpa" and "flex takes" in why
    assert ("varlen takes" in why) is (why_not_available("varlen", config, device) is None)
