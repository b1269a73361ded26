"""Every broken row has a message that names source, row, column, what was found and what was expected;
`on_error="skip"` counts it instead."""

from __future__ import annotations

import errno
import functools
import json
import os
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from silkie.data import SOURCES, DataError, Group, RowError, load_preferences, register_source, user_turn
from tests.support import preference_files as files

PAIR = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
QUESTION = {"image": "0.png", "question": "Q", "chosen": "yes", "rejected": "no"}
LLAVA = {
    "image": "0.png",
    "conversations": [{"from": "human", "value": "Q"}],
    "output_1": {"value": "a"},
    "output_2": {"value": "b"},
    "preference": 1,
}
TALK = {"conversations": [{"from": "human", "value": "Q"}], "chosen": "a", "rejected": "b"}


def feedback(**changes):
    return {**files.vlfeedback(0), **changes}


def without(record, *names):
    return {key: value for key, value in record.items() if key not in names}


def with_response(text):
    record = files.vlfeedback(0)
    record["completions"][2]["response"] = text
    return record


def with_annotations(annotations):
    record = files.vlfeedback(0)
    record["completions"][1]["annotations"] = annotations
    return record


# name: (format, broken record, column, words of the message)
BROKEN = {
    "not JSON": ("trl", '{"prompt": ', "(record)", "found Expecting value"),
    "not an object": ("trl", "[1, 2]", "(record)", r"found \[1, 2\]; expected a JSON object"),
    "missing column": (
        "trl",
        without(PAIR, "rejected"),
        "rejected",
        r"no such column \(there are: 'prompt', 'chosen'\)",
    ),
    "null answer": ("trl", {**PAIR, "chosen": None}, "chosen", "found None; expected a non-empty response"),
    "empty answer": ("trl", {**PAIR, "chosen": "  "}, "chosen", "found '  '; expected a non-empty string"),
    "empty prompt": ("trl", {**PAIR, "prompt": ""}, "prompt", "found ''"),
    "prompt of a wrong type": ("trl", {**PAIR, "prompt": 3}, "prompt", "found 3; expected a string or a conversation"),
    "video": ("trl", {**PAIR, "videos": ["a.mp4"]}, "videos", "expected no videos"),
    "tools": ("trl", {**PAIR, "tools": "[{"}, "tools", "expected JSON text"),
    "prompt ends with an answer": (
        "trl",
        {**PAIR, "prompt": [{"role": "assistant", "content": "x"}]},
        "prompt",
        "ends with a user turn",
    ),
    "unknown role": ("trl", {**PAIR, "prompt": [{"role": "robot", "content": "x"}]}, "prompt[0]", "found role 'robot'"),
    "video part": (
        "trl",
        {**PAIR, "prompt": [{"role": "user", "content": [{"type": "video"}]}]},
        "prompt[0]",
        "Videos are not supported",
    ),
    "turns of an answer that starts with a user": (
        "trl",
        {**PAIR, "prompt": TALK["conversations"], "chosen": [{"role": "user", "content": "x"}] * 2},
        "chosen",
        "an answer that starts with an assistant turn",
    ),
    "answer of a user": (
        "trl",
        {**PAIR, "chosen": [{"role": "user", "content": "x"}]},
        "chosen",
        "found a turn of role 'user'",
    ),
    "mark without image": ("trl", {**PAIR, "prompt": "<image>Q"}, "prompt", r"1 <image> marks for 0 image\(s\)"),
    "images without marks": (
        "sharegpt",
        {**TALK, "images": ["0.png", "0.png"], "conversations": [{"from": "human", "value": "<image>Q"}]},
        "conversations",
        r"1 image mark\(s\) for 2 image\(s\)",
    ),
    "no conversation": (
        "sharegpt",
        without(TALK, "conversations"),
        "conversations",
        r"no such column .* expected a list of turns",
    ),
    "no image to compare on": ("llava-rlhf", without(LLAVA, "image"), "image", "found None; expected an image"),
    "no turns": ("sharegpt", {**TALK, "conversations": []}, "conversations", r"found \[\]; expected a list of turns"),
    "missing image file": (
        "mmpr",
        {**QUESTION, "image": "9.png"},
        "image",
        "found '9.png', and no file of that name beside the data",
    ),
    "no image": ("spa-vl", {**QUESTION, "image": None, "image_name": "x"}, "image", "found None; expected an image"),
    "image of a wrong type": ("mmpr", {**QUESTION, "image": 5}, "image", r"found no image \(5\)"),
    "remote image": (
        "mmpr",
        {**QUESTION, "image": "https://example.org/a.png"},
        "image",
        "refused; pass allow_remote_images=True",
    ),
    "broken data URI": ("mmpr", {**QUESTION, "image": "data:image/png;base64,%%%"}, "image", "base64 is broken"),
    "text is not JSON": (
        "rlhf-v",
        {"text": "{", "image": "0.png"},
        "text",
        "expected a JSON object with question, chosen and rejected",
    ),
    "text lacks a key": (
        "rlhf-v",
        {"text": json.dumps({"question": "Q", "chosen": "a"}), "image": "0.png"},
        "text",
        "expected a JSON object",
    ),
    "preference 3": ("llava-rlhf", {**LLAVA, "preference": 3}, "preference", "found 3; expected 1 or 2"),
    "history": (
        "alpaca",
        {"instruction": "Q", "chosen": "a", "rejected": "b", "history": [["x"]]},
        "history[0]",
        r"expected \[instruction, response\]",
    ),
    "empty response": ("vlfeedback", with_response(""), "completions[2].response", "found ''"),
    "no completions": ("vlfeedback", feedback(completions=None), "completions", "expected a list of completions"),
    "unequal lists": (
        "vlfeedback",
        feedback(completions={"response": ["a", "b"], "model": ["m"]}),
        "completions",
        "lists of different lengths",
    ),
    "no image at all": (
        "vlfeedback",
        without(files.vlfeedback(0), "img_path"),
        "image",
        "an image in `image` or a file name in `img_path`",
    ),
    "other models": (
        "vlfeedback",
        feedback(models=["a", "b", "c", "d"]),
        "models",
        "The judge's texts may have been swapped",
    ),
    "completion of a wrong type": (
        "vlfeedback",
        feedback(completions=["x"]),
        "completions[0]",
        "found 'x'; expected a completion",
    ),
    "annotations of a wrong type": (
        "vlfeedback",
        with_annotations("x"),
        "completions[1].annotations",
        "expected an object {aspect",
    ),
    "aspect of a wrong type": (
        "vlfeedback",
        with_annotations({"Helpfulness": 4}),
        "completions[1].annotations.Helpfulness",
        'found 4; expected an object {"Rating"',
    ),
    "rationale of a wrong type": (
        "vlfeedback",
        with_annotations({"Helpfulness": {"Rating": "4", "Rationale": ["x"]}}),
        "rationales[1].Helpfulness",
        r"found \['x'\]; expected text",
    ),
    "models of a wrong type": (
        "vlfeedback",
        feedback(models="gpt4v"),
        "models",
        "found 'gpt4v'; expected a list of model names",
    ),
    "half of an emoji": (
        "trl",
        {**PAIR, "chosen": "well done \ud83d"},
        "responses[0]",
        r"found 'well done \\ud83d'; .*half of a surrogate pair",
    ),
    "input of a wrong type": (
        "alpaca",
        {"instruction": "Q", "input": 3, "chosen": "a", "rejected": "b"},
        "input",
        "found 3",
    ),
    "image bytes of a wrong type": (
        "mmpr",
        {**QUESTION, "image": {"bytes": "abc", "path": None}},
        "image",
        "an image object of bytes 'str'",
    ),
    "pairs of a wrong type": ("groups", files.group_record(pairs=3), "pairs", "found 3; expected a list of"),
    "pair of a wrong type": (
        "groups",
        files.group_record(pairs=[None]),
        "pairs",
        r"found None; expected \[chosen, rejected\]",
    ),
    "rationales of a wrong type": (
        "groups",
        files.group_record(rationales=["x", "y"]),
        "rationales",
        "expected one object {aspect: text} per response",
    ),
    "model of a wrong type": ("groups", files.group_record(models=["m", 4]), "models[1]", "found 4; expected text"),
    "pair out of range": (
        "groups",
        files.group_record(pairs=[[0, 2]]),
        "pairs",
        r"found \[0, 2\]; expected two different indices from 0 to 1",
    ),
    "pair with itself": ("groups", files.group_record(pairs=[[1, 1]]), "pairs", "two different indices"),
    "negative pair": ("groups", files.group_record(pairs=[[0, -1]]), "pairs", "two different indices"),
    "ratings too short": (
        "groups",
        files.group_record(ratings=[{"Help": 1}]),
        "ratings",
        "found 1 entries; expected one entry for each of the 2",
    ),
    "rating is a number": (
        "groups",
        files.group_record(ratings=[1, 2]),
        "ratings",
        r"expected one object \{aspect: rating\} per response",
    ),
    "no pairs and no ratings": (
        "groups",
        files.group_record(ratings=...),
        "ratings",
        "expected ratings or pairs for pairs='all'",
    ),
    "weights": (
        "groups",
        files.group_record(pairs=[[0, 1]], pair_weights=[1, 2]),
        "pair_weights",
        "one weight per pair",
    ),
    "negative weight": (
        "groups",
        files.group_record(pairs=[[0, 1]], pair_weights=[-1]),
        "pair_weights",
        "finite weights >= 0",
    ),
    "weight beyond float32": (
        "groups",
        files.group_record(pairs=[[0, 1]], pair_weights=[1e39]),
        "pair_weights",
        "finite weights >= 0",
    ),
    "huge weight": (
        "groups",
        files.group_record(pairs=[[0, 1]], pair_weights=[10**400]),
        "pair_weights",
        "finite weights >= 0",
    ),
    "address part": (
        "trl",
        {**PAIR, "prompt": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "prompt[0]",
        'or {"type": "image"}. Repair',
    ),
    "no responses": (
        "groups",
        files.group_record(responses=[], ratings=[]),
        "responses",
        "expected at least one response",
    ),
}


@pytest.fixture
def write(tmp_path):
    datasets.disable_progress_bars()
    files.write_images(tmp_path, 1)
    return lambda *records: files.write_lines(tmp_path / "rows.jsonl", list(records))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_row(case, write, tmp_path):
    name, record, column, words = BROKEN[case]
    path = write(record)
    with pytest.raises(RowError, match=words) as caught:
        load_preferences(path, format=name, cache_dir=tmp_path)
    assert (caught.value.row, caught.value.column) == ("line 1", column)
    assert str(caught.value).startswith(f"rows.jsonl ({name}), line 1, column {column!r}: found ")
    assert caught.value.hint  # what to do


def test_skip_counts_and_lists_what_raise_refuses(write, tmp_path):
    path = write(PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": " "}, "{", {**PAIR, "prompt": "R"})
    groups, report = load_preferences(path, on_error="skip", cache_dir=tmp_path, return_report=True)
    assert groups["id"][:] == ["rows.jsonl:line-1", "rows.jsonl:line-5"]
    assert [problem.row for problem in report.problems] == ["line 2", "line 3", "line 4"]
    assert report.reasons() == {
        "column 'chosen': expected a non-empty string": 1,
        "column 'rejected': expected a non-empty string": 1,
        "column '(record)': expected a JSON object": 1,
    }
    again = load_preferences(path, on_error="skip", cache_dir=tmp_path, return_report=True)[1]
    assert [problem.message for problem in again.problems] == [
        problem.message for problem in report.problems
    ]  # from the cache, too


def test_the_error_reaches_the_caller_from_worker_processes(tmp_path, monkeypatch):
    monkeypatch.setattr("silkie.data.raw.SHARD_BYTES", 100)
    path = files.write_lines(tmp_path / "rows.jsonl", [PAIR] * 40 + [{**PAIR, "chosen": ""}])
    with pytest.raises(RowError, match=r"rows.jsonl \(trl\), line 41, column 'chosen'"):
        load_preferences(path, num_proc=2, cache_dir=tmp_path)


def test_groups_without_a_pair_are_dropped_and_counted(write, tmp_path):
    path = write(
        files.group_record(id="kept", images=[]),
        files.group_record(images=[], ratings=[{"Help": 2}, {"Help": 2}]),
        files.group_record(images=[], ratings=[{"Help": "N/A"}, {"Help": 2}]),
        files.group_record(images=[], responses=["one"], ratings=[{"Help": 1}]),
        files.group_record(images=[], responses=["same", "same"]),
    )
    groups, report = load_preferences(path, cache_dir=tmp_path, return_report=True)
    assert groups["id"][:] == ["kept"]
    assert report.reasons() == {
        "no pairs: tie": 1,
        "no pairs: rating not a number": 1,
        "no pairs: a single response": 1,
        "no pairs: identical responses": 1,
    }
    assert report.notes == {"tie": 1, "rating not a number": 1, "identical responses": 1}
    assert len(load_preferences(path, cache_dir=tmp_path, keep_unpaired=True)) == 5


def test_an_aspect_that_the_first_rows_lack(write, tmp_path, monkeypatch):
    monkeypatch.setattr("silkie.data.loading.ASPECT_SAMPLE", 1)
    path = write(
        files.group_record(images=[]),
        files.group_record(images=[], ratings=[{"Help": 5, "Tone": 1}, {"Help": 1, "Tone": 1}]),
    )
    with pytest.raises(
        RowError,
        match="line 2, column 'ratings': found aspect 'Tone'; expected one of the aspects 'Help'. .*pass aspects=",
    ):
        load_preferences(path, cache_dir=tmp_path)
    assert load_preferences(path, cache_dir=tmp_path, aspects=("Help", "Tone"))[0]["ratings"] is not None


def test_pair_options_that_the_source_cannot_serve(write, tmp_path):
    path = write(files.group_record(images=[]))
    with pytest.raises(RowError, match=r"column 'ratings': found aspect 'Tone' is not among the rated ones: 'Help'"):
        from silkie.data import PairOptions

        load_preferences(path, pairs=PairOptions(aspects=["Tone"]), cache_dir=tmp_path)
    with pytest.raises(
        RowError, match="column 'models': found pairs='model' needs the models of the group, and there are none"
    ):
        load_preferences(path, pairs="model:gpt4v", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="pairs='bestest' is not known; choose from all, best_vs_worst"):
        load_preferences(path, pairs="bestest", cache_dir=tmp_path)
    with pytest.raises(RowError, match=r"found \(0,\); expected \(chosen, rejected\)"):
        load_preferences(path, pairs=lambda group: [(0,)], cache_dir=tmp_path)


def test_nothing_left_says_why(write, tmp_path):
    with pytest.raises(DataError, match=r"no group is left of 1 rows(.|\n)*no pairs: tie: 1"):
        load_preferences(write(files.group_record(images=[], ratings=[{"Help": 1}, {"Help": 1}])), cache_dir=tmp_path)


def test_a_message_says_what_was_wrong_where_nothing_is_left(write, tmp_path):
    with pytest.raises(DataError, match=r"The first: rows.jsonl \(trl\), line 1, column 'chosen': found ''"):
        load_preferences(write({**PAIR, "chosen": ""}), on_error="skip", cache_dir=tmp_path)


def test_what_a_source_of_the_user_raises_names_the_row(write, tmp_path, monkeypatch):
    monkeypatch.setattr("silkie.data.registry.SOURCES", dict(SOURCES))

    @register_source("mine", detect=lambda record: "better" in record)
    def mine(row):
        return Group(
            images=[], prompt=[user_turn("Q")] if row.record["asked"] else [], responses=["a", "b"], pairs=[(0, 1)]
        )

    path = write({"better": 1, "asked": True}, {"better": 1}, {"better": 1, "asked": False})
    with pytest.raises(
        RowError,
        match=r"\(mine\), line 2, column '\(record\)': found a record that raised KeyError: 'asked' \(in mine, line \d+\)",
    ):
        load_preferences(path, cache_dir=tmp_path)
    groups, report = load_preferences(
        path, on_error="skip", cache_dir=tmp_path, return_report=True, regroup_pairs=False
    )
    assert len(groups) == 1 and [problem.row for problem in report.problems] == ["line 2", "line 3"]
    assert report.problems[1].message.endswith(
        "column 'prompt': found []; expected a conversation that ends with a user turn."
    )


def test_a_source_without_source_code(write, tmp_path, monkeypatch):
    monkeypatch.setattr("silkie.data.registry.SOURCES", dict(SOURCES))
    adapt = functools.partial(
        lambda prompt, row: Group(images=[], prompt=[user_turn(prompt)], responses=["a", "b"], pairs=[(0, 1)]), "Q"
    )
    register_source("mine", detect=lambda record: "better" in record)(adapt)
    assert len(load_preferences(write({"better": 1}), cache_dir=tmp_path)) == 1


def test_what_a_pair_function_gets_wrong_names_the_row(write, tmp_path):
    path = write(files.group_record(images=[]))
    with pytest.raises(
        RowError,
        match=r"line 1, column '\(record\)': found a record that raised ZeroDivisionError: division by zero \(in <lambda>",
    ):
        load_preferences(path, pairs=lambda group: 1 / 0, cache_dir=tmp_path)
    with pytest.raises(RowError, match=r"found \(0.5, 1\); expected \(chosen, rejected\)"):
        load_preferences(path, pairs=lambda group: [(0.5, 1)], cache_dir=tmp_path)
    for weight in (float("nan"), -1.0, 1e39):
        with pytest.raises(
            RowError, match="line 1, column 'pair_weights': .*expected a finite weight >= 0 from the pair function"
        ):
            load_preferences(path, pairs=lambda group, weight=weight: [(0, 1, weight)], cache_dir=tmp_path)


def test_a_pair_function_that_fails_on_regrouped_pair_rows(write, tmp_path):
    path = write(PAIR, {**PAIR, "prompt": "R"}, {**PAIR, "prompt": "R", "rejected": "c"})
    only_two = lambda group: [(0, 1)] if len(group["responses"]) == 2 else 1 / 0  # noqa: E731
    with pytest.raises(
        RowError, match=r"rows.jsonl \(trl\), row 1, column '\(record\)': found a record that raised ZeroDivisionError"
    ):
        load_preferences(path, pairs=only_two, cache_dir=tmp_path)
    groups, report = load_preferences(path, pairs=only_two, on_error="skip", cache_dir=tmp_path, return_report=True)
    assert len(groups) == 1 and [(problem.kind, problem.row) for problem in report.problems] == [("error", "row 1")]


def test_the_hint_of_a_video_row_names_the_source_that_counts_it(write, tmp_path):
    """MM-RLHF's image rows look like TRL's; only its video rows give it away."""
    path = write({**PAIR, "image": "0.png"}, {**PAIR, "video": "a.mp4"})
    with pytest.raises(RowError, match="line 2, column 'video': .*format='mm-rlhf' counts them"):
        load_preferences(path, cache_dir=tmp_path)
    report = load_preferences(path, format="mm-rlhf", cache_dir=tmp_path, return_report=True)[1]
    assert report.reasons() == {"a video row; silkie trains on images and text": 1}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("cut.parquet", "cut.parquet' is not a parquet file that can be read; it may be cut off"),
        ("cut.zip", "'cut.zip' is not a zip archive that can be read; it may be cut off"),
        ("nowhere/at/all.jsonl", "neither an existing file or directory nor a dataset name"),
        ("./missing.parquet", "neither an existing file or directory nor a dataset name"),
        ("notes.txt", "cannot read a .txt; expected .jsonl, .json, .parquet, .zip or a directory"),
        ("empty", "no .jsonl, .json, .parquet file in it"),
        ("empty.jsonl", "no record in it"),
        ("number.json", "found a JSON int, expected a list of records"),
        ("blank.jsonl", "no record in it"),
        ("none.parquet", "no record in it"),
        ("none.json", "no record in it"),
        ("latin.jsonl", "no record in it .expected JSON objects.; line 1 is .*utf-8"),
        ("parquet.zip", "no .jsonl, .json file in it"),
        ("unknown.jsonl", r"no known format has its columns \('a', 'b'\). Known formats: .*trl"),
    ],
)
def test_sources_that_cannot_be_read(source, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + b"x" * 50)
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04" + b"x" * 50)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    (tmp_path / "none.json").write_text("[]")
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in PAIR}), tmp_path / "none.parquet")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps({**PAIR, "prompt": "é"}, ensure_ascii=False).encode("latin-1"))
    with zipfile.ZipFile(tmp_path / "parquet.zip", "w") as archive:
        archive.write(tmp_path / "none.parquet", "rows.parquet")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "unknown.jsonl").write_text('{"a": 1, "b": 2}\n')
    with pytest.raises(DataError, match=words):
        load_preferences(source, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["blank.jsonl", "none.json", "none.parquet"])
