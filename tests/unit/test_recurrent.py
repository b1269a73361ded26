"""Plans of recurrent layers, on trees of any depth, with a mixer small enough to be written down."""

import itertools
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from silkie import SilkieDPOConfig
from silkie.batch.companies import Company
from silkie.batch.packing import Segment, lineage
from silkie.model.layout import LayoutChoice, rows_choice
from silkie.model.recurrent import CALLS, SHARED_CALLS, Calls, fork_plan, layers
from silkie.model.recurrent.calls import buckets, choose_calls, padding
from silkie.model.recurrent.fork import forked
from silkie.training import recurrent_calls
from tests.unit.test_packing import TREE, build, pack, tree

CPU = torch.device("cpu")


class Mixer(nn.Module):
    """A gated recurrence behind a causal convolution, both of whose inputs have a bias, and which padding decays."""

    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.gate = nn.Linear(width, width).double(), nn.Linear(width, width).double()
        self.taps = nn.Parameter(torch.randn(3, width, dtype=torch.float64))
        self.calls = []

    def forward(self, hidden_states, attention_mask=None, cache_params=None):
        self.calls.append(tuple(hidden_states.shape[:2]))
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None]
        x, state = self.into(hidden_states).transpose(1, 2), None
        if cache_params is not None:
            state = cache_params.get_recurrent_state(0)
            x = cache_params.update_conv_state(x, 0, conv_kernel_size=3)
        x = nn.functional.pad(x, (2, 0)).unfold(2, 3, 1)  # [S, C, L, 3]
        x = torch.einsum("sclw,wc->slc", x, self.taps)[:, -hidden_states.shape[1] :]
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        keep, out = torch.sigmoid(self.gate(hidden_states)), []
        state = torch.zeros_like(x[:, 0]) if state is None else state
        for step in range(x.shape[1]):
            state = keep[:, step] * state + x[:, step]
            out.append(torch.tanh(state))
        if cache_params is not None:
            cache_params.update_recurrent_state(state, 0)
        return torch.stack(out, 1)


def along_the_plan(mixer, hidden, plan):
    return forked(lambda rows, mask, states: mixer(rows, attention_mask=mask, cache_params=states), hidden, plan)


def alone(mixer, hidden, segments):
    """Every segment behind its ancestors, as a sequence of its own; padding is zero."""
    out = torch.zeros_like(hidden)
    for n, s in enumerate(segments):
        if not s.padding:
            path = torch.cat([hidden[None, s.row, a.start : a.end] for a in lineage(segments, n)], 1)
            out = out.clone()
            out[s.row, s.start : s.end] = mixer(path)[0, -s.length :]
    return out


def compare(segments, rows, length, calls):
    mixer = Mixer()
    hidden = torch.randn(rows, length, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mix, results = torch.randn(hidden.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)), []
    for run in (
        lambda x: along_the_plan(mixer, x, fork_plan(segments, length, CPU, calls=calls)),
        lambda x: alone(mixer, x, segments),
    ):
        mixer.zero_grad()
        mixer.calls.clear()
        x = hidden.clone().requires_grad_()
        out = run(x)
        (out * mix).sum().backward()
        results.append((out.detach(), x.grad, *(p.grad.clone() for p in mixer.parameters()), list(mixer.calls)))
    found, truth = results
    assert len(found[-1]) == calls.total
    for a, b in zip(found[:-1], truth[:-1], strict=True):
        assert (a - b).abs().max() < 1e-12
    return found[-1]


SIZES = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([1, 2, None]))
def test_two_calls_equal_every_response_alone(sizes, per_row):
    batch = pack(build(sizes), "packed", pad_id=0, groups_per_row=per_row)
    calls = compare(batch.segments, *batch.input_ids.shape, calls=CALLS)
    assert calls[0][0] == len(sizes) and calls[1][0] == sum(len(responses) for _, responses in sizes)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from([1, None]), st.integers(1, 3), st.integers(1, 4))
