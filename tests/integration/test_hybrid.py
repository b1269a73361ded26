"""Hybrid models in the packed layout: recurrent layers start each response from the state of its prompt. Log-probs AND
gradients against separate rows, in float64 with the modelling code in float64: a detached state leaves log-probs exact.
"""

import copy
import functools
import inspect

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.batch.packing import PromptAndResponses, pack, visible
from silkie.model.attention import IMPLEMENTATIONS, Attention, segments
from silkie.model.families import causal_lm, why_not_packable
from silkie.model.recurrent import CALLS, Calls, fork, fork_plan, install, mask_kinds, why_not_forkable
from tests.support import train_run
from tests.support.data import dataset
from tests.support.hybrid import (
    BACKBONES,
    TARGETS,
    backbone,
    backbone_config,
    qwen3_5,
    remembering,
    unequal_groups,
    with_lora,
)
from tests.support.scoring import collate, gradients, score, stock_logps
from tests.support.settings import SGD
from tests.support.tiny import tiny_processor

EXACT = 1e-10
FORKABLE = [name for name in BACKBONES if name != "jamba"]


def build(checkpointing=None, **more):
    model = with_lora(qwen3_5(double=True, **more))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def measured(model, rows, layout, per_row=1, backend="sdpa", calls=None):
    batch = collate(model, tiny_processor(), rows, layout, per_row)
    # transformers does not know the patched code well enough to set it
    causal_lm(model).config.text_config._attn_implementation = IMPLEMENTATIONS[backend]
    scores = score(model, tiny_processor(), rows, layout, backend, batch=batch, fused=False, calls=calls)
    return scores.per_token_logps.detach(), gradients(model, scores.logps)


def relative(found, truth):
    """The largest difference of any gradient, relative to the largest entry of that tensor."""
    assert found.keys() == truth.keys()
    assert all(g.abs().max() > 0 for g in truth.values()), "a dead gradient proves nothing"
    return max(float((found[n] - truth[n]).abs().max() / truth[n].abs().max()) for n in truth)


@pytest.fixture(scope="module")
def truth():
    return measured(build(), unequal_groups(), "rows")


def test_separate_rows_are_the_stock_model(truth):
    model = build()
    sums = stock_logps("qwen2_vl", model, tiny_processor(), unequal_groups())
    batch = collate(model, tiny_processor(), unequal_groups(), "rows")
    table = sums.new_zeros(len(sums)).index_add(0, batch["owner"], truth[0])
    assert (table - sums).abs().max() < EXACT


@pytest.mark.parametrize("per_row", [1, 2, None])
@pytest.mark.parametrize("backend", ["sdpa", "segments"])
def test_forked_layers_equal_separate_rows(truth, per_row, backend, monkeypatch):
    monkeypatch.setattr(segments, "SHORTEST_ROW", 0)
    model = build()
    assert install(model) == 3
    logps, found = measured(model, unequal_groups(), "packed", per_row, backend)
    assert len(found) == 62
    assert (logps - truth[0]).abs().max() < EXACT and relative(found, truth[1]) < EXACT


@pytest.mark.parametrize("per_row", [1, None])
@pytest.mark.parametrize("calls", [Calls(roots=2, leaves=3), Calls(leaves=4)])
def test_more_calls_of_like_rows_change_nothing(truth, per_row, calls):
    model = build()
    install(model)
    logps, found = measured(model, unequal_groups(), "packed", per_row, calls=calls)
    assert (logps - truth[0]).abs().max() < EXACT and relative(found, truth[1]) < EXACT


@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_recomputation_forks_again(truth, checkpointing):
    model = build(checkpointing)
    install(model)
    logps, found = measured(model, unequal_groups(), "packed", calls=Calls(roots=2, leaves=3))
    assert (logps - truth[0]).abs().max() < EXACT and relative(found, truth[1]) < EXACT


def test_full_fine_tuning_gets_exact_gradients_of_every_weight():
    rows, found = unequal_groups(), []
    for layout in ("rows", "packed"):
        model = qwen3_5(double=True).train()
        if layout == "packed":
            install(model)
        found.append(measured(model, rows, layout)[1])
    alive = {n for n, g in found[0].items() if g.abs().max() > 0}
    assert any("A_log" in n for n in alive) and any("conv1d" in n for n in alive) and any("visual" in n for n in alive)
    assert relative({n: found[1][n] for n in alive}, {n: found[0][n] for n in alive}) < 1e-9


@pytest.mark.parametrize("rows", [unequal_groups()[3:], [{**unequal_groups()[2], "responses": ["yes"], "pairs": []}]])
def test_responses_of_one_token_and_a_single_response(rows):
    model, other = build(), build()
    install(model)
    (logps, found), (expected, truth) = measured(model, rows, "packed"), measured(other, rows, "rows")
    assert (logps - expected).abs().max() < EXACT and relative(found, truth) < EXACT


