"""Backends: what they make of a batch, and the errors of those that cannot run."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from silkie.batch.packing import visible
from silkie.model.attention import IMPLEMENTATIONS, Attention, flex, own_masks, segments, varlen, why_not_available
from tests.support.families import family_model
from tests.support.tiny import tiny_model
from tests.unit.test_packing import build, pack, tree

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def batch(per_row=None, sizes=((5, [3, 2, 4]), (3, [1, 2]), (4, [2, 2]))):
    packed = pack(build(sizes), "packed", pad_id=0, groups_per_row=per_row)
    names = ("segment_ids", "segment_index", "subtree_end", "logical_positions", "segments")
    return {name: getattr(packed, name) for name in names}


def deep_batch():
    """A tree of depth three in one row."""
    found, index, end, logical = tree()
    ids = torch.where(end == 0, -1, 0)
    return {
        "segment_ids": ids,
        "segment_index": index,
        "subtree_end": end,
        "logical_positions": logical,
        "segments": found,
    }


def causal(one, window=None):
    """A causal or sliding rule, as transformers hands it to a mask function."""
    b, t = one["segment_ids"].shape
    return {
        "batch_size": b,
        "q_length": t,
        "kv_length": t,
        "mask_function": causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        "allow_is_causal_skip": True,
        "local_size": window,
        "config": SimpleNamespace(),
        "device": one["segment_ids"].device,
    }


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("per_row", [1, 2, None, "tree"])
def test_segments_and_blocks_compute_what_the_dense_mask_says(window, per_row, monkeypatch):
    monkeypatch.setattr(segments, "BLOCK", 2)  # so that segments take several
    one = deep_batch() if per_row == "tree" else batch(per_row)
    b, t = one["segment_ids"].shape
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(b, 4, t, 8).double(),
        torch.randn(b, 2, t, 8).double(),
        torch.randn(b, 2, t, 8).double(),
    )
    mask = visible(one["segment_index"], one["subtree_end"], one["logical_positions"], window=window)
    truth = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    plan = varlen.segment_plan(one["segments"], t, CPU, window=window)
    blocks = flex.block_mask(one["segment_index"], one["subtree_end"], one["logical_positions"], window=window)
    module = torch.nn.Identity()
    real = (one["segment_ids"] >= 0)[..., None, None]  # varlen lets the padding of a row see itself as a sequence
    spans = segments.segment_mask(one["segments"], CPU, window=window)
    for attend, plan_or_blocks in ((varlen.attention, plan), (flex.attention, blocks), (segments.attention, spans)):
        found, _ = attend(module, query, key, value, plan_or_blocks)
        assert ((found - truth) * real).abs().max() < 1e-12


def test_a_plan_gathers_the_prompt_and_the_own_keys():
    plan = varlen.segment_plan(batch(None, ((2, [1, 1]), (1, [1])))["segments"], 6, CPU)
    assert plan.as_subclass(torch.Tensor).flatten().tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 4, 5]
    assert plan.cu_queries.tolist() == [0, 2, 3, 4, 5, 6] and plan.cu_keys.tolist() == [0, 2, 5, 8, 9, 11]
    assert (plan.longest_query, plan.longest_key) == (2, 3)


@pytest.mark.parametrize("window", [None, 40])
def test_blocks_are_those_that_pytorch_makes_of_the_rule(window, monkeypatch):
    monkeypatch.setattr(flex, "_QUERIES", 256)  # so that a row takes several turns
    one = batch(2, ((300, [150, 30, 2]), (3, [1]), (130, [128, 128])))
    b, t = one["segment_ids"].shape
    two_way = torch.where(one["logical_positions"] < 140, 0, -1).masked_fill(one["segment_ids"] != 0, -1)
    found = flex.block_mask(
        one["segment_index"], one["subtree_end"], one["logical_positions"], window=window, bidirectional=two_way
    )
    expected = create_block_mask(found.mask_mod, b, None, t, t, device="cpu")
    assert found.shape == expected.shape and (window is not None or expected.full_kv_num_blocks.sum() > 0)
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_plans_and_blocks_ask_the_device_for_nothing(monkeypatch):
    """Meta tensors hold no numbers: whatever would wait for the device to read one fails on them."""
    monkeypatch.setattr(segments, "SHORTEST_ROW", 0)
    one = batch()
    on_meta = {name: value.to("meta") if torch.is_tensor(value) else value for name, value in one.items()}
    for backend in ("sdpa", "segments", "flex", "varlen"):
        for window in (None, 3):
            attention = Attention(backend=backend, layout="packed")
            if backend == "sdpa":
                rule = causal(on_meta, window)
                own_masks._dense(rule, on_meta)
            else:
                assert own_masks._plain_rule(causal(on_meta, window)) == (window, None)
                attention.build("a model", dict(on_meta), window, None)


def test_flex_refuses_gradients_on_the_cpu_instead_of_losing_them():
    one = batch()
    t = one["segment_ids"].shape[1]
    query = torch.randn(1, 2, t, 8, requires_grad=True)
    blocks = flex.block_mask(one["segment_index"], one["subtree_end"], one["logical_positions"])
    with pytest.raises(RuntimeError, match="no backward pass on the CPU"):
        flex.attention(torch.nn.Identity(), query, query, query, blocks)


@pytest.mark.parametrize("block", [2, 128])
def test_gradients_by_segment_are_those_of_the_dense_mask(block, monkeypatch):
    monkeypatch.setattr(segments, "BLOCK", block)
    one = batch(1)
    b, t = one["segment_ids"].shape
    torch.manual_seed(0)
    inputs = [torch.randn(b, heads, t, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(b, t, 4, 8, dtype=torch.float64) * (one["segment_ids"] >= 0)[..., None, None]
    mask = visible(one["segment_index"], one["subtree_end"], one["logical_positions"])
    truth = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    found, _ = segments.attention(torch.nn.Identity(), *inputs, segments.segment_mask(one["segments"], CPU))
    for expected, own in zip(
        *(torch.autograd.grad((out * weights).sum(), inputs) for out in (truth, found)), strict=True
    ):
        assert (expected - own).abs().max() < 1e-12


def test_segments_cover_every_token_once_and_short_rows_keep_the_dense_mask(monkeypatch):
    one, attention = batch(2), Attention(backend="segments", layout="packed")
    b, t = one["segment_ids"].shape
    found = one["segments"]
    assert [s.row * t + n for s in found for n in range(s.start, s.end)] == list(range(b * t))
    assert attention.build("a model", one, None, None).dtype is torch.bool
    monkeypatch.setattr(segments, "SHORTEST_ROW", t)
    assert attention.build("a model", one, None, None).segments == found


@pytest.mark.parametrize("option", [{"softcap": 30.0}, {"dropout": 0.1}])
def test_varlen_refuses_what_it_cannot_do(option):
    one = batch()
    query = torch.randn(1, 2, one["segment_ids"].shape[1], 8)
    plan = varlen.segment_plan(one["segments"], one["segment_ids"].shape[1], CPU)
    with pytest.raises(ValueError, match=next(iter(option))):
        varlen.attention(torch.nn.Identity(), query, query, query, plan, **option)


def test_eager_masks_are_float_and_sdpa_masks_boolean():
    one = batch(1)
    dense = own_masks._dense(causal(one), one)
    added = own_masks.added(dense, torch.float32)
    assert dense.dtype is torch.bool and added.dtype is torch.float32
    assert ((added == 0) == dense).all() and added.min() < -1e30


@pytest.mark.parametrize("window", [None, 3])
def test_a_causal_rule_becomes_the_mask_of_packed_rows(window):
    one = batch(1)
    expected = visible(one["segment_index"], one["subtree_end"], one["logical_positions"], window=window)
    assert torch.equal(own_masks._dense(causal(one, window), one), expected)


def test_chunks_start_again_in_every_response():
    """Chunks of 4 tokens; prompts of 5, 3 and 4: a response's chunk counts its prompt, not its siblings."""
    one = batch(1)
    rule = causal(one) | {"mask_function": chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long))}
    rule |= {"local_size": 4, "config": SimpleNamespace(attention_chunk_size=4)}
    mask, place = own_masks._dense(rule, one), one["logical_positions"]
    plain = visible(one["segment_index"], one["subtree_end"], place)
    same = (place[:, :, None] // 4 == place[:, None, :] // 4)[:, None]
    real = (one["segment_ids"] >= 0)[:, None, :, None]
    assert torch.equal(mask & real, plain & same & real) and not torch.equal(mask & real, plain & real)
    assert own_masks._plain_rule(rule) is None


@pytest.mark.parametrize("window", [None, 3])
def test_blocks_and_a_window_are_found_by_asking_the_rule(window):
    blocks = torch.tensor([[-1, 0, 0, 1, 1, 1, -1, -1, -1, -1]])
    see = or_masks(causal_mask_function, blockwise_overlay(blocks))
    see = see if window is None else and_masks(see, sliding_window_overlay(window))
    rule = {"mask_function": see, "allow_is_causal_skip": False, "batch_size": 1, "q_length": 10, "device": CPU}
    found, two_way = own_masks._plain_rule(rule | {"config": SimpleNamespace()})
    assert found == window and two_way.tolist() == [[-1, 1, 1, 2, 2, 2, -1, -1, -1, -1]]


def test_the_reference_pass_reuses_the_plan_of_the_policy_pass():
    one, attention = batch(), Attention(backend="varlen", layout="packed")
    assert attention.build("a model", one, None, None) is attention.build("a model", one, None, None)


def test_varlen_refuses_tokens_that_see_each_other():
    with pytest.raises(ValueError, match="gemma3 attends in both directions"):
        Attention(backend="varlen", layout="packed").build("gemma3", batch(), None, torch.zeros(1, 1))


@pytest.mark.parametrize("backend", ["segments", "flex", "varlen"])
def test_generation_and_rows_work_whatever_backend_is_set(backend):
    """Padding on the left and a plain 2-D mask, as `generate` passes it."""
    model = tiny_model()
    ids = torch.randint(8, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        truth = model(input_ids=ids, attention_mask=mask).logits
        model.set_attn_implementation({"text_config": IMPLEMENTATIONS[backend]})
        assert model.config.vision_config._attn_implementation == "sdpa"
        assert (model(input_ids=ids, attention_mask=mask).logits - truth)[mask.bool()].abs().max() < 1e-5


def test_why_not_available(monkeypatch):
    qwen, gemma = tiny_model().config, family_model("gemma3").config
    assert why_not_available("sdpa", qwen, CPU) is None
    assert "needs a CUDA device, this run is on cpu" in why_not_available("flex", qwen, CPU)
    assert why_not_available("flex", gemma, CUDA) is None
    assert why_not_available("segments", qwen, CPU) is None and why_not_available("segments", gemma, CPU) is None
    monkeypatch.setattr(varlen, "_flash_attn_installed", lambda: False)
    monkeypatch.setattr(varlen, "_torch_has_varlen", lambda: False)
    assert "pip install flash-attn" in why_not_available("varlen", qwen, CUDA)
    monkeypatch.setattr(varlen, "_flash_attn_installed", lambda: True)
    assert why_not_available("varlen", qwen, CUDA) is None
