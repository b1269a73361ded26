"""Round trips: files in each public schema, written here, come out as the groups they say."""

from __future__ import annotations

import json
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from silkie.data import (
    SOURCES,
    DataError,
    Group,
    Row,
    is_group_features,
    load_preferences,
    open_image,
    register_source,
    user_turn,
)
from silkie.data.schema import prompt_text
from tests.support import preference_files as files

PAIR = {"chosen": "a good answer", "rejected": "a bad answer"}
HUMAN = [{"from": "human", "value": "<image>\nWhat is it?"}]


@pytest.fixture
def load(tmp_path):
    datasets.disable_progress_bars()
    return lambda source, **options: load_preferences(source, cache_dir=tmp_path / "cache", **options)


@pytest.fixture
def folder(tmp_path):
    files.write_images(tmp_path / "data" / "img", 3)
    return tmp_path / "data"


def check_pair(group, chosen="a good answer", rejected="a bad answer", question="What is it?", seed=0):
    """The group is one image, one question and one pair of these texts."""
    (pair,) = group["pairs"]
    assert group["responses"][pair[0]] == chosen
    assert group["responses"][pair[1]] == rejected
    assert prompt_text(group["prompt"]) == question
    assert [part["type"] for part in group["prompt"][-1]["content"]] == ["image", "text"]
    assert open_image(group["images"][0]).tobytes() == files.picture(seed).tobytes()


# columns of every pair format, with `image` standing for the image value
PAIR_FORMATS = {
    "rlhf-v": lambda image: {
        "ds_name": "RLHF-V",
        "image": image,
        "text": json.dumps({"question": "What is it?", **PAIR}),
        "origin_dataset": "vqa",
        "origin_split": json.dumps({"model": "x", "type": "y"}),
        "idx": 7,
        "image_path": "0.jpg",
    },
    "rlaif-v": lambda image: {
        "ds_name": "RLAIF-V",
        "image": image,
        "question": "What is it?",
        **PAIR,
        "origin_dataset": "OK-VQA",
        "origin_split": "train",
        "idx": 3,
        "image_path": "0.jpg",
    },
    "mmpr": lambda image: {"image": image, "question": "<image>\nWhat is it?", **PAIR},
    "spa-vl": lambda image: {"image": image, "question": "What is it?", **PAIR, "image_name": "0.png"},
    "mm-rlhf": lambda image: {"prompt": "What is it?", **PAIR, "image": image, "video": None, "is_tie": False},
    "trl": lambda image: {"prompt": "What is it?", **PAIR, "image": image},
    "sharegpt": lambda image: {
        "conversations": HUMAN,
        "chosen": {"from": "gpt", "value": PAIR["chosen"]},
        "rejected": {"from": "gpt", "value": PAIR["rejected"]},
        "images": [image],
    },
    "alpaca": lambda image: {"instruction": "<image>What is it?", "input": "", **PAIR, "images": [image]},
    "llava-rlhf": lambda image: {
        "id": "1",
        "image": image,
        "conversations": [*HUMAN, {"from": "gpt", "value": "an earlier answer"}],
        "hallucination": True,
        "output_1": {"from": "llava", "value": PAIR["rejected"]},
        "output_2": {"from": "llava", "value": PAIR["chosen"]},
        "preference": 2,
    },
}


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_pair_formats_as_jsonl_with_an_image_directory(name, folder, load):
    path = files.write_lines(folder / "rows.jsonl", [PAIR_FORMATS[name]("img/0.png")])
    dataset, report = load(path, return_report=True)
    assert report.format == name
    assert is_group_features(dataset.features)
    check_pair(dataset[0])


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_pair_formats_as_parquet_with_embedded_images(name, folder, load):
    pq.write_table(
        pa.Table.from_pylist([PAIR_FORMATS[name](files.embedded(0))]), folder / "train-00000-of-00001.parquet"
    )
    dataset, report = load(folder / "train-00000-of-00001.parquet", return_report=True)
    assert report.format == name
    check_pair(dataset[0])


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_every_format_is_detected_as_itself_alone(name):
    record = PAIR_FORMATS[name]("x.png")
    assert [source.name for source in SOURCES.values() if source.detect(record)] == [name]