# -- negative controls: each of these errors must show in the numbers that the tests above compare


class Broken(fork.States):
    what = ""

    def _inherited(self, kept, state_idx):
        out = super()._inherited(kept, state_idx)
        if out is None:
            return None
        own = "convolution" if kept is self._conv else "state"
        if self.what == f"{own} not carried":
            return torch.zeros_like(out)
        if self.what == f"{own} detached":
            return out.detach()
        return out.roll(2, 0) if self.what == "state of another group" else out


@pytest.mark.parametrize(
    "what", ["state not carried", "convolution not carried", "state of another group", "no fork at all"]
)
@pytest.mark.parametrize("calls", [CALLS, Calls(roots=2, leaves=3)])
def test_a_wrong_state_shows_in_log_probs(truth, what, calls, monkeypatch):
    monkeypatch.setattr(Broken, "what", what)
    monkeypatch.setattr(fork, "States", Broken)
    if what == "no fork at all":
        monkeypatch.setattr(fork, "forked", lambda run, hidden, plan: run(hidden, None, None))
    model = build()
    install(model)
    logps, _ = measured(model, unequal_groups(), "packed", calls=calls)
    assert (logps - truth[0]).abs().max() > 0.5


@pytest.mark.parametrize("what", ["state detached", "convolution detached"])
@pytest.mark.parametrize("calls", [CALLS, Calls(roots=2, leaves=3)])
def test_a_detached_state_shows_in_gradients_only(truth, what, calls, monkeypatch):
    monkeypatch.setattr(Broken, "what", what)
    monkeypatch.setattr(fork, "States", Broken)
    model = build()
    install(model)
    logps, found = measured(model, unequal_groups(), "packed", calls=calls)
    assert (logps - truth[0]).abs().max() < EXACT
    assert relative(found, truth[1]) > 0.5


# -- what a fork leaves alone


def test_rows_generation_weights_and_copies_know_nothing_of_it():
    model, rows = build().eval(), unequal_groups()[:2]
    ids = torch.arange(8, 20)[None]

    def seen():
        with torch.no_grad():
            scores = score(model, tiny_processor(), rows, "rows", fused=False).per_token_logps
        return scores, model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)

    before, keys = seen(), list(model.state_dict())
    assert install(model) == 3 and install(model) == 3
    after = seen()
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert list(model.state_dict()) == keys
    packed = measured(model, rows, "packed")[0]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert (measured(twin, rows, "packed")[0] - packed).abs().max() > 1e-3  # bound to itself
    assert (measured(model, rows, "packed")[0] - packed).abs().max() < EXACT
    merged = model.merge_and_unload().requires_grad_(True)
    assert not any("lora" in name for name in merged.state_dict())
    assert (measured(merged, rows, "packed")[0] - packed).abs().max() < EXACT


def test_a_mixer_whose_forward_was_replaced_is_refused():
    model = qwen3_5()
    layer = model.model.language_model.layers[0].linear_attn
    layer.forward = layer.forward  # as an offloading hook does
    with pytest.raises(
        ValueError, match=r"linear_attn \(Qwen3_5GatedDeltaNet\) has a forward of its own.*layout='rows'"
    ):
        install(model)


# -- other kinds of mixers, on their text backbones


def token_group(prompt, lengths, seed, vocabulary=97):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, vocabulary, (n,), generator=generator)

    return PromptAndResponses(
        prompt_ids=ids(prompt),
        prompt_positions=torch.arange(prompt)[None],
        responses=[ids(n) for n in lengths],
    )


def scored(logits, targets):
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def weight_gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}


@pytest.mark.parametrize("name", FORKABLE)
def test_every_kind_of_mixer_equals_each_response_alone(name):
    model = backbone(name)
    groups = [token_group(21, [5, 1, 30], 1), token_group(2, [3, 9], 2), token_group(70, [1, 4], 3)]
    alone = []
    for one in groups:
        for response in one.responses:
            ids = torch.cat([one.prompt_ids, response])[None]
            alone.append(
                scored(model(input_ids=ids, use_cache=False).logits[0, len(one.prompt_ids) - 1 : -1], response)
            )
    expected = torch.cat(alone)
    truth = weight_gradients(model, expected)
    assert install(model) > 0
    p = pack(groups, "packed", pad_id=0)
    mask = visible(p.segment_index, p.subtree_end, p.logical_positions)
    plan = fork_plan(p.segments, p.input_ids.shape[1], torch.device("cpu"))
    attention, recurrent = mask_kinds(model.config)
    masks = dict.fromkeys(attention, mask) | dict.fromkeys(recurrent, plan)
    out = model(input_ids=p.input_ids, position_ids=p.position_ids[0], attention_mask=masks, use_cache=False).logits
    found = scored(out.flatten(0, 1)[p.gather], p.target)
    assert (found - expected).abs().max() < EXACT
    gradients_ = weight_gradients(model, found)
    assert gradients_.keys() == truth.keys() and relative(gradients_, truth) < 1e-6


