"""Splits that share neither image nor prompt, and the leak check that proves it."""

from __future__ import annotations

import pickle
import zipfile

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silkie.data import DataError, LeakError, check_leak, load_preferences, regroup, regroup_with_report, split_groups
from silkie.data.splits import RowKeys, connected, prompt_key
from tests.support import preference_files as files

PAIR = {"chosen": "yes", "rejected": "no"}


def rows(*items):
    """Pair rows of (image seed or None, prompt)."""
    datasets.disable_progress_bars()
    return datasets.Dataset.from_list(
        [{"prompt": prompt, "images": [] if seed is None else [files.embedded(seed)], **PAIR} for seed, prompt in items]
    )


def groups(*items):
    return load_preferences(rows(*items), regroup_pairs=False)


keys = st.lists(
    st.builds(RowKeys, st.lists(st.sampled_from("abcdef"), max_size=2).map(tuple), st.sampled_from("uvwxyz")),
    max_size=12,
)


@given(keys, st.sampled_from(["both", "image", "prompt"]))
def test_components_are_a_partition_that_nothing_crosses(rows, by):
    components = connected(rows, by)
    assert sorted(index for component in components for index in component) == list(range(len(rows)))
    owner = {index: number for number, component in enumerate(components) for index in component}
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            linked = by != "prompt" and set(first.images) & set(second.images)
            text = by != "image" or not (first.images or second.images)
            if linked or (text and first.prompt == second.prompt):
                assert owner[i] == owner[j]


def test_components_are_no_larger_than_needed():
    rows = [RowKeys(("a",), "u"), RowKeys(("b",), "u"), RowKeys(("b",), "v"), RowKeys(("c",), "w")]
    assert connected(rows, "both") == [[0, 1, 2], [3]]
    assert connected(rows, "image") == [[0], [1, 2], [3]]
    assert connected(rows, "prompt") == [[0, 1], [2], [3]]


