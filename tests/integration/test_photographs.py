"""recipes/studies/photographs: what its oracle, boards and lessons promise, and, where the parts are at hand (opt-in:
`run.py --fetch` or the extra `realworld`), that packed = rows = the stock model = TRL on weights that others trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "studies"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from photographs import boards as world
from photographs.base import batched_order, chat_template
from photographs.settings import ARMS
from photographs.sources import SourceError, Sources, check_hash, default_cache

from silkie.evaluation import score
from silkie.feedback import JudgeItem

LABELS = np.random.default_rng(0).integers(0, 10, 60_000).astype(np.uint8)


def test_a_board_has_four_kinds_and_no_photograph_comes_twice_nor_in_two_splits():
    seen: dict[int, str] = {}
    for split in ("base", "preference", "development"):
        for board in world.boards(LABELS, split, 300, 1):
            assert len(set(board.labels)) == 4
            assert all(LABELS[photo] == label for photo, label in zip(board.photographs, board.labels, strict=True))
            assert not set(board.photographs) & set(seen), "a photograph was used before"
            seen |= dict.fromkeys(board.photographs, split)


def test_held_out_boards_have_no_photograph_that_an_earlier_run_has_opened():
    from photographs.loop import HELD_OUT_SEED, OPENED

    labels = LABELS[:10_000]
    opened = {
        photograph
        for seed, count in OPENED.items()
        for board in world.boards(labels, "held-out", count, seed)
        for photograph in board.photographs
    }
    own = world.boards(labels, "held-out", 300, HELD_OUT_SEED, opened)
    assert len(opened) > 800 and HELD_OUT_SEED not in OPENED
    assert not opened & {photograph for board in own for photograph in board.photographs}
    unguarded = world.boards(labels, "held-out", 300, HELD_OUT_SEED)
    assert opened & {photograph for board in unguarded for photograph in board.photographs}, "nothing was excluded"


def test_boards_say_when_the_photographs_are_used_up():
    with pytest.raises(ValueError, match="used up"):
        world.boards(LABELS, "development", 2_000, 1)


def test_the_full_caption_is_right_and_every_change_of_it_is_noticed():
    for board in world.boards(LABELS, "base", 50, 2):
        found = world.check(board.caption, board.things)
        assert found == world.Check(hits=4, grouped=0, invented=(), repeated=0, well_formed=True), board.caption
        absent = next(name for name in world.NAMES if name not in board.things)
        wrong = board.caption.replace(board.things[3], absent)
        assert world.check(wrong, board.things).invented == (absent,), wrong


@pytest.mark.parametrize(
    "answer, things",
    [
        ("A T-shirt and a shirt.", ["T-shirt", "shirt"]),
        ("Two shirts, three t-shirts and a pair of trousers.", ["shirt", "T-shirt", "pair of trousers"]),
        ("A handbag, a dress and a hat.", ["bag", "dress", "hat"]),
        ("An ankle boot and boots.", ["boot", "boot"]),
        ("I see nothing.", []),
    ],
)
def test_the_oracle_and_the_chair_scorer_read_the_same_things(answer, things, tmp_path):
    assert world.mentions(answer) == things
    (tmp_path / "vocabulary.json").write_text(json.dumps(world.FORMS))
    (tmp_path / "chair.jsonl").write_text(
        json.dumps({"id": "1", "image": "1.png", "answer": answer, "objects": ["coat"]})
    )
    counts = score("chair", str(tmp_path / "chair.jsonl")).items[0].counts
    assert counts[2] == len(things) and counts[3] == len(things)  # all named, all invented: only a coat is there


def test_what_people_say_is_true_and_calls_the_share_by_group():
    rng, vague, grouped = np.random.default_rng(0), 0, 0
    own = world.boards(LABELS, "base", 300, 4)
    for board in own:
        found = world.check(world.people_say(board, rng, 0.3), board.things)
        assert found.invented == () and found.repeated == 0 and found.well_formed and found.hits + found.grouped == 4
        vague, grouped = vague + found.grouped, grouped + sum(name in world.GROUPS for name in board.things)
    assert 0.25 < vague / grouped < 0.35


def test_ratings_follow_the_written_rules():
    def ratings(answer: str, **meta: object) -> tuple[float, ...]:
        item = JudgeItem(
            id="1", prompt="?", responses=(answer,), meta={"objects": ["coat", "bag", "dress", "boot"], **meta}
        )
        return tuple(entry.rating for entry in world.judge(item)[0].values())

    assert ratings("A coat, a bag, a dress and a boot.") == (5, 5, 5)
    assert ratings("A coat, a bag, a dress and a shirt.") == (4, 5, 4)
    assert ratings("A coat and a bag.") == (3, 5, 5)
    assert ratings("A coat, a coat and a bag.") == (1, 5, 5)  # 3 for two things, 2 less for saying one twice
    assert ratings("A garment, a bag, a garment and a shoe.") == (3.5, 5, 5)  # only the bag by its name
    assert ratings("A garment and a garment.") == (2, 5, 5)
    assert ratings("A shoe and a shoe.") == (1.5, 5, 4)  # there is one
    assert ratings("A hat.") == (1, 5, 4)
    assert ratings("Yes.", label=True) == (5, 5, 5) and ratings("No.", label=True) == (1, 5, 1)
    assert ratings("A coat.", label=True) == (1, 5, 3)
    item = JudgeItem(id="1", prompt="?", responses=("A garment and a bag.",), meta={"objects": ["coat", "bag"]})
    assert [world.judge(item, group)[0][world.ASPECTS[0]].rating for group in (0.0, 0.25, 0.5)] == [2, 2.25, 2.5]


def test_questions_have_the_label_they_are_asked_with():
    rng = np.random.default_rng(0)
    for board in world.boards(LABELS, "base", 30, 3):
        for label in (True, False):
            asked = world.existence(board, rng, label, confusable=[6, 3, 4, 1, 2, 7, 0, 9, 5, 7])
            assert (asked.text.removeprefix("Is there a ").removesuffix(" in the picture?") in board.things) == label
            asked = world.position(board, rng, label)
            thing, _, cell = asked.text.removeprefix("Is the ").removesuffix("?").partition(" in the ")
            assert (board.things[world.CELLS.index(cell)] == thing) == label


def test_batches_are_of_one_kind():
    kinds = [2] * 40 + [8] * 24
    order = batched_order(kinds, 8, 0)
    assert sorted(order) == list(range(64))
    assert all(len({kinds[i] for i in order[k : k + 8]}) == 1 for k in range(0, 64, 8))


def test_an_unknown_chat_template_and_a_changed_file_are_refused():
    with pytest.raises(ValueError, match="chat template has changed"):
        chat_template("{{ messages }}")
    with pytest.raises(SourceError, match="expected 5793"):
        check_hash(b"other", "models/efficientnet-lite0-57934424.pth", "here")


def test_missing_photographs_are_an_error_that_says_how_to_get_them(tmp_path):
    with pytest.raises(SourceError, match="apt-get install dataset-fashion-mnist"):
        Sources(tmp_path, tmp_path / "nothing").photograph_folder()


def test_controls_differ_from_dpo_in_what_they_control():
    dpo = ARMS["dpo"]
    assert ARMS["shuffled"].shuffled and ARMS["longest"].pairs == "longest" and ARMS["sft"].losses == ("sft",)
    for arm in ARMS.values():
        assert (arm.learning_rate, arm.epochs, arm.batch, arm.rounds) == (dpo.learning_rate, dpo.epochs, dpo.batch, 1)


# --- with the real parts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts():
    sources = Sources(default_cache())
    try:
        sources.enable()
        sources.photograph_folder()
    except SourceError as error:
        pytest.skip(f"the real parts are not here: {error}")
    import photographs_setting

    model, processor = photographs_setting.build(sources)
    return photographs_setting, model, processor


@pytest.mark.slow
def test_the_tokenizer_writes_the_models_own_turns_with_image_parts(parts):
    _, _, processor = parts
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_lessons_are_learnt_on_the_assistants_words_only(parts):
    from photographs.base import Lessons, turns
    from PIL import Image

    _, _, processor = parts
    conversation = turns("Is there a coat?", "Yes.", True) + turns("And a bag?", "No.", False)
    row = Lessons([conversation], [Image.new("RGB", (224, 224))], processor)[0]
    learnt = [processor.tokenizer.decode(row["labels"][i]) for i in range(len(row["labels"])) if row["labels"][i] >= 0]
    assert "".join(learnt) == "Yes.<|im_end|>No.<|im_end|>"


@pytest.mark.slow
def test_the_teachers_loss_is_the_models_own(parts, tmp_path):
    """It computes logits of labelled tokens only."""
    from photographs.base import Lessons, Pad, Teacher, turns
    from PIL import Image
    from transformers import TrainingArguments

    from tests.support.scoring import with_lora

    _, model, processor = parts
    own = [turns("Which things?", "A coat and a bag.", True), turns("Is there a coat?", "Yes.", True)]
    data = Lessons(own, [Image.new("RGB", (224, 224), colour) for colour in ("red", "white")], processor)
    policy = with_lora(model.float()).eval()
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False)
    trainer = Teacher(model=policy, args=arguments, train_dataset=data)
    batch = Pad(0)([data[0], data[1]])
    truth = policy(**batch).loss
    assert torch.allclose(trainer.compute_loss(policy, dict(batch)), truth, rtol=1e-5)
    counted = trainer.compute_loss(policy, dict(batch), num_items_in_batch=torch.tensor(100))
    said = (batch["labels"][:, 1:] != -100).sum()
    assert torch.allclose(counted, truth * said / 100, rtol=1e-5)
    policy.unload()  # the other tests get the model as it was


@pytest.mark.slow
def test_a_frozen_eye_reads_a_picture_once_and_again_when_it_has_changed(parts, monkeypatch):
    from photographs import tower as module

    tower = module.EfficientNetLiteTower(module.EfficientNetLiteConfig()).requires_grad_(False)
    read, seen = module.EfficientNetLiteTower._read, []
    monkeypatch.setattr(module, "_READ", {})
    monkeypatch.setattr(tower, "_read", lambda pixels: seen.append(len(pixels)) or read(tower, pixels))
    pictures = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():  # as while sampling
        assert torch.equal(tower(pictures).last_hidden_state, read(tower, pictures))
    projector = torch.nn.Linear(1280, 2)  # as while training
    again = tower(pictures[[2, 0]]).last_hidden_state
    projector(again).sum().backward()
    assert seen == [3] and torch.equal(again, read(tower, pictures[[2, 0]]))
    tower.net._bn0.running_mean.add_(1.0)
    changed = tower(pictures[:1]).last_hidden_state
    assert seen == [3, 1] and torch.equal(changed, read(tower, pictures[:1])) and not torch.equal(changed, again[1:])
    tower.requires_grad_(True)
    assert tower(pictures[:1]).last_hidden_state.requires_grad, "an eye that is trained must be read with its gradient"
    before = len(seen)
    with torch.inference_mode():  # a model as it is loaded: its weights want gradients, but nothing is learnt
        for _ in range(2):
            tower(pictures[1:])
    assert seen[before:] == [2], "a plain model that answers must remember what it saw"
    assert not any(cells.requires_grad for cells in module._READ.values()), "what is remembered holds a graph"


@pytest.mark.slow
def test_packed_equals_rows_equals_the_stock_model_on_real_weights(parts):
    """float64, log-probs and LoRA gradients."""
    from tests.support.scoring import gradients, score, stock_logps, with_lora

    setting, model, processor = parts
    policy = with_lora(model.double()).eval()
    rows = setting.build_groups(processor, 3, 1, prompt_tokens=40)
    truth = stock_logps("llava", policy, processor, rows)
    expected = gradients(policy, truth)
    for layout, backend in (("rows", "sdpa"), ("packed", "sdpa"), ("packed", "segments")):
        found = score(policy, processor, rows, layout, backend)
        assert (found.logps - truth).abs().max() < 1e-9, (layout, backend)
        own = gradients(policy, found.logps)
        assert own.keys() == expected.keys() and len(own) == 2 * 7 * 30
        for name in own:
            assert (own[name] - expected[name]).abs().max() < 1e-6 * max(1.0, expected[name].abs().max().item()), name


@pytest.mark.slow
def test_one_step_equals_trls_on_real_weights(parts):
    setting, _, _ = parts
    results = {who: setting.run(who, k=3, timed=1, prompt_tokens=40) for who in ("TRL", "packed", "rows")}
    for who in ("packed", "rows"):
        for key in ("losses", "grad_norms"):
            theirs, ours = torch.tensor(results["TRL"][key]), torch.tensor(results[who][key])
            assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-4), (who, key, ours, theirs)