def test_no_record_under_a_given_format(name, tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    (tmp_path / "none.json").write_text("[]")
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in PAIR}), tmp_path / "none.parquet")
    with pytest.raises(DataError, match=f"{name}: no record in it"):
        load_preferences(tmp_path / name, format="trl", cache_dir=tmp_path / "cache")


def test_empty_files_among_others(tmp_path, monkeypatch):
    """A block of empty files only: `datasets` writes no file without a row."""
    monkeypatch.setattr("silkie.data.convert.BLOCK_SHARDS", 1)
    files.write_lines(tmp_path / "rows" / "b.jsonl", [PAIR])
    for name in ("a", "c"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("\n")
    assert len(load_preferences(tmp_path / "rows", cache_dir=tmp_path / "cache")) == 1


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_full_disk_is_named(num_proc, tmp_path, monkeypatch):
    monkeypatch.setattr("silkie.data.raw.SHARD_BYTES", 100)
    path = files.write_lines(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "prompt": "R"}] * 5)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr("datasets.arrow_writer.ArrowWriter.finalize", lambda *_, **__: raise_(full))
        with pytest.raises(
            OSError,
            match="rows.jsonl: .*writing its groups to the cache in .*cache', failed: .Errno 28. No space left.*free some space",
        ):
            load_preferences(path, cache_dir=tmp_path / "cache", num_proc=num_proc)
    assert len(load_preferences(path, cache_dir=tmp_path / "cache", num_proc=num_proc)) == 2


