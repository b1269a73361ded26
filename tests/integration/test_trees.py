"""Groups that share the beginning of their prompts: one stem, its images once, every question and every response.
Log-probs AND gradients against separate rows and against each response alone, in float64; and what must not pass."""

import logging

import pytest
import torch
from peft import LoraConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.batch import companies, packing, stems
from silkie.batch.packing import Tree
from silkie.batch.stems import find_trees
from silkie.model.attention import IMPLEMENTATIONS, segments
from silkie.model.families import causal_lm
from silkie.model.recurrent import Calls, install
from silkie.training.self_test import LayoutMismatch
from tests.support.data import dataset
from tests.support.families import FAMILIES, QWEN, family_model, family_processor
from tests.support.hybrid import TARGETS, qwen3_5, words
from tests.support.hybrid import with_lora as hybrid_lora
from tests.support.scoring import collate, gradients, score, stock_logps, with_lora
from tests.support.settings import SGD
from tests.support.tiny import image, tiny_processor
from tests.support.trees import TREES, asked, tree_rows

EXACT = 1e-10
GRADIENT = 1e-6  # torch's CPU attention keeps the softmax normaliser of its backward pass in float32
SHARING = [family for family in [*QWEN, *FAMILIES] if family != "paligemma"]


@pytest.fixture(autouse=True)
def _short_stems(monkeypatch):
    for module in (stems, companies):
        monkeypatch.setattr(module, "SHORTEST_STEM", 6)  # the tiny images are a few tokens


def build(family, checkpointing=None, *, double=True):
    if family == "qwen3_5":
        model = hybrid_lora(qwen3_5(double=double))
        install(model)
    else:
        model = with_lora(family_model(family).double() if double else family_model(family))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    return model.train()


def processor_of(family):
    return family_processor("qwen2_5_vl" if family == "qwen3_5" else family)


def measured(family, model, rows, *, share, layout="packed", backend="sdpa", calls=None):
    # transformers does not know the float64 code of hybrids well enough to set it
    causal_lm(model).config.get_text_config()._attn_implementation = IMPLEMENTATIONS[backend]
    scores = score(model, processor_of(family), rows, layout, backend, fused=False, share_prefix=share, calls=calls)
    return scores.per_token_logps.detach(), gradients(model, scores.logps)


def compare(found, truth, gradient=GRADIENT):
    assert (found[0] - truth[0]).abs().max() < EXACT
    assert found[1].keys() == truth[1].keys() and len(found[1]) >= 28
    for name, expected in truth[1].items():
        assert torch.linalg.norm(expected) > 1e-6, "a dead gradient proves nothing"
        assert (found[1][name] - expected).abs().max() < gradient * max(1.0, expected.abs().max().item()), name


@pytest.mark.parametrize("family", [*SHARING, "qwen3_5"])
def test_trees_equal_separate_rows_and_the_stock_model(family, monkeypatch):
    rows, model, processor = tree_rows(family), build(family), processor_of(family)
    batch = collate(model, processor, rows, "packed", share_prefix=True)
    assert batch["row_trees"] == [[0], [1], [2], [3]] and len(batch["image_tokens"]) == 4
    apart = collate(model, processor, rows, "packed")
    assert len(batch["vision"]["pixel_values"]) < len(apart["vision"]["pixel_values"])
    truth = measured(family, model, rows, share=False, layout="rows")
    if family != "qwen3_5":  # its stock forward is compared in test_hybrid
        sums = stock_logps(family, model, processor, rows)
        own = sums.new_zeros(len(sums)).index_add(0, apart["owner"], truth[0])
        assert (own - sums).abs().max() < EXACT
    monkeypatch.setattr(segments, "SHORTEST_ROW", 0)
    for backend in ("sdpa", "segments"):
        compare(measured(family, model, rows, share=True, backend=backend), truth)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_trees_in_bf16_are_as_near_to_float64_as_rows(family):
    rows, weights, found = tree_rows(), build(family).state_dict(), {}
    for what, dtype, share in (
        ("truth", torch.float64, False),
        ("rows", torch.bfloat16, False),
        ("trees", torch.bfloat16, True),
    ):
        model = build(family, double=dtype is torch.float64).to(dtype)
        model.load_state_dict(weights)
        found[what] = measured(family, model, rows, share=share, layout="packed" if share else "rows")[1]
    size = torch.stack([g.norm() for g in found["truth"].values()]).norm()
    errors = {
        what: float(
            torch.stack([(found[what][n].double() - g).norm() for n, g in found["truth"].items()]).norm() / size
        )
        for what in ("rows", "trees")
    }
    assert 0 < errors["trees"] < 1.25 * errors["rows"] < 0.5, errors