def test_any_number_of_calls_equals_every_response_alone(sizes, per_row, roots, leaves):
    """More calls than rows among them: those are made all the same."""
    batch = pack(build(sizes), "packed", pad_id=0, groups_per_row=per_row)
    compare(batch.segments, *batch.input_ids.shape, calls=Calls(roots=roots, leaves=leaves))


def planted(lengths):
    """Segments of one row from (length, parent)."""
    found, at = [], 0
    for length, parent in lengths:
        found.append(Segment(0, at, at + length, parent))
        at += length
    return found, at


@pytest.mark.parametrize(
    "lengths",
    [
        TREE[:-1],
        [(4, None), (5, 0), (2, 1), (2, 1), (5, 0), (3, 4)],  # questions of one length
        [(4, None), (1, 0), (2, 1), (3, 1), (6, 0), (2, 4)],  # one too short for a row of its own
        [(3, None), (2, 0)],  # nothing between prompt and response
        [(3, None), (4, 0), (2, 1), (5, 0), (6, None), (2, 4), (1, 5)],
    ],
)
def test_a_tree_of_depth_three_takes_three_calls(lengths):
    segments, length = planted(lengths)
    compare(segments, 1, length, calls=SHARED_CALLS)
    compare(segments, 1, length, calls=Calls(roots=2, between=1, leaves=3))


def test_padding_gets_zero_and_a_tree_deeper_than_the_calls_is_refused():
    segments, *_ = tree()
    compare(segments, 1, 24, calls=SHARED_CALLS)
    with pytest.raises(ValueError, match="deeper than the 2 levels"):
        fork_plan(segments, 24, CPU)


def test_inner_segments_are_cut_to_the_shortest_and_their_children_run_the_rest():
    segments, length = planted([(4, None), (5, 0), (2, 1), (3, 0), (2, 3)])
    plan = fork_plan(segments, length, CPU, calls=SHARED_CALLS)
    assert [call.tokens.tolist() for call in plan.calls] == [
        [[0, 1, 2, 3]],
        [[4, 5, 6], [11, 12, 13]],
        [[7, 8, 9, 10], [14, 15, 0, 0]],
    ]
    assert [None if c.parent is None else c.parent.tolist() for c in plan.calls] == [None, [0, 0], [1, 2]]
    assert plan.calls[1].mask is None


def test_a_plan_asks_the_device_for_nothing_and_needs_a_mask_for_unequal_prompts_only():
    equal = pack(build([(3, [1, 2]), (3, [4])]), "packed", pad_id=0, groups_per_row=None)
    plan = fork_plan(equal.segments, equal.input_ids.shape[1], torch.device("meta"))
    assert all(call.tokens.is_meta and call.mask is None for call in plan.calls) and plan.places.is_meta
    unequal = pack(build([(3, [1]), (2, [1])]), "packed", pad_id=0)
    first, second = fork_plan(unequal.segments, unequal.input_ids.shape[1], CPU).calls
    assert first.mask.tolist() == [[True] * 3, [False, True, True]] and second.mask is None
    assert second.tokens.shape == (2, 2)  # one token would be taken for a step of generation


# -- how many calls


def padded(parts, lengths):
    return sum(len(part) * max(lengths[n] for n in part) for part in parts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4))
def test_buckets_pad_as_little_as_any_partition(lengths, count):
    parts = buckets(lengths, count)
    assert sorted(n for part in parts for n in part) == list(range(len(lengths)))
    assert all(parts) and len(parts) <= count
    every = itertools.product(range(count), repeat=len(lengths))
    ways = ([[n for n, b in enumerate(way) if b == bucket] for bucket in range(count)] for way in every)
    assert padded(parts, lengths) == min(padded(filter(None, way), lengths) for way in ways)