def raise_(error):
    raise error


def test_wrong_kinds_of_dataset(tmp_path):
    rows = datasets.Dataset.from_list([PAIR])
    with pytest.raises(DataError, match=r"found a DatasetDict with splits train; pass one of them"):
        load_preferences(datasets.DatasetDict({"train": rows}))
    with pytest.raises(DataError, match="found an IterableDataset"):
        load_preferences(rows.to_iterable_dataset())
    with pytest.raises(
        DataError, match=r"found a list; expected a path, .*datasets.Dataset.from_list\(rows\) makes one"
    ):
        load_preferences([PAIR])
    with pytest.raises(DataError, match="found a NoneType; expected a path, a dataset name or a datasets.Dataset$"):
        load_preferences(None)
    with pytest.raises(DataError, match="format='nope' is not known; choose from"):
        load_preferences(rows, format="nope")
    with pytest.raises(DataError, match="image_root .* does not exist"):
        load_preferences(rows, image_root=tmp_path / "none", cache_dir=tmp_path)


def test_a_path_cannot_leave_the_image_root(tmp_path):
    files.write_images(tmp_path, 1)
    (tmp_path / "root").mkdir()
    for path in ("../0.png", str(tmp_path / "0.png")):
        source = files.write_lines(tmp_path / "rows.jsonl", [{**QUESTION, "image": path}])
        with pytest.raises(RowError, match="no file of that name below image_root"):
            load_preferences(source, image_root=tmp_path / "root", cache_dir=tmp_path)


