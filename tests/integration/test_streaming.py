"""Training on a stream: windows of rows, regrouped one by one; resuming by position equals never stopping."""

import json
import logging

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from safetensors.torch import load_file
from trl import DPOConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.schema import DataError, NoGroupLeft
from tests.conformance.compare import METRICS, Case, build, history, stock, talk, turn
from tests.integration.test_distributed import run_jobs
from tests.support.tiny import image

PROMPTS = ("what is in image ?", "how many dog are there", "is it a cat ?", "what ?", "is there a dog")


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def row(i):
    return {
        "prompt": talk(PROMPTS[i % 5]),
        "chosen": turn("a red cat" + " yes" * (i % 4)),
        "rejected": turn("no" + " dog" * (i % 3)),
        "images": [image(i % 7)],
    }


def rows(count, seen=None, repeated=False):
    """Rows of a stream; `seen` counts them as they are read, `repeated` gives two rows of every prompt and image."""

    def read():
        for i in range(count):
            if seen is not None:
                seen.append(i)
            yield {**row(i), **({"prompt": row(i // 2)["prompt"], "images": row(i // 2)["images"]} if repeated else {})}

    return datasets.IterableDataset.from_generator(read)


def make(tmp_path, stream, **options):
    given = {"max_steps": 6, "logging_steps": 1, "optim": "adamw_torch", "learning_rate": 1e-2}
    own = {name: options.pop(name) for name in ("stream_window", "max_tokens_per_batch") if name in options}
    case = Case(name="stream", rows=lambda: stream, options={**given, **options}, own=own)
    return build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path)


def test_windows_train_as_trl_trains_the_stream(tmp_path):
    """Rows in their order over the bounds of windows, and from the beginning where the stream ends (6 x 2 of 10 rows)."""
    case = Case(name="stream", rows=lambda: rows(10), options={"max_steps": 6})
    theirs = history(build(*stock(case), case, tmp_path / "trl"), METRICS)
    trainer = make(tmp_path / "silkie", rows(10), optim="sgd", learning_rate=0.05, stream_window=4)
    ours = history(trainer, METRICS)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-4, rtol=0)


def test_only_the_windows_that_are_trained_on_are_read(tmp_path):
    seen = []
    trainer = make(tmp_path, rows(1000, seen), max_steps=3, stream_window=4)
    assert max(seen) == 3, "more than the first window was read at the start"
    trainer.train()
    assert max(seen) < 3 * 4  # 3 steps of 2 rows: two windows, and the batch that is prefetched


def test_pairs_of_a_prompt_join_within_a_window(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="silkie"):
        trainer = make(tmp_path, rows(8, repeated=True), max_steps=1, stream_window=8)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["prompt_lengths"]) == 2 and len(batch["lengths"]) > 4
    assert "read in windows of 8 rows" in caplog.text and "joined within a window only" in caplog.text


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_batch": 120}, {"dataloader_num_workers": 1}])
def test_resuming_by_position_equals_never_stopping(tmp_path, options):
    """Bit for bit, in the middle of a window and over the end of the stream, reading no row of earlier windows' groups."""
    options = {"stream_window": 6, "save_strategy": "steps", "save_steps": 1, "max_steps": 7, **options}
    whole = make(tmp_path / "whole", rows(14, repeated=True), **options)
    whole.train()
    state = json.loads((tmp_path / "whole/checkpoint-5/silkie_state.json").read_text())
    assert state["stream"][1] > 0 or state["stream"][0] > 0
    resumed = make(tmp_path / "whole", rows(14, repeated=True), **options)
    prepared = []
    own = resumed.stream.prepare
    resumed.stream.prepare = lambda *given: prepared.append(1) or own(*given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-5"))
    kept = [[e for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert [{k: v for k, v in e.items() if k != "epoch"} for e in kept[0]] == [
        {k: v for k, v in e.items() if k != "epoch"} for e in kept[1]
    ]
    if not options.get("dataloader_num_workers"):
        assert len(prepared) <= 3
    weights = [dict(t.model.named_parameters()) for t in (whole, resumed)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert load_file(tmp_path / "whole/checkpoint-7/adapter_model.safetensors")


@pytest.mark.parametrize("shards", [1, 4])
def test_data_workers_divide_the_batches_and_not_the_stream(tmp_path, shards):
    """`datasets` gives each of several workers a part of a stream's shards; every one has to see all rows."""
    rows = [{**row(i), "chosen": turn("yes" + " cat" * i)} for i in range(16)]
    lengths = []
    for workers in (0, 3):
        stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=shards)
        trainer = make(tmp_path, stream, stream_window=4, max_steps=12, dataloader_num_workers=workers)
        lengths.append([batch["lengths"].tolist() for batch in trainer.get_train_dataloader()])
    assert lengths[0] == lengths[1] and lengths[0][:8] == sorted(lengths[0][:8]) and lengths[0][8:] == lengths[0][:4]


def test_a_shuffled_stream_resumes_in_the_order_of_its_pass(tmp_path):
    """Every pass over a shuffled stream has another order; a run resumed in the second pass has that one's."""
    shuffled = rows(12).shuffle(seed=3, buffer_size=12)
    options = {"stream_window": 4, "save_strategy": "steps", "save_steps": 1, "max_steps": 11}
    whole, resumed = (make(tmp_path, shuffled, **options) for _ in range(2))
    whole.train()
    state = json.loads((tmp_path / "checkpoint-9/silkie_state.json").read_text())
    assert state["stream"][:2] == [1, 1]  # the second window of the second pass
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]


def test_training_again_reads_the_stream_from_where_it_should(tmp_path):
    """A second call of `train` starts at the first window; one that resumes, at that of its checkpoint."""
    options = {"stream_window": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.0, "max_steps": 5}
    trainer = make(tmp_path, rows(12), **options)

    def train(**resume):
        trainer.train(**resume)
        return [e["logps/chosen"] for e in trainer.state.log_history if "loss" in e]

    first = train()
    assert len(set(first)) > 2 and train() == first
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")) == first


def test_broken_rows_of_a_later_window(tmp_path, caplog):
    def read():
        for i in range(12):
            yield {**row(i), "chosen": turn("" if 4 <= i < 8 else "a red cat")}

    stream = datasets.IterableDataset.from_generator(read)
    with pytest.raises(DataError, match="Repair the row") as error:
        make(tmp_path / "raise", stream, stream_window=4).train()
    assert "begins at its row 4" in str(error.value)
    with pytest.raises(DataError, match="begins at its row 4"):  # out of a worker, too
        make(tmp_path / "worker", stream, stream_window=4, dataloader_num_workers=1).train()
    trainer = make(tmp_path / "skip", stream, stream_window=4, on_bad_row="skip")
    trainer.train()
    assert trainer.state.global_step == 6 and "skipping window 1 of the stream" in caplog.text


def test_streams_that_cannot_be_trained_on(tmp_path):
    with pytest.raises(NoGroupLeft, match="has no rows"):
        make(tmp_path, datasets.IterableDataset.from_generator(lambda: iter(())))
    with pytest.raises(ValueError, match="max_steps"):
        make(tmp_path, rows(4), max_steps=-1)
    with pytest.raises(ValueError, match="streaming=False"):
        make(tmp_path, rows(4), precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="pass the whole stream on every process"):
        make(tmp_path, split_dataset_by_node(rows(4), rank=0, world_size=2))


def test_two_processes_see_every_row_once(tmp_path):
    spec = {"data": "many", "stream": True, "args": {"max_steps": 4, "stream_window": 4}}
    single = {**spec, "args": {**spec["args"], "gradient_accumulation_steps": 2}}
    jobs = [
        {"mode": mode, "spec": {**one, "out": str(tmp_path / mode)}}
        for mode, one in (("single", single), ("ddp", spec))
    ]
    run_jobs(jobs, tmp_path, 300)
    logs = [json.loads((tmp_path / mode / "result.json").read_text())["log"] for mode in ("single", "ddp")]
    alone, together = ([[e["loss"], e["num_tokens"]] for e in log if "loss" in e] for log in logs)
    assert len(alone) == 4
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), atol=2e-6, rtol=2e-5)


def test_a_stream_is_read_by_the_trainer_itself_and_the_given_options_stay(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("silkie.config.options.data_workers", lambda: 3)
    args = SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    with caplog.at_level(logging.INFO, logger="silkie"):
        trainer = build(
            SilkieDPOTrainer, SilkieDPOConfig, Case(name="stream", rows=lambda: rows(4)), tmp_path, args=args
        )
    assert (args.dataloader_num_workers, trainer.args.dataloader_num_workers) == (3, 0)
    assert "dataloader_num_workers=0 for a stream" in caplog.text


def test_trls_options_are_taken_for_a_stream(tmp_path):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    case = Case(name="stream", rows=lambda: rows(4))
    assert build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path, args=args).stream is not None