@pytest.mark.parametrize("name", FORKABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_accepts_what_is_exact(name, dtype):
    assert why_not_forkable(backbone_config(name), torch.device("cpu"), dtype) is None


def test_the_probe_refuses_mamba_1_which_forgets_its_state():
    for dtype in (torch.float32, torch.bfloat16):
        reason = why_not_forkable(backbone_config("jamba"), torch.device("cpu"), dtype)
        assert "JambaMambaMixer does not start from the state of a prompt" in reason


@pytest.mark.parametrize("what", ["state detached", "convolution detached", "convolution not carried"])
def test_the_probe_sees_what_log_probs_do_not(what, monkeypatch):
    monkeypatch.setattr(Broken, "what", what)
    monkeypatch.setattr(fork, "States", Broken)
    assert "does not start from" in why_not_forkable(backbone_config("qwen3_5"), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_runs_the_kernels_that_the_model_has_bound(dtype, monkeypatch):
    """One whose backward pass sends nothing to its initial state, as `fused_recurrent` and a broken build would."""
    code = transformers.models.qwen3_5.modeling_qwen3_5
    rule = code.torch_chunk_gated_delta_rule
    config, device = backbone_config("qwen3_5"), torch.device("cpu")

    @functools.wraps(inspect.unwrap(rule))
    def without_gradient(*args, initial_state=None, **kwargs):
        return rule(*args, initial_state=None if initial_state is None else initial_state.detach(), **kwargs)

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", without_gradient)
    reason = why_not_forkable(config, device, dtype)
    assert "with the kernels of this run" in reason and "prompt gradients are off by" in reason
    assert code.torch_chunk_gated_delta_rule is without_gradient  # put back


def test_the_probe_takes_kernels_that_refuse_float32(monkeypatch):
    """As flash-linear-attention's gated delta rule does."""
    code = transformers.models.qwen3_5.modeling_qwen3_5
    rule = code.torch_chunk_gated_delta_rule
    config, device = backbone_config("qwen3_5"), torch.device("cpu")

    @functools.wraps(inspect.unwrap(rule))
    def half_only(query, *args, **kwargs):
        assert query.dtype != torch.float32, "does not support float32"
        return rule(query, *args, **kwargs)

    monkeypatch.setattr(code, "torch_chunk_gated_delta_rule", half_only)
    assert why_not_forkable(config, device, torch.bfloat16) is None
    assert "does not support float32" in why_not_forkable(config, device, torch.float32)


_SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
_TOWER = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
_MARKS = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
# Vision-language models around those backbones: (backbone, tower, ids of the tokens that stand for pixels).
AROUND = {
    "Lfm2Vl": ("lfm2", _SMALL, {"image_token_id": 90}),
    "Lfm3Vl": ("lfm3", _SMALL, {"image_token_id": 90}),
    "Qwen3_5Moe": ("qwen3_5_moe", _TOWER, _MARKS),
    "MiniCPMV4_6": ("qwen3_5", _SMALL, {"image_token_id": 90, "video_token_id": 91}),
    "MiniCPMV4_7": ("qwen3_5", _SMALL, {"image_token_id": 90, "video_token_id": 91}),
}


@pytest.mark.parametrize("name", AROUND)
def test_vision_language_models_hand_the_plan_through_to_their_mixers(name):
    text, vision, ids = AROUND[name]
    text_config = backbone_config(text).to_dict()
    config = getattr(transformers, name + "Config")(text_config=text_config, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForConditionalGeneration")(config).train()
    remembering(model.get_decoder(), 3.0)
    assert why_not_packable(model.config) is None and install(model) == 3
    groups, found = [token_group(21, [5, 1, 30], 1, 90), token_group(2, [3, 9], 2, 90)], []
    for layout in ("rows", "packed"):
        p = pack(groups, layout, pad_id=0)
        batch = {n: getattr(p, n) for n in ("input_ids", "segment_ids", "segment_index", "subtree_end")}
        batch |= {"logical_positions": p.logical_positions, "segments": p.segments}
        attention = Attention(backend="sdpa", layout=layout)
        positions = p.position_ids.expand(3, -1, -1) if "Qwen" in name else p.position_ids[0]
        with attention.masks(model, batch):
            logits = model(
                input_ids=p.input_ids, position_ids=positions, use_cache=False, **attention.inputs(batch)
            ).logits
        logps = scored(logits.flatten(0, 1)[p.gather], p.target)
        found.append(
            (logps.detach(), {n: g for n, g in weight_gradients(model, logps).items() if g.abs().max() > 1e-3})
        )
    (expected, truth), (logps, gradients_) = found
    assert (logps - expected).abs().max() < 1e-5
    assert len(truth) > 20 and relative({n: gradients_[n] for n in truth}, truth) < 1e-3


# -- through the trainer


def trained(tmp_path, layout, model=None, **options):
    """Losses and adapter after two epochs of SGD."""
    torch.manual_seed(0)
    arguments = dict(
        output_dir=str(tmp_path / layout),
        per_device_train_batch_size=2,
        **SGD,
    )
    trainer = SilkieDPOTrainer(
        model if model is not None else qwen3_5(double=True),
        args=SilkieDPOConfig(**{**arguments, "layout": layout, **options}),
        train_dataset=dataset(unequal_groups()),
        processing_class=tiny_processor(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS),
    )
    trainer.train()
    assert trainer.choice.layout == layout
    if layout == "packed":  # their lengths want it
        assert trainer.choice.calls.leaves > 1 and "padding (in one: " in trainer.choice.calls_reason
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"precompute_ref_log_probs": True},
        {"loss_type": ["sigmoid", "mdpo_image", "mdpo_anchor"]},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
    ],
    ids=["checkpointing", "reentrant", "precomputed", "mdpo", "accumulated"],
)
def test_the_trainer_reaches_the_weights_of_separate_rows(tmp_path, options):
    rows = {k: v for k, v in options.items() if "checkpointing" not in k}
    (losses, weights), (expected, truth) = trained(tmp_path, "packed", **options), trained(tmp_path, "rows", **rows)
    assert len(losses) == 4 and max(abs(loss - expected[0]) for loss in losses[1:]) > 1e-3  # it trained
    assert losses == pytest.approx(expected, abs=1e-6)
    start = trained(tmp_path, "rows", **{**rows, "learning_rate": 0.0})[1]
    for name in truth:
        moved = (truth[name] - start[name]).abs().max()
        assert moved > 0 and (weights[name] - truth[name]).abs().max() < 1e-5 * moved, name