def test_addresses_in_archives_are_looked_up_and_stay_below_the_root(tmp_path):
    """`zip://` addresses are what stored groups hold."""
    (tmp_path / "root").mkdir()
    for name in ("inside", "outside"):
        with zipfile.ZipFile(tmp_path / ("root" if name == "inside" else ".") / f"{name}.zip", "w") as archive:
            archive.writestr("0.png", files.png(0))
    load = lambda image, **options: load_preferences(  # noqa: E731
        files.write_lines(tmp_path / "rows.jsonl", [{**QUESTION, "image": image}]),
        cache_dir=tmp_path / "cache",
        **options,
    )
    inside, outside = f"zip://0.png::{tmp_path / 'root' / 'inside.zip'}", f"zip://0.png::{tmp_path / 'outside.zip'}"
    assert load(outside)[0]["images"][0]["path"] == outside
    assert load(inside, image_root=tmp_path / "root")[0]["images"][0]["path"] == inside
    with pytest.raises(
        RowError, match="line 1, column 'image': found 'zip://.*outside.zip', an archive that is not below image_root"
    ):
        load(outside, image_root=tmp_path / "root")
    for missing in (outside.replace("0.png", "1.png"), "zip://0.png::/nowhere.zip", "zip://x"):
        with pytest.raises(RowError, match="line 1, column 'image': found 'zip://.*', which cannot be read"):
            load(missing)