def columns(*objects):
    """Objects as `datasets.Sequence({...})` stores them: an object of lists."""
    return {name: [item[name] for item in objects] for name in objects[0]}


TURN = lambda role, content: {"role": role, "content": content}  # noqa: E731
TURNS_AS_COLUMNS = {
    "sharegpt": {**PAIR_FORMATS["sharegpt"]("img/0.png"), "conversations": columns(*HUMAN)},
    "llava-rlhf": {
        **PAIR_FORMATS["llava-rlhf"]("img/0.png"),
        "conversations": columns(*HUMAN, {"from": "gpt", "value": "an earlier answer"}),
    },
    "trl": {
        "images": ["img/0.png"],
        "prompt": columns(
            TURN("user", columns({"type": "image", "text": None}, {"type": "text", "text": "What is it?"}))
        ),
        "chosen": columns(TURN("assistant", columns({"type": "text", "text": PAIR["chosen"]}))),
        "rejected": columns(TURN("assistant", PAIR["rejected"])),
    },
    "trl, implicit prompt": {
        "images": ["img/0.png"],
        **{
            name: columns(TURN("user", "What is it?"), TURN("assistant", PAIR[name])) for name in ("chosen", "rejected")
        },
    },
    "groups": {
        "images": ["img/0.png"],
        "prompt": columns(TURN("user", "What is it?")),
        "responses": list(PAIR.values()),
        "pairs": [[0, 1]],
    },
}


@pytest.mark.parametrize("name", TURNS_AS_COLUMNS)
def test_turns_as_an_object_of_lists(name, folder, load):
    check_pair(load(files.write_lines(folder / "rows.jsonl", [TURNS_AS_COLUMNS[name]]))[0])


def test_vlfeedback_lists_and_columns_give_the_same_groups(folder, load):
    one = files.write_lines(folder / "a.jsonl", [files.vlfeedback(index) for index in range(3)])
    two = files.write_lines(folder / "b.jsonl", [files.vlfeedback(index, dict_of_lists=True) for index in range(3)])
    first, second = load(one, image_root=folder / "img"), load(two, image_root=folder / "img")
    assert first.to_list() == second.to_list()
    group = first[1]
    assert group["id"] == "svit-1"
    assert group["models"] == ["gpt4v", "fuyu-8b", "mmgpt", "otter"]
    assert group["ratings"][0] == {"Helpfulness": 4.0, "Ethical Considerations": 5.0, "Visual Faithfulness": 3.0}
    assert group["rationales"][3]["Visual Faithfulness"] == "Visual Faithfulness is 1"
    assert sorted(map(tuple, group["pairs"])) == [(0, 1), (0, 2), (0, 3), (1, 3), (2, 1), (2, 3)]
    assert open_image(group["images"][0]).tobytes() == files.picture(1).tobytes()


def test_vlfeedback_parquet_with_an_image_column(folder, load):
    record = files.vlfeedback(0, dict_of_lists=True)
    del record["img_path"]
    pq.write_table(pa.Table.from_pylist([{**record, "image": files.embedded(2)}]), folder / "x.parquet")
    group = load(folder / "x.parquet")[0]
    assert open_image(group["images"][0]).tobytes() == files.picture(2).tobytes()
    assert len(group["pairs"]) == 6