def test_split_shares_nothing_and_is_seeded():
    data = groups(
        *[(seed // 2, f"Question {index // 3}") for index, seed in enumerate(range(40))],
        *[(100 + i, f"Other {i}") for i in range(20)],
    )
    split = split_groups(data, 0.25, seed=1)
    assert len(split["train"]) + len(split["test"]) == 60 and 8 <= len(split["test"]) <= 15
    check_leak(split["train"], split["test"])
    assert split_groups(data, 0.25, seed=1)["test"]["id"][:] == split["test"]["id"][:]
    assert split_groups(data, 0.25, seed=2)["test"]["id"][:] != split["test"]["id"][:]


def test_a_stock_prompt_ties_everything_together_and_the_error_says_so():
    data = groups(*[(seed, "Describe the image.") for seed in range(6)])
    with pytest.raises(
        DataError, match=r"largest has 6 groups; one prompt occurs in 6 groups, for example in row 0. Pass by='image'"
    ):
        split_groups(data, 2)
    split = split_groups(data, 2, by="image")
    assert len(split["test"]) == 2
    check_leak(split["train"], split["test"], by="image")
    with pytest.raises(LeakError, match="2 row.s. share their prompt.*pass by='image'"):
        check_leak(split["train"], split["test"])


def test_misspelt_choices():
    data = groups((0, "a"), (1, "b"))
    with pytest.raises(ValueError, match="by='images' is not known; choose from both, image, prompt"):
        check_leak(data, data, by="images")
    with pytest.raises(ValueError, match="by='images' is not known; choose from both, image, prompt"):
        split_groups(data, 1, by="images")


@pytest.mark.parametrize("size", [0, 3, 0.0, 1.0])
def test_impossible_sizes(size):
    with pytest.raises(ValueError, match="test_size="):
        split_groups(groups((0, "a"), (1, "b"), (2, "c")), size)


def test_leaks_name_rows_and_kinds():
    train = groups((0, "One"), (1, "Two"), (2, "Three"))
    with pytest.raises(
        LeakError,
        match="evaluation row 1 has the image of training row 2; evaluation row 2 has the prompt of training row 1",
    ) as caught:
        check_leak(train, groups((9, "Nine"), (2, "Ten"), (8, " tWO \n")))
    assert [(leak.kind, leak.train_row, leak.eval_row) for leak in caught.value.leaks] == [
        ("image", 2, 1),
        ("prompt", 1, 2),
    ]
    assert pickle.loads(pickle.dumps(caught.value)).leaks == caught.value.leaks


def test_benchmark_rows_and_text_only_rows():
    train = groups((0, "One"), (None, "Just text"))
    benchmark = datasets.Dataset.from_list([{"image": files.embedded(0), "question": "New?"}]).cast_column(
        "image", datasets.Image()
    )
    with pytest.raises(LeakError, match="evaluation row 0 has the image of training row 0"):
        check_leak(train, benchmark)
    with pytest.raises(LeakError, match="share their prompt"):
        check_leak(train, datasets.Dataset.from_list([{"prompt": "just TEXT"}]), by="image")
    with pytest.raises(DataError, match="no prompt column: found image"):
        check_leak(train, benchmark.remove_columns("question"))


def test_the_same_image_under_two_names_is_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(files.png(0))
    one, two = (
        load_preferences(
            files.write_lines(tmp_path / f"{name}.jsonl", [{"prompt": name, "image": f"{name}.png", **PAIR}]),
            cache_dir=tmp_path,
        )
        for name in ("a", "b")
    )
    with pytest.raises(LeakError, match="image of training row 0"):
        check_leak(one, two)


def test_prompt_keys_ignore_shape_case_and_marks():
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What IS it?"}]}]
    assert (
        len(
            {
                prompt_key(turns),
                prompt_key("<image>\nwhat is  it?"),
                prompt_key([{"from": "human", "value": "what is it?"}]),
            }
        )
        == 1
    )
    assert prompt_key("what is it") != prompt_key("what is it?")


def test_regroup_joins_equal_images_under_several_names(tmp_path):
    """By their bytes, wherever they are stored; another image of equal size, and one that is gone, stay apart."""
    (tmp_path / "a.png").write_bytes(b"one picture")
    (tmp_path / "b.png").write_bytes(b"one picture")
    (tmp_path / "c.png").write_bytes(b"two picture")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("d.png", b"one picture")
    paths = [str(tmp_path / name) for name in ("a.png", "c.png", "b.png", "gone.png", "also gone.png")]
    stored = [{"bytes": None, "path": path} for path in [*paths, f"zip://d.png::{tmp_path / 'all.zip'}"]]
    stored.append({"bytes": b"one picture", "path": None})
    one = groups((0, "A"))[0]
    data = datasets.Dataset.from_list(
        [{**one, "images": [image]} for image in stored], features=groups((0, "A")).features
    )
    joined = regroup(data)
    assert [group["pair_weights"] for group in joined] == [[4.0], [1.0], [1.0], [1.0]]
    assert [group["images"][0]["path"] for group in joined] == [paths[0], paths[1], paths[3], paths[4]]
    # read only where a prompt comes with several images
    asked = [{**one, "images": [image], "prompt": groups((0, str(n)))[0]["prompt"]} for n, image in enumerate(stored)]
    assert len(regroup(datasets.Dataset.from_list(asked, features=data.features))) == len(stored)


def test_pairs_without_weights_weigh_one_when_regrouped():
    stored = groups((0, "A"), (0, "A"), (1, "A"))
    bare = stored.map(lambda row: {"pair_weights": None}, features=stored.features)
    assert regroup(bare)["pair_weights"][0] == regroup(stored)["pair_weights"][0] == [2.0]


def test_regroup_keeps_order_weights_and_unrepeated_rows():
    data = rows((0, "A"), (1, "A"), (0, "A"), (0, "B"))
    joined, report = regroup_with_report(load_preferences(data, regroup_pairs=False))
    assert [(len(group["pairs"]), group["pair_weights"]) for group in joined] == [(1, [2.0]), (1, [1.0]), (1, [1.0])]
    assert (report.rows, report.groups, report.contradictions) == (4, 3, 0)
    assert len(regroup(groups((0, "A"), (1, "A")))) == 2
    with pytest.raises(DataError, match="not preference groups .*load_preferences"):
        regroup(data)
    turned = data.select([0]).map(lambda row: {"chosen": row["rejected"], "rejected": row["chosen"]})
    both, report = regroup(
        load_preferences(datasets.concatenate_datasets([data.select([0]), turned]), regroup_pairs=False),
        return_report=True,
    )
    assert report.contradictions == 1 and sorted(both[0]["pairs"]) == [[0, 1], [1, 0]]