def test_trees_through_more_calls_of_like_rows():
    rows = tree_rows()
    truth = measured("qwen3_5", build("qwen3_5"), rows, share=False, layout="rows")
    calls = Calls(roots=2, between=1, leaves=3)
    compare(measured("qwen3_5", build("qwen3_5"), rows, share=True, calls=calls), truth)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
def test_recomputation_changes_no_gradient(family, checkpointing):
    rows = tree_rows()
    truth = measured(family, build(family), rows, share=False, layout="rows")
    compare(measured(family, build(family, checkpointing), rows, share=True), truth)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5"])
def test_one_question_is_no_tree_and_takes_the_same_calls(family):
    rows, model = tree_rows()[5:6], build(family)
    assert collate(model, processor_of(family), rows, "packed", share_prefix=True)["row_trees"] == [[0]]
    truth = measured(family, model, rows, share=False, layout="rows")
    compare(measured(family, model, rows, share=True), truth)


@pytest.mark.parametrize("backend", ["varlen", "flex"])
def test_backends_with_many_trees_in_a_row(backend):
    rows, model = tree_rows(), build("qwen2_5_vl")
    batch = collate(model, tiny_processor(), rows, "packed", None, share_prefix=True)
    assert batch["row_trees"] == [[0, 1, 2, 3]]
    with torch.set_grad_enabled(backend == "varlen"):  # FlexAttention has no backward pass on the CPU
        scores = score(model, tiny_processor(), rows, "packed", backend, fused=False, share_prefix=True)
    truth = measured("qwen2_5_vl", model, rows, share=False, layout="rows")
    if backend == "varlen":
        compare((scores.per_token_logps.detach(), gradients(model, scores.logps)), truth)
    assert (scores.per_token_logps.detach() - truth[0]).abs().max() < EXACT


# -- negative controls: each of these errors must show in the numbers that the tests above compare


def broken_batch(what, model, rows):
    batch = collate(model, tiny_processor(), rows, "packed", share_prefix=True)
    if what == "a sibling question visible":
        batch["subtree_end"] = torch.where(batch["segment_ids"] == 0, 10**6, batch["subtree_end"])
    if what == "positions not restarted":
        steps = torch.arange(batch["input_ids"].shape[1]).expand(3, *batch["input_ids"].shape)
        after = batch["segment_index"] >= 2  # stem and first question stay
        batch["position_ids"] = torch.where(after[None], steps, batch["position_ids"])
    if what == "another question's stem":
        batch["gather"] = batch["gather"].roll(1)
    return batch


@pytest.mark.parametrize("what", ["a sibling question visible", "positions not restarted", "another question's stem"])
def test_an_error_shows_in_log_probs(what):
    model, rows = build("qwen2_5_vl"), [tree_rows()[g] for g in TREES[0]]
    truth = measured("qwen2_5_vl", model, rows, share=False, layout="rows")[0]
    with torch.no_grad():
        for batch, shows in ((broken_batch("nothing", model, rows), False), (broken_batch(what, model, rows), True)):
            found = score(model, tiny_processor(), rows, "packed", batch=batch, fused=False).per_token_logps
            assert ((found - truth).abs().max() > 1e-3) == shows