def test_vlfeedback_jsonl_with_a_zip_of_images_is_read_in_place(folder, load, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("nested/dir/0.png", files.png(0))
    path = files.write_lines(folder / "a.jsonl", [files.vlfeedback(0)])
    group = load(path, image_root=tmp_path / "images.zip")[0]
    assert group["images"][0] == {"bytes": None, "path": f"zip://nested/dir/0.png::{tmp_path / 'images.zip'}"}
    assert open_image(group["images"][0]).tobytes() == files.picture(0).tobytes()
    encoded = load(path, image_root=tmp_path / "images.zip").cast_column("images", datasets.List(datasets.Image()))
    assert (
        encoded[0]["images"][0].tobytes() == files.picture(0).tobytes()
    )  # the path form is the one `datasets` itself understands


def test_one_zip_with_records_and_images(folder, load, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("data/rows.jsonl", json.dumps(files.vlfeedback(0)) + "\n")
        archive.writestr("data/0.png", files.png(0))
    assert open_image(load(tmp_path / "all.zip")[0]["images"][0]).tobytes() == files.picture(0).tobytes()


def test_hub_names_go_through_load_dataset(monkeypatch, load):
    """The hub cannot be reached here: `datasets.load_dataset` is the one call that is replaced."""
    rows = datasets.Dataset.from_list(
        [{**files.vlfeedback(0, dict_of_lists=True), "image": files.embedded(0)}]
    ).cast_column("image", datasets.Image())
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split, cache_dir: calls.append((name, split)) or rows)
    group = load("MMInstruction/VLFeedback", split="validation")[0]
    assert calls == [("MMInstruction/VLFeedback", "validation")]
    assert len(group["pairs"]) == 6
    assert open_image(group["images"][0]).tobytes() == files.picture(0).tobytes()


def test_trl_conversations_with_images_are_regrouped(load):
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = [
        {
            "images": [files.embedded(0)],
            "prompt": turn("user", "Q"),
            "chosen": turn("assistant", a),
            "rejected": turn("assistant", b),
        }
        for a, b in (("best", "middle"), ("best", "worst"), ("middle", "worst"))
    ]
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    groups, report = load(dataset, return_report=True)
    assert len(groups) == 1 and groups[0]["responses"] == ["best", "middle", "worst"]
    assert groups[0]["pairs"] == [[0, 1], [0, 2], [1, 2]]
    assert (report.regrouped.response_forwards, report.regrouped.responses, report.regrouped.prompt_forwards_saved) == (
        6,
        3,
        5,
    )
    assert len(load(dataset, regroup_pairs=False)) == 3
    best = load(dataset, pairs="best_vs_worst")[0]
    assert best["pairs"] == [[0, 2]]


def test_trl_implicit_prompt(load):
    shared = [{"role": "user", "content": "Q"}]
    row = {
        "chosen": [*shared, {"role": "assistant", "content": "yes"}],
        "rejected": [*shared, {"role": "assistant", "content": "no"}],
    }
    group = load(datasets.Dataset.from_list([row]))[0]
    assert group["responses"] == ["yes", "no"] and prompt_text(group["prompt"]) == "Q" and group["images"] == []


def test_trl_parts_place_the_images_and_system_turns_stay(folder, load):
    part = lambda kind, text=None: {"type": kind, "text": text}  # noqa: E731
    prompt = [
        {"role": "system", "content": [part("text", "Be brief.")]},
        {"role": "user", "content": [part("text", "First"), part("image"), part("text", "then"), part("image")]},
    ]
    row = {"prompt": prompt, "images": ["img/0.png", "img/1.png"], "chosen": "x", "rejected": "y"}
    group = load(files.write_lines(folder / "t.jsonl", [row]))[0]
    assert [p["type"] for p in group["prompt"][1]["content"]] == ["text", "image", "text", "image"]
    assert group["prompt"][0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert len(group["images"]) == 2


def test_mmpr_meta_file_names_the_image_root_of_each_annotation(tmp_path, load):
    base = tmp_path / "MMPR"
    files.write_images(base / "images" / "one", 1)
    files.write_images(base / "images" / "two", 2)
    files.write_lines(base / "annotations" / "one.jsonl", [PAIR_FORMATS["mmpr"]("0.png")])
    files.write_lines(
        base / "annotations" / "two.jsonl", [{"image": ["0.png", "1.png"], "question": "<image><image>Same?", **PAIR}]
    )
    meta = {
        name: {"root": f"MMPR/images/{name}", "annotation": f"MMPR/annotations/{name}.jsonl", "repeat_time": 1}
        for name in ("one", "two")
    }
    (base / "meta.json").write_text(json.dumps(meta))
    for source in (base, base / "meta.json"):
        groups = load(source)
        check_pair(groups[0])
        assert [len(group["images"]) for group in groups] == [1, 2]
        assert groups[0]["images"][0]["path"].endswith("images/one/0.png") and groups[1]["images"][0]["path"].endswith(
            "images/two/0.png"
        )


def test_llava_rlhf_conversations_with_and_without_the_answer_that_the_outputs_stand_for(folder, load):
    turns = [*HUMAN, {"from": "gpt", "value": "first"}, {"from": "human", "value": "And now?"}]
    record = {**PAIR_FORMATS["llava-rlhf"]("img/0.png"), "conversations": turns}
    groups = load(
        files.write_lines(
            folder / "l.jsonl", [record, {**record, "conversations": [*turns, {"from": "gpt", "value": "x"}]}]
        ),
        regroup_pairs=False,
    )
    assert groups[0]["prompt"] == groups[1]["prompt"]
    assert prompt_text(groups[0]["prompt"]) == "What is it?\nfirst\nAnd now?"


def test_json_files_with_a_byte_order_mark(tmp_path, load):
    row = {"prompt": "Q", **PAIR}
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps([row]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\ufeff" + json.dumps(row) + "\n", encoding="utf-8")
    assert len(load(tmp_path / "a.json")) == len(load(tmp_path / "b.jsonl")) == 1


def test_a_json_file_with_one_record_or_a_list_below_a_key(folder, load):
    record = files.vlfeedback(0)
    for content in (record, [record], {"version": 1, "data": [record]}):
        for indent in (None, 1):
            (folder / "rows.json").write_text(json.dumps(content, indent=indent))
            assert load(folder / "rows.json", image_root=folder / "img")["id"][:] == ["svit-0"]


def test_hidden_files_are_no_data(folder, load, tmp_path):
    row = json.dumps({"prompt": "Q", "image": "a/0.png", **PAIR}) + "\n"
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for name, content in {
            "__MACOSX/d/._rows.jsonl": b"\0\5",
            "d/": b"",
            "d/rows.jsonl": row,
            "d/a/0.png": files.png(0),
        }.items():
            archive.writestr(name, content)
    assert len(load(tmp_path / "mac.zip")) == 1
    files.write_lines(folder / "rows.jsonl", [{"prompt": "Q", **PAIR}])
    files.write_lines(folder / ".ipynb_checkpoints" / "rows.jsonl", [{"prompt": "R", **PAIR}])
    assert len(load(folder)) == 1


def test_what_a_directory_holds_beside_parquet_is_named(folder, load, caplog):
    pq.write_table(pa.Table.from_pylist([{"prompt": "Q", **PAIR}]), folder / "a.parquet")
    files.write_lines(folder / "b.jsonl", [{"prompt": "R", **PAIR}])
    assert len(load(folder)) == 1
    assert "reading only its .parquet files; ignoring" in caplog.text and "b.jsonl" in caplog.text


def test_a_meta_file_of_another_kind_is_not_an_index(folder, load):
    files.write_lines(folder / "rows.jsonl", [{"prompt": "Q", **PAIR}])
    (folder / "meta.json").write_text('{"author": "me"}')
    assert len(load(folder)) == 1


def test_mm_rlhf_video_and_tie_rows_are_counted_not_raised(folder, load):
    base = PAIR_FORMATS["mm-rlhf"]("img/0.png")
    rows = [base, {**base, "image": None, "video": "a.mp4"}, {**base, "is_tie": True}]
    groups, report = load(files.write_lines(folder / "dpo_pairs.jsonl", rows), return_report=True)
    assert len(groups) == 1
    assert report.reasons() == {"a video row; silkie trains on images and text": 1, "marked as a tie by the source": 1}


def test_a_tie_in_a_file_that_starts_like_trl_rows(folder, load):
    """MM-RLHF's `is_tie` is optional: the first record may lack it."""
    row = {"prompt": "What is it?", **PAIR, "image": "img/0.png"}
    groups, report = load(
        files.write_lines(folder / "dpo_pairs.jsonl", [row, {**row, "prompt": "R", "is_tie": True}]), return_report=True
    )
    assert (len(groups), report.format, report.reasons()) == (1, "trl", {"marked as a tie by the source": 1})


def test_an_empty_image_list_does_not_hide_the_image(folder, load):
    row = {"prompt": "What is it?", **PAIR, "images": [], "image": "img/0.png"}
    check_pair(load(files.write_lines(folder / "rows.jsonl", [row]))[0])


def test_paths_start_beside_the_data_file(tmp_path, load):
    """Two folders with equal file names, and one more image of that name above them."""
    for seed, name in enumerate(("a", "b")):
        files.write_lines(tmp_path / "data" / name / "rows.jsonl", [{"prompt": name, "image": "img/0.png", **PAIR}])
        (tmp_path / "data" / name / "img").mkdir()
        (tmp_path / "data" / name / "img" / "0.png").write_bytes(files.png(seed))
    (tmp_path / "data" / "img").mkdir()
    (tmp_path / "data" / "img" / "0.png").write_bytes(files.png(9))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in (tmp_path / "data").rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    for source in (tmp_path / "data", tmp_path / "data.zip"):
        decoded = [open_image(group["images"][0]).tobytes() for group in load(source)]
        assert decoded == [files.picture(0).tobytes(), files.picture(1).tobytes()]


def test_own_groups_with_given_pairs_and_with_ratings(folder, load):
    given = files.group_record(images=["img/0.png"], pairs=[[1, 0]], pair_weights=[0.5], ratings=...)
    rated = files.group_record(
        images=["img/0.png"], responses=[{"model": "m", "response": "good"}, {"model": "n", "response": "bad"}]
    )
    groups = load(files.write_lines(folder / "g.jsonl", [given, rated]))
    assert groups["pairs"][:] == [[[1, 0]], [[0, 1]]]
    assert groups["pair_weights"][:] == [[0.5], [1.0]]
    assert groups["models"][:] == [None, ["m", "n"]]
    assert groups["ratings"][:] == [None, [{"Help": 5.0}, {"Help": 1.0}]]


def test_groups_survive_parquet_and_load_again(folder, load, tmp_path):
    groups = load(files.write_lines(folder / "g.jsonl", [files.vlfeedback(0)]), image_root=folder / "img")
    groups.to_parquet(tmp_path / "g.parquet")
    assert load(tmp_path / "g.parquet").to_list() == groups.to_list()
    groups.save_to_disk(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved.remove_columns("images").to_list() == groups.remove_columns("images").to_list()
    assert saved[0]["images"][0]["bytes"] == files.png(0)  # save_to_disk makes the data independent of the image files
    assert load(groups).to_list() == groups.to_list()


def test_groups_keep_their_form_whichever_way_they_are_read_again(folder, load, tmp_path):
    """Without it a row of strings would go through the chat template, and turns would be trained on as JSON text."""
    plain = {"prompt": "What is it?", "chosen": "a black cat", "rejected": "a dog"}
    asked = [{"role": "user", "content": "What is it?"}]
    call = {"role": "assistant", "content": "look", "tool_calls": [{"function": {"name": "see", "arguments": "{}"}}]}
    told = {"role": "tool", "content": "a cat"}
    turns = {
        "prompt": [*asked, call, told],
        "chosen": [{"role": "assistant", "content": "a cat"}, *asked, {"role": "assistant", "content": "a cat"}],
        "rejected": [{"role": "assistant", "content": "a dog"}],
        "tools": [{"name": "see"}],
        "chat_template_kwargs": {"thinking": False},
    }
    groups = load(files.write_lines(folder / "rows.jsonl", [plain, turns]))
    assert groups["form"][:] == ["plain", "turns"] and groups["prompt_turns"][1] and groups["tools"][1]
    groups.to_json(tmp_path / "groups.jsonl")
    for again in (tmp_path / "groups.jsonl", groups.add_column("note", ["a", "b"]), groups.with_transform(_columns)):
        assert load(again).to_list() == groups.to_list()
    longest = load(groups, pairs="longest")
    assert longest.to_list() == groups.to_list()


def test_options_of_reading_reach_data_that_has_the_schema_already(folder, load, tmp_path):
    row = {"images": ["img/0.png"], "prompt": "What is it?", "responses": ["a cat", "a dog"], "pairs": [[0, 1]]}
    row["ratings"] = [{"wit": 8, "care": 4}, {"wit": 2, "care": 3}]
    groups = load(files.write_lines(folder / "rows.jsonl", [row]), rating_scale=(1, 10))
    [stored] = groups["images"][0]
    moved = groups.map(lambda row: {"images": [{**stored, "path": "img/0.png"}]}, features=groups.features)
    assert load(moved, image_root=folder)["images"][0] == [stored]
    assert list(load(groups, aspects=["care", "wit", "zeal"]).features["ratings"].feature) == ["care", "wit", "zeal"]
    with pytest.raises(DataError, match="rating_scale"):
        load(groups, rating_scale=(1, 5))


def _columns(batch):
    return batch


def test_what_a_group_gives_the_template_may_be_json_itself(folder, load):
    record = files.group_record(images=[], tools=[{"name": "see"}], chat_template_kwargs={"thinking": False})
    (group,) = load(files.write_lines(folder / "g.jsonl", [record]))
    assert json.loads(group["tools"]) == [{"name": "see"}]
    assert json.loads(group["chat_template_kwargs"]) == {"thinking": False}
    with pytest.raises(DataError, match="column 'form': found 'prose'; expected plain, turns or null"):
        load(files.write_lines(folder / "g.jsonl", [files.group_record(images=[], form="prose")]))


def test_groups_without_a_pair_are_dropped_from_loaded_groups_too(folder, load):
    tied = files.group_record(images=["img/0.png"], id="tied", ratings=[{"Help": 1}] * 2)
    everything = load(
        files.write_lines(folder / "g.jsonl", [tied, files.group_record(images=["img/0.png"])]), keep_unpaired=True
    )
    groups, report = load(everything, return_report=True)
    assert groups["id"][:] == ["g"] and [problem.row for problem in report.problems] == ["row 0"]
    assert len(load(everything, keep_unpaired=True)) == 2
    with pytest.raises(DataError, match="no group is left of 1 rows"):
        load(everything.select([0]))


def test_splits_of_local_files_are_read_off_their_names(folder, load):
    files.write_lines(folder / "train.jsonl", [files.group_record(images=[], id="a")])
    files.write_lines(folder / "test-part.jsonl", [files.group_record(images=[], id="b")])
    assert load(folder)["id"][:] == ["a"]
    assert load(folder, split="test")["id"][:] == ["b"]
    with pytest.raises(DataError, match=r"has no split 'validation'; its files are .*train \(1\)"):
        load(folder, split="validation")


def test_a_source_of_your_own(folder, load, monkeypatch):
    monkeypatch.setattr("silkie.data.registry.SOURCES", dict(SOURCES))

    @register_source("mine", detect=lambda record: {"picture", "better", "worse"} <= record.keys())
    def mine(row: Row) -> Group:
        return Group(
            images=[row.image("picture")],
            prompt=[user_turn(row.text("question"), n_images=1)],
            responses=[row.text("better"), row.text("worse")],
            pairs=[(0, 1)],
        )

    row = {"picture": "img/0.png", "question": "What is it?", "better": "a good answer", "worse": "a bad answer"}
    check_pair(load(files.write_lines(folder / "mine.jsonl", [row]))[0])
    with pytest.raises(DataError, match=r"mine.jsonl \(mine\), line 1, column 'worse': found no such column"):
        load(
            files.write_lines(folder / "mine.jsonl", [{key: row[key] for key in ("picture", "question", "better")}]),
            format="mine",
        )


def test_every_module_of_the_folder_registers_a_source():
    """A new source is a new file: nothing else names it."""
    import pkgutil

    from silkie.data import sources

    registered = {source.adapt.__module__.rpartition(".")[2] for source in SOURCES.values()}
    assert {module.name for module in pkgutil.iter_modules(sources.__path__)} <= registered