def test_a_link_to_nothing_is_not_an_image(tmp_path):
    (tmp_path / "0.png").symlink_to(tmp_path / "gone.png")
    source = files.write_lines(tmp_path / "rows.jsonl", [QUESTION])
    with pytest.raises(RowError, match="found '0.png', and no file of that name beside the data"):
        load_preferences(source, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("root", [None, "."])
def test_an_image_that_turns_up_later_is_no_longer_reported(root, tmp_path, monkeypatch):
    """`inspect`, repair, `inspect`: the cache of the first run must not answer for the second; and no row is read where
    nothing changed."""
    (tmp_path / "deep" / "img").mkdir(parents=True)
    source = files.write_lines(
        tmp_path / "rows.jsonl", [{**QUESTION, "image": f"deep/img/{name}.png"} for name in "abc"]
    )
    options = {"on_error": "skip", "regroup_pairs": False, "cache_dir": tmp_path / "cache", "return_report": True}
    options["image_root"] = None if root is None else tmp_path / root
    (tmp_path / "deep" / "img" / "c.png").write_bytes(files.png(0))
    for name, left in (("", 2), ("a", 1), ("b", 0)):
        if name:
            (tmp_path / "deep" / "img" / f"{name}.png").write_bytes(files.png(0))
        groups, report = load_preferences(source, **options)
        assert (len(groups), len(report.problems)) == (3 - left, left)
    monkeypatch.setattr("silkie.data.convert.stored_row", lambda *_, **__: pytest.fail("a row was converted again"))
    assert len(load_preferences(source, **options)[0]) == 3


def test_images_of_several_roots_turn_up_later(tmp_path):
    """One entry of MMPR's index has its own image root, the other one none yet."""
    files.write_lines(tmp_path / "rows" / "one.jsonl", [QUESTION])
    files.write_lines(tmp_path / "rows" / "two.jsonl", [QUESTION, {**QUESTION, "image": "1.png"}])
    (tmp_path / "images").mkdir()
    meta = {
        "one": {"root": "images", "annotation": "rows/one.jsonl"},
        "two": {"root": "none", "annotation": "rows/two.jsonl"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    files.write_images(tmp_path / "rows", 1)
    options = {"on_error": "skip", "regroup_pairs": False, "cache_dir": tmp_path / "cache", "return_report": True}
    assert len(load_preferences(tmp_path, **options)[1].problems) == 2
    files.write_images(tmp_path / "images", 1)
    files.write_images(tmp_path / "rows", 2)
    groups, _ = load_preferences(tmp_path, **options)
    assert [group["images"][0]["path"] for group in groups] == [
        str(tmp_path / place) for place in ("images/0.png", "rows/0.png", "rows/1.png")
    ]


def test_two_files_of_one_name_are_not_guessed_between(tmp_path):
    for folder in ("a", "b"):
        files.write_images(tmp_path / "img" / folder, 1)
    source = files.write_lines(tmp_path / "rows.jsonl", [{**QUESTION, "image": "elsewhere/0.png"}])
    with pytest.raises(RowError, match="2 files of that name"):
        load_preferences(source, image_root=tmp_path / "img", cache_dir=tmp_path)


def test_a_changed_file_is_read_again(write, tmp_path):
    path = write(PAIR)
    assert load_preferences(path, cache_dir=tmp_path)[0]["responses"] == ["yes", "no"]
    path.write_text(json.dumps({**PAIR, "chosen": "oui"}) + "\n")
    os.utime(path, ns=(1, 1))
    assert load_preferences(path, cache_dir=tmp_path)[0]["responses"] == ["oui", "no"]


def test_a_source_that_hands_out_an_empty_response_is_named(tmp_path, monkeypatch):
    """The check of `validate` and of training holds for what a user's own source makes, too."""
    monkeypatch.setattr("silkie.data.registry.SOURCES", dict(SOURCES))

    @register_source("empty", detect=lambda record: "picture" in record)
    def empty(row):
        return Group(images=[], prompt=[user_turn("Q")], responses=["yes", " "], pairs=[(0, 1)], pair_weights=[1.0])

    path = files.write_lines(tmp_path / "rows.jsonl", [{"picture": 1}])
    with pytest.raises(RowError, match=r"line 1, column 'responses\[1\]': found ' '; expected a non-empty string"):
        load_preferences(path, format="empty", cache_dir=tmp_path)