def test_a_stem_cut_inside_an_image_shows(monkeypatch):
    """Two prompts of the same image tokens, other pixels: whatever made them share is wrong by what the pixels say."""
    model, rows = build("qwen2_5_vl"), tree_rows()
    rows = [rows[0], {**rows[2], "images": rows[5]["images"]}]
    truth = measured("qwen2_5_vl", model, rows, share=False, layout="rows")[0]
    assert collate(model, tiny_processor(), rows, "packed", share_prefix=True)["row_trees"] == [[0], [1]]
    monkeypatch.setattr(stems, "same_vision", lambda a, b: True)
    with torch.no_grad():
        found = score(model, tiny_processor(), rows, "packed", fused=False, share_prefix=True).per_token_logps
    assert (found - truth).abs().max() > 1e-3


def test_a_stem_holds_all_images_or_is_none():
    """Two images, and questions that part between them; system prompts that part before the image."""
    model, processor = build("qwen2_5_vl"), tiny_processor()
    one, other = tree_rows()[1], tree_rows()[4]
    picture, text = {"type": "image", "text": None}, {"type": "text", "text": "yes"}
    for content in ([picture, text, picture], [text, picture, picture]):
        parted = {**other, "prompt": [{"role": "user", "content": content}]}
        batch = collate(model, processor, [one, parted], "packed", share_prefix=True)
        assert batch["row_trees"] == [[0], [1]]
    assert collate(model, processor, [one, other], "packed", share_prefix=True)["row_trees"] == [[0]]


def test_a_two_way_prefix_is_refused_with_the_reason():
    model, rows = build("paligemma"), tree_rows("paligemma")
    with pytest.raises(ValueError, match="attends in both directions.*Set share_prefix='off'"):
        score(model, processor_of("paligemma"), rows, "packed", share_prefix=True)


def test_trees_are_made_as_large_as_padding_allows():
    """Six questions about one image beside two other groups: a row of all six would pad two short rows to its length."""
    model = build("qwen2_5_vl")
    rows = [asked([image(0)], words(40, n), [10, 10], n) for n in range(6)]
    rows += [asked([image(n)], words(40, n), [10, 10], n) for n in (7, 8)]
    padded, flat = (collate(model, tiny_processor(), rows, "packed", n, share_prefix=True) for n in (1, None))
    apart = collate(model, tiny_processor(), rows, "packed")
    assert padded["input_ids"].numel() <= apart["input_ids"].numel()
    assert flat["row_trees"] == [[0, 1, 2]] and flat["input_ids"].numel() < apart["input_ids"].numel()


# -- through the trainer


def make(tmp_path, family="qwen2_5_vl", rows=None, **options):
    torch.manual_seed(0)
    arguments = dict(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        share_prefix="image",
        **SGD,
    )
    model = qwen3_5(double=True) if family == "qwen3_5" else family_model(family).double()
    return SilkieDPOTrainer(
        model,
        args=SilkieDPOConfig(**{**arguments, **options}),
        train_dataset=dataset(rows or [row for row in tree_rows(family) if row["pairs"]]),
        processing_class=processor_of(family),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS if family == "qwen3_5" else None),
    )


def apart(*args, **options):
    """A run of the same batches, each group by itself: only what shares the stem is taken out."""
    trainer = make(*args, **options)
    trainer.data_collator.share_prefix = False
    return trainer


def trained(trainer):
    """Losses, adapter, and how many tokens went through the model."""
    tokens = []
    causal_lm(trainer.model).register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    trainer.train()
    log = trainer.state.log_history
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return [entry["loss"] for entry in log if "loss" in entry], weights, sum(tokens)