def test_the_fewest_calls_are_taken_that_pad_little():
    lengths = [30, 60, 120, 270]
    assert [round(padding([lengths], count), 2) for count in (1, 2, 3, 4)] == [0.56, 0.24, 0.06, 0.0]
    calls, told = choose_calls(CALLS, [([600, 700], lengths)] * 3, 2)
    assert calls == Calls(roots=1, leaves=3)
    assert told == "prompts in 1 call, 7% padding; responses in 3 calls, 6% padding (in one: 56%)"
    assert choose_calls(SHARED_CALLS, [([100, 900], [8, 8])], 2)[0] == Calls(roots=2, between=1, leaves=1)
    # responses of one length need one call, and a call without rows is padding too
    assert choose_calls(CALLS, [([9], [120] * 4)], 2)[0] == CALLS
    assert padding([[1, 1]], 2, 2) == pytest.approx(1 - 2 / 6)


class WithoutMask(nn.Module):
    def forward(self, hidden_states, past_key_values=None):
        return past_key_values.update_conv_state(hidden_states, 0)


class Hidden(nn.Module):
    """Keeps a state in a method of its own, as Qwen4's embedding of n-grams does."""

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        return self._short_conv(hidden_states, past_key_values)

    def _short_conv(self, x, cache):
        return cache.update_conv_state(x, 0)


def test_modules_that_keep_states_are_found_and_those_that_cannot_be_run_apart_named():
    assert layers.keeps_states(Mixer) and layers.keeps_states(WithoutMask) and layers.keeps_states(Hidden)
    assert not layers.keeps_states(nn.Linear)
    assert [name for name, _ in layers.mixers(nn.Sequential(nn.Linear(2, 2), Mixer(), Hidden()))] == ["1", "2"]
    with pytest.raises(ValueError, match="WithoutMask keeps states along a row.*does not take attention_mask"):
        layers.mixers(nn.Sequential(WithoutMask()))


def test_transformers_names_its_recurrent_layers_by_their_mask_function():
    """The assumption behind `mask_kinds`: which layers are recurrent is in transformers' table of mask functions."""
    from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_recurrent_attention_mask

    table = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    recurrent = {kind for kind, function in table.items() if function is create_recurrent_attention_mask}
    assert {"linear_attention", "conv"} <= recurrent, (
        "transformers no longer lists recurrent layers in masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING:"
        " silkie.model.recurrent.layers must learn to ask it in another way"
    )
    assert table["hybrid"]["linear_attention"] is create_recurrent_attention_mask


def test_a_run_settles_its_calls_from_its_own_batches(monkeypatch):
    """The same on every rank: nothing of a rank's own is asked."""
    monkeypatch.setattr(recurrent_calls, "count_recurrent", lambda config: 3)
    lengths = [[30, 60, 120, 270], [20, 25, 250, 260]] * 4
    data = Dataset.from_dict({"prompt_length": [700] * 8, "response_lengths": lengths})
    args = SilkieDPOConfig(output_dir="unused", use_cpu=True, bf16=False, per_device_train_batch_size=2, seed=3)
    packed = LayoutChoice(layout="packed", reason="", backend="sdpa", backend_reason="", groups_per_row=1)
    choice = recurrent_calls.settle(packed, None, args, data, [])
    assert choice.calls == Calls(leaves=3)
    assert "prompts in 1 call, 0% padding; responses in 3 calls" in choice.lines()[-1]
    # prompts of one company share a stem; one is left behind by an odd batch
    shared = replace(packed, shares_prefix=True)
    choice = recurrent_calls.settle(shared, None, args, data, [Company((0, 1), 600), Company((2, 3, 4), 650)])
    assert choice.calls.between == 1 and choice.calls.leaves >= 3
    assert recurrent_calls.settle(rows_choice("asked for"), None, args, data, []).calls_reason == ""
    monkeypatch.setattr(recurrent_calls, "count_recurrent", lambda config: 0)
    assert recurrent_calls.settle(packed, None, args, data, []) == packed
