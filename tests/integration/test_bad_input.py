"""Bad input stops with row and remedy before training starts, or is dropped, counted and named."""

import logging

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PromptTuningConfig
from transformers import TrainingArguments

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data import DataError
from tests.support.data import dataset, group, mixed_groups, png
from tests.support.tiny import image, tiny_model, tiny_processor


def make(rows_or_dataset, tmp_path, **options):
    data = rows_or_dataset if isinstance(rows_or_dataset, Dataset) else dataset(rows_or_dataset)
    args = SilkieDPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return SilkieDPOTrainer(
        tiny_model(), args=args, train_dataset=data, processing_class=tiny_processor(), peft_config=LoraConfig(r=2)
    )


def broken(**change):
    rows = mixed_groups()
    rows[1] = {**rows[1], **change}
    return rows


TRUNCATED = png(image(3))["bytes"][:-60]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (broken(images=[{"bytes": b"no image", "path": None}, png(image(1))]), "row 1.*image 0"),
        (broken(images=[png(image(1)), {"bytes": TRUNCATED, "path": None}]), "row 1.*image 1.*truncated"),
        (broken(images=[png(image(1))]), r"row 1.*2 image part\(s\) for 1 image\(s\)"),
        (broken(responses=["a cat", " "]), r"row 1.*column 'responses\[1\]': found ' '; expected a non-empty string"),
        (broken(responses=["a cat", "a cat"]), "row 1.*identical"),
        (broken(pairs=[[0, 2]]), r"row 1.*\[0, 2\]"),
        (broken(pair_weights=[float("nan")]), "row 1.*pair_weights.*nan.*finite weights"),
        (broken(pair_weights=[1.0, 2.0]), "row 1.*2 weights; expected one for each of the 1 pairs"),
        (broken(pairs=[[0, 1, 1]]), r"row 1.*\[0, 1, 1\]"),
        (broken(responses=None, pairs=[]), "row 1.*at least one response"),
        (broken(prompt=[], images=[]), "row 1.*prompt.*a conversation that ends with a user turn"),
        (broken(responses=["a <|image_pad|>", "one"]), r"row 1.*responses\[0\].*special token <\|image_pad\|>"),
        (
            broken(prompt=group([], "is <|video_pad|> a cat", [], [])["prompt"], images=[]),
            r"row 1.*prompt\[0\].*special token <\|video_pad\|>",
        ),
        (broken(images=[png(image(1, 2000, 4)), png(image(2))]), "row 1.*aspect ratio"),
    ],
    ids=[
        "unreadable",
        "truncated",
        "missing image",
        "empty",
        "identical",
        "pair range",
        "weight",
        "number of weights",
        "pair of three",
        "no responses",
        "no prompt",
        "image token in a response",
        "video token in the prompt",
        "extreme shape",
    ],
)
def test_a_broken_row_is_named_or_skipped(rows, message, tmp_path):
    with pytest.raises(DataError, match=message) as error:
        make(rows, tmp_path)
    assert "on_bad_row" in str(error.value)
    trainer = make(rows, tmp_path, on_bad_row="skip")
    assert trainer.reports["train"].groups == 3
    ((reason, named),) = trainer.reports["train"].dropped.items()
    assert len(named) == 1 and "row 1" in named[0] and "'two'" in named[0], reason


def test_ratings_that_do_not_match_the_responses_are_named(tmp_path):
    rows = [
        {**row, "ratings": [{"Helpfulness": 1.0}] * len(row["responses"]), "rationales": None} for row in mixed_groups()
    ]
    rows[1]["ratings"] = rows[1]["ratings"] * 2
    with pytest.raises(DataError, match="row 1.*ratings.*4 entries; expected one entry for each of the 2 responses"):
        make(dataset(rows, aspects=("Helpfulness",)), tmp_path)


def test_an_image_that_breaks_between_two_runs_is_found(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png(image(0))["bytes"])
    rows = broken(images=[{"bytes": None, "path": str(path)}, png(image(1))])
    make(rows, tmp_path / "a")
    path.write_bytes(TRUNCATED)
    with pytest.raises(DataError, match="row 1.*image 0"):
        make(rows, tmp_path / "b")


def test_pairs_that_a_cut_makes_equal_are_counted(tmp_path):
    rows = mixed_groups()
    rows[0] = {**rows[0], "responses": ["a red cat", "a red dog", "no", "is it ?"]}
    assert "1 pairs have identical responses after truncation" in "".join(
        make(rows, tmp_path, max_response_length=2).plan_lines()
    )
    assert make(rows, tmp_path).reports["train"].equal_pairs == 0


def test_data_of_another_trainer_is_measured_again(tmp_path):
    first = make([*mixed_groups(), {**mixed_groups()[1], "pairs": [], "pair_weights": []}][::-1], tmp_path)
    again = make(first.train_dataset, tmp_path, max_response_length=2)
    assert (
        max(map(max, first.train_dataset["response_lengths"]))
        > 2
        == max(map(max, again.train_dataset["response_lengths"]))
    )
    assert again.train_dataset["row"] == first.train_dataset["row"] == [1, 2, 3, 4], (
        "rows keep their number in the input"
    )


def test_a_prompt_that_does_not_fit_is_dropped_and_the_rest_trains(tmp_path, caplog):
    rows = [*mixed_groups(), group([image(0)], "what " * 300, ["yes", "no"], [[0, 1]], id="long")]
    with caplog.at_level(logging.WARNING, logger="silkie"):  # shown where nobody has configured a log
        trainer = make(rows, tmp_path, max_length=100)
    assert "dropped 1 groups: the prompt alone does not fit max_length=100" in caplog.text
    assert "(row 4, id 'long')" in caplog.text
    assert list(trainer.reports["train"].dropped.values()) == [["row 4, id 'long'"]]
    trainer.train()
    assert trainer.state.global_step == 1


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="No group.*does not fit max_length=5"):
        make(mixed_groups(), tmp_path, max_length=5)


def test_a_missing_column_is_named(tmp_path):
    rows = Dataset.from_list([{"prompt": "what", "chosen": "yes"}])
    with pytest.raises(DataError, match="'prompt', 'chosen'"):
        make(rows, tmp_path)


def test_wrong_arguments(tmp_path):
    with pytest.raises(TypeError, match="SilkieDPOConfig"):
        SilkieDPOTrainer(
            tiny_model(),
            args=TrainingArguments(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=dataset(),
            processing_class=tiny_processor(),
        )
    args = SilkieDPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    for data in (mixed_groups(), DatasetDict(train=dataset()), "some/where"):
        with pytest.raises(TypeError, match=f"train data must be a datasets.Dataset.*not {type(data).__name__}"):
            SilkieDPOTrainer(tiny_model(), args=args, train_dataset=data, processing_class=tiny_processor())
    with pytest.raises(ValueError, match="PromptTuningConfig puts virtual tokens"):
        prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        SilkieDPOTrainer(
            tiny_model(), args=args, train_dataset=dataset(), processing_class=tiny_processor(), peft_config=prompt
        )
    with pytest.raises(ValueError, match="names no directory.*`ref_model`.*`peft_config`"):
        SilkieDPOTrainer(tiny_model(), args=args, train_dataset=dataset(), processing_class=tiny_processor())
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        SilkieDPOTrainer(str(tmp_path / "nowhere"), args=args, train_dataset=dataset())
    with pytest.raises(ValueError, match="processing_class is a tokenizer: pass the processor"):
        SilkieDPOTrainer(tiny_model(), args=args, train_dataset=dataset(), processing_class=tiny_processor().tokenizer)
