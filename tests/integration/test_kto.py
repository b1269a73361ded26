"""KTO on packed groups: TRL's KTO trainer and the paper's formula, loss and gradients in float64."""

import json

import datasets
import pytest
import torch
from torch import Tensor
from trl import KTOConfig, KTOTrainer

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.batch.labels import Labels
from silkie.data import DataError, load_preferences
from silkie.plan.workload import largest_workload, workload_of
from silkie.training.self_test import LayoutMismatch, plain_logps
from tests.conformance.compare import Case, build, talk, turn
from tests.integration.test_distributed import run_jobs
from tests.support.data import ASPECTS, dataset, group
from tests.support.tiny import image
from tests.support.trl import alive, distance, loss_and_gradients

EPSILON = 1e-6  # the models compute norms and rotary angles in float32, also where all else is float64
OPTIONS = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
QUESTIONS = ("what is in image ?", "how many dog are there", "is it a cat ?", "what ?")
ANSWERS = ("a red cat", "one and not two dog", "yes", "no no table left")


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def thumbs(images=True):
    """TRL's unpaired rows: four prompts with one labelled answer each."""
    rows = [
        {"prompt": talk(q), "completion": turn(a), "label": i != 1}
        for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    return [{**row, "images": [image(i)]} for i, row in enumerate(rows)] if images else rows


def make(cls, tmp_path, rows, **options):
    config = {SilkieDPOTrainer: SilkieDPOConfig, KTOTrainer: KTOConfig}[cls]
    given = {"loss_type": "kto", "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    case = Case(name="kto", rows=rows, options={**given, **options})
    return build(cls, config, case, tmp_path)


def step(trainer, size=4):
    """Loss and gradients of a batch in float64, the adapter alive."""
    trainer.model_accepts_loss_kwargs = False
    alive(trainer, torch.float64)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.2)  # as far from the reference as the KL estimate is above 0
    rows = [trainer.train_dataset[i] for i in range(size)]
    batch = trainer.data_collator(rows)
    if isinstance(trainer, KTOTrainer):
        batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
    return loss_and_gradients(trainer, batch)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("images", [True, False])
def test_loss_and_gradients_are_those_of_trl(tmp_path, images, loss_type):
    options = {"loss_type": loss_type, **OPTIONS}
    expected, expected_gradients = step(make(KTOTrainer, tmp_path / "trl", thumbs(images), **options))
    trainer = make(SilkieDPOTrainer, tmp_path / "silkie", thumbs(images), **options)
    loss, gradients = step(trainer)
    assert trainer.choice.layout == "packed"
    assert abs(loss - expected) < EPSILON
    scale = torch.stack([g.norm() for g in expected_gradients.values()]).norm().item()
    assert scale > 1e-2 and distance(gradients, expected_gradients) < 10 * EPSILON * scale
    if loss_type == "kto":  # the KL term is part of it
        trainer.passes.reduce = torch.zeros_like
        assert abs(step(trainer)[0] - expected) > 1e-4


def labelled_groups():
    """Three prompts with two, three and one labelled answers, among them one that is not labelled."""
    return [
        group([image(0)], "what is in image ?", ["a red cat", "yes"], [], labels=[True, False]),
        group([image(1, 84, 56)], "how many cat ?", ["two cat", "one", "no"], [], labels=[False, None, False]),
        group([], "is there a dog", ["no no no"], [], labels=[True]),
    ]


def rated_groups():
    marks = [[5.0, 1.0], [2.0, 3.0, 1.0], [4.0]]
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in labelled_groups()]
    return [
        {**row, "ratings": [dict.fromkeys(ASPECTS, m) for m in own], "rationales": None}
        for row, own in zip(rows, marks, strict=True)
    ]


