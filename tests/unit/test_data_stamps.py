"""What is worked out from image files is worked out again when a file has changed, and only then."""

from __future__ import annotations

import shutil
import zipfile

import datasets
import pytest

from silkie.data import LeakError, RowError, check_leak, load_preferences, validate
from silkie.data.inspect import image_figures
from silkie.data.stamps import image_stamp
from tests.support import preference_files as files


@pytest.fixture
def groups(tmp_path):
    datasets.disable_progress_bars()
    files.write_images(tmp_path, 2)
    records = [files.group_record(id=str(index), images=[f"{index}.png"]) for index in range(2)]
    return load_preferences(files.write_lines(tmp_path / "rows.jsonl", records), cache_dir=tmp_path / "cache")


def test_a_repaired_image_is_sound(groups, tmp_path):
    (tmp_path / "1.png").write_bytes(b"broken")
    with pytest.raises(RowError, match=r"row 1, column 'images\[0\]'"):
        validate(groups)
    assert image_figures(groups)["unreadable"] == 1
    (tmp_path / "1.png").write_bytes(files.png(1))
    assert len(validate(groups)) == 2
    assert image_figures(groups)["unreadable"] == 0


def test_a_leak_that_a_changed_image_makes_is_found(groups, tmp_path):
    evaluation = datasets.Dataset.from_list([{"image": files.embedded(7), "question": "another one"}])
    check_leak(groups, evaluation)
    (tmp_path / "1.png").write_bytes(files.png(7))
    with pytest.raises(LeakError, match="evaluation row 0 has the image of training row 1"):
        check_leak(groups, evaluation)


def test_unchanged_images_are_not_decoded_twice(groups, monkeypatch):
    assert len(validate(groups)) == 2
    monkeypatch.setattr("silkie.data.validation.open_image", lambda *_, **__: pytest.fail("an image was decoded again"))
    assert len(validate(groups)) == 2


def test_a_copy_that_keeps_its_times_is_the_same(groups, tmp_path):
    """As data that every job unpacks on its node's own disk: the times of the inodes are new."""
    before = image_stamp(groups, "images")
    for name in ("0.png", "1.png"):
        old = (tmp_path / name).stat()
        shutil.copy2(tmp_path / name, tmp_path / "copy")
        (tmp_path / "copy").chmod(0o600)
        (tmp_path / "copy").replace(tmp_path / name)
        assert (tmp_path / name).stat().st_ctime_ns != old.st_ctime_ns
    assert image_stamp(groups, "images") == before


def test_stamps_follow_files_and_archives_and_no_bytes(tmp_path):
    for seed, name in enumerate(("a.png", "b.zip")):
        (tmp_path / name).write_bytes(b"x" * seed)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("x.png", files.png(0))
    image = lambda path=None, data=None: {"bytes": data, "path": path}  # noqa: E731
    named = datasets.Dataset.from_list(
        [{"images": [image(str(tmp_path / "a.png")), image(f"zip://x.png::{tmp_path / 'b.zip'}")]}]
    )
    single = datasets.Dataset.from_list([{"images": image(str(tmp_path / "a.png"))}, {"images": None}])
    texts = datasets.Dataset.from_list([{"images": str(tmp_path / "a.png")}])
    embedded = datasets.Dataset.from_list([{"images": [image("a.png", files.png(0))]}, {"images": []}])

    def stamps():
        return [image_stamp(dataset, "images") for dataset in (named, single, texts, embedded)]

    before = stamps()
    assert stamps() == before
    (tmp_path / "a.png").write_bytes(b"longer")
    changed = stamps()
    assert [old == new for old, new in zip(before, changed, strict=True)] == [False, False, False, True]
    with zipfile.ZipFile(tmp_path / "b.zip", "a") as archive:
        archive.writestr("y.png", files.png(1))
    assert [old == new for old, new in zip(changed, stamps(), strict=True)] == [False, True, True, True]
    (tmp_path / "a.png").unlink()
    assert image_stamp(single, "images") != changed[1]