@pytest.mark.parametrize(
    "family, options",
    [
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"gradient_checkpointing": True}),
        ("qwen2_5_vl", {"precompute_ref_log_probs": True, "max_tokens_per_batch": 400}),
        ("qwen2_5_vl", {"loss_type": ["sigmoid", "mdpo_image", "mdpo_anchor"]}),
        (
            "qwen2_5_vl",
            {"loss_type": ["mdpo_image"], "corruption": "other_image", "gradient_accumulation_steps": 2},
        ),
        ("qwen3_5", {"gradient_checkpointing": True}),
    ],
    ids=["plain", "checkpointing", "precomputed", "mdpo", "other_image", "hybrid"],
)
def test_the_trainer_reaches_the_weights_of_groups_apart(tmp_path, family, options):
    losses, weights, tokens = trained(make(tmp_path / "shared", family, **options))
    expected, truth, more = trained(apart(tmp_path / "apart", family, **options))
    assert max(abs(loss - expected[0]) for loss in losses[1:]) > 1e-4  # it trained
    assert tokens < more  # it shared
    assert losses == pytest.approx(expected, abs=1e-6)
    start = {n: p for n, p in make(tmp_path / "start", family, **options).model.named_parameters() if n in truth}
    for name in truth:
        moved = (truth[name] - start[name]).abs().max()
        assert moved > 0 and (weights[name] - truth[name]).abs().max() < 1e-5 * moved, name


def test_a_step_equals_that_of_a_run_without_sharing(tmp_path):
    """All groups in one batch: the order of groups is another, the loss and its normalisation are not."""
    options = {"per_device_train_batch_size": 8, "share_prefix_groups": 3}
    shared = trained(make(tmp_path / "image", **options))
    off = trained(make(tmp_path / "off", **{**options, "share_prefix": "off"}))
    assert shared[0] == pytest.approx(off[0], abs=1e-6) and shared[2] < off[2]
    for name in off[1]:
        assert (shared[1][name] - off[1][name]).abs().max() < 1e-7, name


def test_the_log_tells_the_saving_and_the_self_test_runs_a_tree(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie"):
        make(tmp_path, max_steps=1).train()
    assert "6 of 7 groups (86%) share the beginning of their prompt with others, which saves at least" in caplog.text
    assert "self-test: groups share a stem of" in caplog.text


def test_what_cannot_be_shared_is_told(tmp_path, caplog):
    rows = [tree_rows()[0], tree_rows()[5]]
    with caplog.at_level(logging.INFO, logger="silkie"):
        trainer = make(tmp_path, rows=rows)
    assert not trainer.choice.shares_prefix and "share_prefix='image' shares nothing: 0 of 2 groups" in caplog.text
    with pytest.raises(ValueError, match="per_device_train_batch_size=1 has room for one"):
        make(tmp_path, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="in rows nothing is shared"):
        make(tmp_path, layout="rows")
    with pytest.raises(LayoutMismatch, match="attends in both directions"):
        make(tmp_path, "paligemma")
    trainer = make(tmp_path, "paligemma", share_prefix="auto")
    assert trainer.choice.layout == "packed" and not trainer.choice.shares_prefix and not trainer.companies
    assert "attends in both directions" in trainer.choice.sharing


def test_the_self_test_stops_a_stem_that_is_too_long(tmp_path, monkeypatch):
    """One token more than the prompts share."""

    def longer(encoded, groups, *args, **kwargs):
        trees = find_trees(encoded, groups, *args, **kwargs)
        return [Tree(tree.groups, tree.stem + (len(tree.groups) > 1)) for tree in trees]

    monkeypatch.setattr("silkie.batch.collator.find_trees", longer)
    with pytest.raises(LayoutMismatch, match="Self-test failed"):
        make(tmp_path).train()


def test_companies_are_counted_as_the_collator_shares_them(tmp_path):
    """By bytes, wherever an image is stored, and never more tokens than the stem has."""
    rows = [row for row in tree_rows() if row["pairs"]]
    copy = tmp_path / "copy.png"
    copy.write_bytes(rows[2]["images"][0]["bytes"])
    rows[2]["images"] = [{"bytes": None, "path": str(copy)}]
    trainer = make(tmp_path, rows=rows)
    assert [c.groups for c in trainer.companies] == [(0, 2), (1, 4), (3, 6)]
    trees = collate(trainer.model, tiny_processor(), rows, "packed", None, share_prefix=True)
    assert [c.stem for c in trainer.companies] == [s.length for s in packing.stems(trees["segments"])]
    auto = make(tmp_path, rows=rows, share_prefix="auto")
    assert auto.choice.shares_prefix and auto.companies == trainer.companies
    assert not make(tmp_path, rows=rows[3:4] + rows[5:6], share_prefix="auto").companies
