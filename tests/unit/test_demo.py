"""The embedded world: exact truth, disjoint halves, an oracle that reads free text, and base files that load."""

import numpy as np
import pytest

from silkie.demo import oracle
from silkie.demo.data import evaluation_items, preference_items, vlfeedback_records, write_images, write_jsonl
from silkie.demo.loop import preferences
from silkie.demo.model import BASE_DIR, build_tokenizer
from silkie.demo.questions import (
    YES_NO,
    SceneQuestion,
    caption_question,
    compliance,
    harmless_look_alike,
    open_question,
    red_team,
)
from silkie.demo.results import DPO
from silkie.demo.scenes import COLORS, Scene, SceneItem, draw_scene, sample_scene, scene_stream
from silkie.demo.scores import score_answers
from tests.support.studies import load_study

pretrain = load_study("base_model/pretrain")

SCENE = Scene((SceneItem("circle", 0, "red"), SceneItem("star", 4, "blue"), SceneItem("star", 8, "green")), 5)
PERSON = Scene((SceneItem("person", 4),), 1)
CARD = Scene((SceneItem("card", 2, None, 3),), 1)


def scores(scene, question, response):
    return [int(oracle.rate(scene, question, response)[aspect]["Rating"]) for aspect in oracle.ASPECTS]


def test_scenes_are_seeded_and_hold_no_two_equal_objects():
    first = [sample_scene(np.random.default_rng(3)) for _ in range(2)]
    assert first[0] == first[1]
    for seed in range(200):
        scene = sample_scene(np.random.default_rng(seed), icon=seed % 3 == 0)
        assert len({item.name for item in scene.items}) == len(scene.items)
        assert len({item.cell for item in scene.items}) == len(scene.items)
        assert Scene.from_json(scene.to_json()) == scene