def test_a_fork_costs_what_a_plain_row_of_as_many_tokens_does():
    """Counted FLOPs, forward and backward, at equal lengths: every token once."""
    model = qwen3_5().train()
    install(model)
    text = model.model.language_model
    p = pack([token_group(256, [64] * 4, 1)], "packed", pad_id=0)
    mask = visible(p.segment_index, p.subtree_end, p.logical_positions)
    plan = fork_plan(p.segments, p.input_ids.shape[1], torch.device("cpu"))
    counted = []
    for recurrent in (None, plan):
        with FlopCounterMode(display=False) as flops:
            out = text(
                input_ids=p.input_ids % 40,
                position_ids=p.position_ids.expand(3, -1, -1),
                attention_mask={"full_attention": mask, "linear_attention": recurrent},
                use_cache=False,
            )
            out.last_hidden_state.sum().backward()
        counted.append(flops.get_total_flops())
    assert counted[1] == pytest.approx(counted[0], rel=0.03)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("trees", [False, True])
def test_a_quantised_hybrid_forks_as_its_own_rows_do(tmp_path, trees, monkeypatch):
    """NF4 base weights, whose products are rounded to bf16, otherwise for every shape: near, and far from what a
    detached state makes of it. With trees, the truth is the same batches, each group by itself."""
    qwen3_5().save_pretrained(tmp_path / "base")
    shared = {"share_prefix": "image", "per_device_train_batch_size": 3}

    def run(name):
        layout = "rows" if name == "alone" and not trees else "packed"
        spec = {
            "out": str(tmp_path / name),
            "model": str(tmp_path / "base"),
            "family": "qwen3_5",
            "data": "albums" if trees else "unequal",
            "bits": 4,
            "args": {"layout": layout, "num_train_epochs": 2, "per_device_train_batch_size": 2},
        }
        spec["args"] |= shared if trees else {}
        trainer = train_run.make(spec, {"use_cpu": True})
        mixer = causal_lm(trainer.model).model.language_model.layers[0].linear_attn
        assert type(mixer.in_proj_qkv.base_layer).__name__ == "Linear4bit" and trainer.choice.layout == layout
        assert trainer.choice.shares_prefix == trees
        if name == "alone" and trees:
            trainer.data_collator.share_prefix = False
        if name == "detached":
            monkeypatch.setattr(Broken, "what", "state detached")
            monkeypatch.setattr(fork, "States", Broken)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert max(abs(loss - 0.693147) for loss in losses) > 1e-2
        weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
        return losses, torch.cat(weights)

    (losses, alone), (found_losses, found), (_, detached) = run("alone"), run("found"), run("detached")
    assert found_losses == pytest.approx(losses, abs=1e-3)
    assert (found - alone).norm() * 10 < (detached - alone).norm()