def by_the_paper(trainer, rows, labels):
    """Eq. 8 of the paper on log-probs of the model's plain forward, one sequence at a time; the reference point is the
    mean log-ratio of the labelled answers of the prompt before."""
    sums: dict[str, list[list[Tensor]]] = {}
    cross = [{**row, "responses": answers_of(rows[i - 1], labels[i - 1])} for i, row in enumerate(rows)]
    for name, asked in (("own", rows), ("cross", cross)):
        for i, row in enumerate(asked):
            policy = plain_logps(trainer.model, trainer.encoder, row, lambda x: x)
            with torch.no_grad(), trainer.model.disable_adapter():
                reference = plain_logps(trainer.model, trainer.encoder, row, lambda x: x)
            ratios = [p.sum() - r.sum() for p, r in zip(policy, reference, strict=True)]
            sums.setdefault(name, []).append(ratios)
            assert name == "own" or len(ratios) == len(cross[i]["responses"])
    zero = torch.stack([ratio.detach() for ratios in sums["cross"] for ratio in ratios]).mean().clamp(min=0)
    values = []
    for ratios, own in zip(sums["own"], labels, strict=True):
        for ratio, label in zip(ratios, own, strict=True):
            if label is True:
                values.append(OPTIONS["desirable_weight"] * (1 - torch.sigmoid(OPTIONS["beta"] * (ratio - zero))))
            elif label is False:
                values.append(OPTIONS["undesirable_weight"] * (1 - torch.sigmoid(OPTIONS["beta"] * (zero - ratio))))
    return torch.stack(values).mean(), zero


def answers_of(row, labels):
    return [answer for answer, label in zip(row["responses"], labels, strict=True) if label is not None]


@pytest.mark.parametrize("data", ["labels", "ratings"])
@pytest.mark.parametrize("layout", ["packed", "rows"])
def test_groups_of_several_answers_follow_the_paper(tmp_path, layout, data):
    """One image, one forward: all answers of a prompt, and those of the prompt before for the KL term."""
    if data == "labels":
        rows, more = labelled_groups(), {}
        columns = datasets.Dataset.from_list([{k: v for k, v in r.items() if v is not None} for r in rows])
        columns = load_preferences(columns.remove_columns([c for c in ("id", "models") if c in columns.column_names]))
    else:
        rows, more = rated_groups(), {"label_threshold": 2.5}
        columns = dataset(rows, ASPECTS)
    labels = (
        [[True, False], [False, None, False], [True]]
        if data == "labels"
        else [[True, False], [False, True, False], [True]]
    )
    trainer = make(SilkieDPOTrainer, tmp_path, lambda: columns, layout=layout, **OPTIONS, **more)
    loss, gradients = step(trainer, 3)
    trainer.model.zero_grad()
    expected, zero = by_the_paper(trainer, [trainer.train_dataset[i] for i in range(3)], labels)
    expected.backward()
    truth = {n: p.grad.double() for n, p in trainer.model.named_parameters() if p.grad is not None}
    scale = torch.stack([g.norm() for g in truth.values()]).norm().item()
    assert zero > 0
    assert abs(loss - expected.detach()) < EPSILON and distance(gradients, truth) < 10 * EPSILON * scale


def test_pairs_are_unpaired_as_trl_does(tmp_path):
    pairs = [
        {"prompt": talk(q), "chosen": turn(a), "rejected": turn(b)}
        for q, a, b in zip(QUESTIONS[:2], ANSWERS[:2], ANSWERS[2:], strict=True)
    ]
    # apo: TRL puts all chosen rows before the rejected ones, so that other answers meet in its KL term
    options = {"loss_type": "apo_zero_unpaired", **OPTIONS}
    theirs, _ = step(make(KTOTrainer, tmp_path / "trl", pairs, **options))
    trainer = make(SilkieDPOTrainer, tmp_path / "silkie", pairs, **options)
    assert abs(step(trainer, 2)[0] - theirs) < EPSILON


def test_equal_answers_with_labels_stay_apart():
    """A row is an opinion: two people who like an answer count twice, and one who does not, too."""
    rows = [{"prompt": "is it ?", "completion": " yes", "label": label} for label in (1, 1, 0)]
    (joined,) = load_preferences(datasets.Dataset.from_list(rows))
    assert joined["responses"] == [" yes"] * 3 and joined["labels"] == [True, True, False] and joined["pairs"] == []


def test_wrong_use_is_named(tmp_path):
    with pytest.raises(DataError, match=r"column 'label': found 'up'.*true \(desirable\) or false"):
        load_preferences(datasets.Dataset.from_list([{"prompt": "is it ?", "completion": " yes", "label": "up"}]))
    with pytest.raises(ValueError, match="label_threshold.*reads ratings, and the train data has none"):
        make(SilkieDPOTrainer, tmp_path, thumbs(), label_threshold=2.0)
    with pytest.raises(DataError, match=r"loss_type=\['kto'\]"):
        make(SilkieDPOTrainer, tmp_path, thumbs(), loss_type="sigmoid")
    with pytest.raises(ValueError, match="per_device_train_batch_size to 2"):
        make(SilkieDPOTrainer, tmp_path, thumbs(), per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="cannot be precomputed"):
        make(SilkieDPOTrainer, tmp_path, thumbs(), precompute_ref_log_probs=True)