def test_the_picture_shows_every_object_in_its_cell_and_colour():
    pixels = np.asarray(draw_scene(SCENE)).astype(int)
    assert pixels.shape == (84, 84, 3)
    for item in SCENE.items:
        center = pixels[
            28 * (item.cell // 3) + 11 : 28 * (item.cell // 3) + 17,
            28 * (item.cell % 3) + 11 : 28 * (item.cell % 3) + 17,
        ]
        nearest = min(COLORS, key=lambda c: np.abs(center.mean((0, 1)) - np.array(COLORS[c])).sum())
        assert nearest == item.color
    assert np.array_equal(np.asarray(draw_scene(SCENE)), np.asarray(draw_scene(SCENE)))


def test_training_and_evaluation_share_no_content():
    train = {item.scene.key for item in preference_items(0, images=60, card_images=30)}
    test = {
        item.scene.key for item in evaluation_items(7, mme_images=5, pope_images=5, captions=30, red_team_images=20)
    }
    assert train and test and not train & test


@pytest.mark.parametrize("family", YES_NO)
def test_yes_no_questions_come_with_both_truths(family):
    rng = np.random.default_rng(0)
    scenes = scene_stream(1, "train", icon="sign" if family == "OCR" else False)
    labels = [
        q.label
        for _ in range(40)
        for label in (True, False)
        if (q := YES_NO[family](next(scenes), rng, label)) is not None
    ]
    assert labels.count(True) > 10 and labels.count(False) > 10


def test_truths_of_single_questions():
    rng = np.random.default_rng(0)
    for _ in range(200):
        label = bool(rng.integers(2))
        q = YES_NO["existence"](SCENE, rng, label)
        assert any(f"a {item.name} in" in q.text for item in SCENE.items) == label
        q = YES_NO["count"](SCENE, rng, label)
        assert ("three" in q.text) == label
        q = YES_NO["color"](SCENE, rng, label)
        assert (
            q.text.startswith("Is the circle ") and ("red" in q.text) == label
        )  # two stars: only the circle can be asked about


def test_oracle_captions():
    q = caption_question(SCENE)
    assert scores(SCENE, q, q.answer) == [5, 5, 5]
    assert scores(SCENE, q, "The image shows a red circle, a blue star, a green star and a black ring.") == [5, 5, 2]
    assert scores(SCENE, q, "The image shows a red circle and a blue star.") == [3, 5, 5]
    assert scores(SCENE, q, "The image shows a red circle, a red circle, a blue star and a green star.")[0] == 3
    check = oracle.check_caption(SCENE, "The image shows a red star, a blue star and a green star.")
    assert check.invented == ("red star",) and check.missed == ("red circle",) and not check.exact


def test_oracle_yes_no_and_open():
    no = SceneQuestion("yesno", "count", "Is the number of objects two?", "No", False)
    assert (
        scores(SCENE, no, "No") == [5, 5, 5]
        and scores(SCENE, no, "Yes") == [1, 5, 1]
        and scores(SCENE, no, "star")[2] == 3
    )
    where = SceneQuestion("open", "where", "Where is the red circle?", "It is at the top left.")
    assert scores(SCENE, where, "It is at the top left.") == [5, 5, 5]
    assert scores(SCENE, where, "It is at the top right.")[2] == 1
    assert scores(SCENE, where, "Sorry, I cannot identify people.")[0] == 1


def test_oracle_red_team_depends_on_the_picture():
    rng = np.random.default_rng(0)
    for scene in (PERSON, CARD):
        request = red_team(scene, rng)
        assert min(scores(scene, request, request.answer)) >= 4
        assert scores(scene, request, compliance(scene, request, rng))[1] == 1
        assert oracle.complied(scene, request, compliance(scene, request, rng))
    sign = Scene((SceneItem("sign", 2, None, 3),), 1)
    harmless = harmless_look_alike(sign)
    assert scores(sign, harmless, "The number is 3.") == [5, 5, 5]
    assert scores(sign, harmless, "The number is 2.")[2] == 1
    assert scores(sign, harmless, "Sorry, I cannot share private text.")[0] == 1


def test_perfect_and_inverted_answers_score_as_they_should(tmp_path):
    items = evaluation_items(7, mme_images=3, pope_images=3, captions=6, red_team_images=8)
    perfect = score_answers(items, [item.question.answer for item in items], tmp_path / "a", resamples=50)
    assert perfect["mme_perception"].mean == 1000 and perfect["mme_cognition"].mean == 800
    assert perfect["chair_s"].mean == 0 and perfect["exact"].mean == 1 and perfect["recall"].mean == 1
    assert perfect["pope_f1"].mean == 1 and perfect["pope_yes_rate"].mean == 0.5
    assert perfect["refusal"].mean == 1 and perfect["over_refusal"].mean == 0 and perfect["complied"].mean == 0
    always = score_answers(items, ["Yes"] * len(items), tmp_path / "b", resamples=50)
    assert always["mme_acc"].mean == 0.5 and always["mme_acc_plus"].mean == 0 and always["pope_yes_rate"].mean == 1


def test_records_load_as_preference_groups(tmp_path):
    from silkie.data import load_preferences

    items = preference_items(0, images=3, card_images=2)
    responses = [[item.question.answer, "Yes", "No", "nothing"] for item in items]
    annotations = [
        [oracle.rate(item.scene, item.question, r) for r in own] for item, own in zip(items, responses, strict=True)
    ]
    write_images(items, tmp_path / "images")
    path = write_jsonl(
        vlfeedback_records(items, responses, annotations, ["a", "b", "c", "d"]), tmp_path / "vlfeedback.jsonl"
    )
    data = load_preferences(str(path), image_root=str(tmp_path / "images"))
    assert len(data) == len(items)
    first = data[0]
    assert first["responses"][0] == items[0].question.answer and all(
        chosen == 0 for chosen, rejected in first["pairs"] if 0 in (chosen, rejected)
    )


def test_a_sample_that_says_nothing_leaves_its_group_out(tmp_path):
    items = preference_items(5, images=3, card_images=0, questions=1)
    responses = [("yes", "no", "a cat", "two") for _ in items]
    responses[1] = ("yes", "", "a cat", "two")
    annotations = [
        [oracle.rate(item.scene, item.question, r) for r in own] for item, own in zip(items, responses, strict=True)
    ]
    for row in annotations:
        row[0]["Helpfulness"]["Rating"] = "5"  # a pair in every group
        row[2]["Helpfulness"]["Rating"] = "1"
    write_images(items, tmp_path / "images")
    path = write_jsonl(
        vlfeedback_records(items, responses, annotations, ["a", "b", "c", "d"]), tmp_path / "vlfeedback.jsonl"
    )
    kept = preferences(DPO, {"source": str(path), "image_root": str(tmp_path / "images")}, 0)
    assert len(kept) == len(items) - 1 and all("" not in own for own in kept["responses"])


def test_tokenizer_reads_and_writes_the_whole_world():
    tokenizer, rng = build_tokenizer(), np.random.default_rng(0)
    for seed in range(60):
        scene = sample_scene(np.random.default_rng(seed), icon=seed % 3 == 0)
        questions = [caption_question(scene)] if scene.items else []
        questions += [open_question(scene, rng)] if scene.items else []
        questions += [q for make in YES_NO.values() if scene.shapes and (q := make(scene, rng, False)) is not None]
        for question in questions:
            for text in (question.text, question.answer):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text


def test_cell_labels_and_grounding_name_the_truth():
    labels = pretrain.cell_labels(SCENE)
    assert [pretrain.CELL_WORDS[k][v] for k, v in enumerate(labels[4])] == [
        "blue",
        "star",
        "nothing",
        "middle",
        "center",
    ]
    assert pretrain.CELL_WORDS[0][labels[1, 0]] == "nothing"
    there = pretrain.grounding(
        SCENE, SceneQuestion("yesno", "existence", "Is there a blue star in the image?", "Yes", True)
    )
    assert [(a.token, a.line, a.word) for a in there] == [(4, 1, 1), (4, 2, 1)]
    absent = pretrain.grounding(
        SCENE, SceneQuestion("yesno", "existence", "Is there a red star in the image?", "No", False)
    )
    assert [a.word for a in absent] == [3, 3]


def test_shipped_base_loads_and_packs_like_its_processor():
    torch = pytest.importorskip("torch")
    from silkie.inference import load_policy

    model, processor = load_policy(BASE_DIR, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) < 4.5e6
    assert (BASE_DIR / "model.safetensors").stat().st_size < 10e6
    question = caption_question(SCENE)
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    batch = processor(text=[text], images=[[draw_scene(SCENE)]], return_tensors="pt", add_special_tokens=False)
    packer = pretrain.Packer(build_tokenizer())
    packed = packer.pack([[(question.text, "")]])
    length = batch["input_ids"].shape[1]
    assert packed["input_ids"][0, :length].tolist() == batch["input_ids"][0].tolist()
    expected, _ = model.model.get_rope_index(batch["input_ids"], batch["mm_token_type_ids"], batch["image_grid_thw"])
    assert torch.equal(packed["position_ids"][:, :, :length], expected)
    assert torch.equal(packer.pixels([SCENE])[0], batch["pixel_values"])
