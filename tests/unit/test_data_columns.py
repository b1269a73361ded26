"""Which columns decide how a record is read: never two ways, and prompt, chosen and rejected before everything else."""

import logging

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silkie.data import SOURCES, DataError, load_preferences
from silkie.data.schema import prompt_text
from tests.support import preference_files as files

TALK = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
OTHER = [{"role": "user", "content": "another question"}, {"role": "assistant", "content": "another answer"}]
SHAREGPT = [{"from": "human", "value": "another question"}]
VALUES = {  # every column that decides anything, and some that decide nothing, with values of all their shapes
    "prompt": ["a question", TALK[:1]],
    "chosen": ["a good answer", TALK, TALK[1:], {"from": "gpt", "value": "good"}],
    "rejected": ["a bad answer", OTHER, OTHER[1:], {"from": "gpt", "value": "bad"}],
    "messages": [OTHER],
    "conversations": [SHAREGPT],
    "instruction": ["another question"],
    "question": ["another question"],
    "input": ["more"],
    "text": ['{"question": "another question", "chosen": "g", "rejected": "b"}'],
    "completions": [[{"response": "x", "model": "m", "annotations": {}}]],
    "responses": [["x", "y"]],
    "completion": ["an answer", TALK[1:]],
    "label": [True],
    "output_1": [{"from": "llava", "value": "x"}],
    "output_2": [{"from": "llava", "value": "y"}],
    "preference": [1],
    "image": ["0.png"],
    "images": [["0.png"]],
    "image_path": ["0.png"],
    "image_name": ["0.png"],
    "origin_dataset": ["x"],
    "ds_name": ["x"],
    "is_tie": [False],
    "video": [None],
    "prompt_id": ["f3"],
    "score_chosen": [9.0],
}
RECORDS = st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in VALUES.items()})

# FACTS' public datasets: hub name, columns, the source that reads them.
PUBLIC = {
    "MMInstruction/VLFeedback": (("id", "prompt", "models", "completions", "image"), "vlfeedback"),
    "Zhihui/VLFeedback": (("conversations", "chosen", "rejected", "images"), "sharegpt"),
    "openbmb/RLHF-V-Dataset": (("ds_name", "image", "text", "origin_dataset", "idx", "image_path"), "rlhf-v"),
    "openbmb/RLAIF-V-Dataset": (
        ("ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"),
        "rlaif-v",
    ),
    "HuggingFaceH4/rlaif-v_formatted": (("images", "prompt", "chosen", "rejected"), "trl"),
    "yifanzhang114/MM-RLHF": (("prompt", "chosen", "rejected", "image", "is_tie"), "mm-rlhf"),
    "OpenGVLab/MMPR": (("image", "question", "chosen", "rejected"), "mmpr"),
    "sqrti/SPA-VL": (("image", "question", "chosen", "rejected", "image_name"), "spa-vl"),
    "trl-lib/kto-mix-14k": (("prompt", "completion", "label"), "trl-unpaired"),
    "zhiqings/LLaVA-Human-Preference-10K": (
        ("image", "conversations", "output_1", "output_2", "preference"),
        "llava-rlhf",
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        ("prompt", "prompt_id", "chosen", "rejected", "messages", "score_chosen", "score_rejected"),
        "trl",
    ),
}
HARMLESS = ("prompt_id", "score_chosen", "input", "language", "source", "category", "id", "image_name", "model")


def accepting(record):
    return [name for name, source in SOURCES.items() if source.detect(record)]


@given(RECORDS)
def test_no_two_detectors_accept_the_same_columns(record):
    assert len(accepting(record)) <= 1


@given(RECORDS)
def test_prompt_chosen_and_rejected_win(record):
    pair = {"prompt": "a question", "chosen": "good", "rejected": "bad"}
    assert accepting({**record, **pair})[0] in ("trl", "mm-rlhf")  # both read these three columns


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("extra", [None, *HARMLESS])
def test_public_datasets_with_an_extra_column(name, extra):
    columns, source = PUBLIC[name]
    record = {column: VALUES.get(column, ["x"])[0] for column in columns} | ({extra: "x"} if extra else {})
    expected = "spa-vl" if source == "mmpr" and extra == "image_name" else source  # what sets the two apart
    assert accepting(record) == [expected]


def rows(**extra):
    pair = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": OTHER[1:]}
    return datasets.Dataset.from_list([{**pair, **extra}])


@pytest.mark.parametrize(
    "extra",
    [
        {"messages": OTHER},
        {"conversations": SHAREGPT},
        {"instruction": "another question"},
        {"question": "another question"},
        {"responses": ["x", "y"]},
        {"completions": [{"response": "x"}]},
        {"output_1": "x", "output_2": "y", "preference": 1, "conversations": SHAREGPT},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_extra_columns_do_not_replace_the_prompt_and_are_named_in_the_log(extra, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie.data"):
        (group,) = load_preferences(rows(**extra), cache_dir=tmp_path)
    assert prompt_text(group["prompt"]) == "a question"
    assert group["responses"] == ["an answer", "another answer"]
    (ignored,) = [r.getMessage() for r in caplog.records if "ignoring the columns" in r.getMessage()]
    assert all(column in ignored for column in extra)
    (read,) = [r.getMessage() for r in caplog.records if "read as" in r.getMessage()]
    assert "chosen, prompt, rejected" in read and "source_format=" in read


def test_ultrafeedback_takes_the_prompt_of_its_conversations(tmp_path):
    better, worse = ([TALK[0], {"role": "assistant", "content": text}] for text in ("good", "bad"))
    row = {"prompt": "a question", "prompt_id": "f", "chosen": better, "rejected": worse, "messages": OTHER}
    (group,) = load_preferences(datasets.Dataset.from_list([row]), cache_dir=tmp_path)
    assert prompt_text(group["prompt"]) == "a question" and group["responses"] == ["good", "bad"]
    with pytest.raises(DataError, match="begin with"):
        row["rejected"] = OTHER
        load_preferences(datasets.Dataset.from_list([row]), cache_dir=tmp_path)


def test_a_format_can_be_forced(tmp_path):
    row = {"prompt": "a question", "chosen": "good", "rejected": "bad", "instruction": "another question"}
    data = datasets.Dataset.from_list([row])
    (group,) = load_preferences(data, source_format="alpaca", cache_dir=tmp_path)
    assert prompt_text(group["prompt"]) == "another question"
    with pytest.raises(DataError, match="source_format='alpacca'"):
        load_preferences(data, source_format="alpacca", cache_dir=tmp_path)


def test_a_transform_makes_the_rows(tmp_path):
    raw = datasets.Dataset.from_list([{"path": "x", "q": "a question", "a": "good", "b": "bad"}] * 2)

    def transform(batch):
        return {
            "prompt": [TALK[:1] for _ in batch["q"]],
            "chosen": [[{"role": "assistant", "content": text}] for text in batch["a"]],
            "rejected": [[{"role": "assistant", "content": text}] for text in batch["b"]],
            "images": [[files.picture(0)] for _ in batch["q"]],
        }

    (group,) = load_preferences(raw.with_transform(transform), cache_dir=tmp_path)
    assert prompt_text(group["prompt"]) == "a question" and len(group["images"]) == 1
    assert group["responses"] == ["good", "bad"]