def test_the_self_test_sees_answers_under_other_prompts(tmp_path, monkeypatch):
    """Negative control: the collator's foreign answers are not those that the self-test expects."""
    own = Labels.with_mismatched

    def turned(self, rows):
        return own(self, rows) if turned.calls.append(1) or len(turned.calls) > 1 else own(self, rows[::-1])

    turned.calls = []
    trainer = make(SilkieDPOTrainer, tmp_path, thumbs(), self_test=False)
    trainer.args.self_test = True
    trainer._self_test(trainer.model)
    monkeypatch.setattr(Labels, "with_mismatched", turned)
    with pytest.raises((LayoutMismatch, RuntimeError)):
        trainer._self_test(trainer.model)


def test_labels_are_logged_and_unequal_numbers_warned_of(tmp_path, caplog):
    with caplog.at_level("INFO", logger="silkie"):
        trainer = make(SilkieDPOTrainer, tmp_path, thumbs(), max_tokens_per_batch=64)
        trainer.train()
    assert "3 desirable and 1 undesirable responses" in caplog.text
    assert "desirable_weight from 0.33 to 0.44" in caplog.text
    assert "hold one group: as in TRL, its KL term is estimated on its own responses" in caplog.text


def test_a_stream_tells_of_lone_groups_too(tmp_path, caplog):
    """The last group of a window meets no other prompt, as the last one of an epoch does."""
    options = {"loss_type": "kto", "per_device_train_batch_size": 2, "max_steps": 2}
    for rows, told in ((4, False), (3, True)):
        stream = datasets.Dataset.from_list(thumbs()[:rows]).to_iterable_dataset()
        trainer = make(SilkieDPOTrainer, tmp_path / str(rows), lambda stream=stream: stream, **options)
        with caplog.at_level("WARNING", logger="silkie"):
            trainer.train()
        assert ("1 of 2 micro-batches of a window of the stream hold one group" in caplog.text) == told


def test_evaluation_needs_other_prompts_as_training_does(tmp_path, caplog):
    """In a batch of one group the KL term would be that of the group's own answers."""
    with pytest.raises(ValueError, match="per_device_eval_batch_size to 2"):
        make(SilkieDPOTrainer, tmp_path, thumbs(), per_device_eval_batch_size=1).evaluate(
            datasets.Dataset.from_list(thumbs())
        )
    with pytest.raises(ValueError, match="per_device_eval_batch_size to 2"):  # before training has begun
        make(SilkieDPOTrainer, tmp_path, thumbs(), per_device_eval_batch_size=1, eval_strategy="epoch")
    trainer = make(SilkieDPOTrainer, tmp_path, thumbs(), per_device_eval_batch_size=3)
    with caplog.at_level("WARNING", logger="silkie"):
        trainer.get_eval_dataloader(datasets.Dataset.from_list(thumbs()))
    assert "1 of 2 micro-batches of an evaluation hold one group" in caplog.text
    alone = make(SilkieDPOTrainer, tmp_path, thumbs(), per_device_eval_batch_size=1, loss_type="apo_zero_unpaired")
    assert len(alone.get_eval_dataloader(datasets.Dataset.from_list(thumbs()))) == 4  # has no such term


def test_two_processes(tmp_path):
    """Every rank takes part in the sum of the KL term, also one that holds a copy of weight 0."""
    args = {"loss_type": ["kto"], "per_device_train_batch_size": 2, "num_train_epochs": 2}
    job = {"mode": "ddp", "spec": {"data": "odd", "out": str(tmp_path / "ddp"), "args": args}}
    run_jobs([job], tmp_path, 300)
    log = [entry for entry in json.loads((tmp_path / "ddp/result.json").read_text())["log"] if "loss" in entry]
    assert len(log) == 6 and max(entry["kl"] for entry in log) > 0 == log[0]["kl"]


def test_the_planner_counts_the_mismatched_answers(tmp_path):
    """The largest micro-batch of a run is at least as large as any that comes, in answers and tokens."""
    trainer = make(SilkieDPOTrainer, tmp_path, thumbs(), per_device_train_batch_size=2)
    largest = largest_workload(trainer)
    for batch in trainer.get_train_dataloader():
        found = workload_of(trainer, batch)
        assert found.responses == 2 and largest.responses == 2
        assert largest.tokens >= found.tokens and largest.response_tokens >= found.response_tokens
