"""Data that was made to hurt: every input ends in groups or in an error that names file, row and remedy.

"Line N" is the number of the attack in the list that these tests were written for: see .github/SECURITY.md."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from silkie.batch.encoding import GroupEncoder
from silkie.batch.measure import GroupError
from silkie.batch.preparation import prepare_groups
from silkie.batch.template import ChatTemplate, TemplateMismatch
from silkie.data import DataError, ImageError, RowError, load_preferences, open_image
from silkie.data.images import image_size, readable_formats
from silkie.data.mixing import mix
from silkie.data.pairs import check_rating, mean_ratings
from silkie.io.archives import MAX_RATIO, ArchiveError, open_member, read_member
from silkie.io.files import FileError, check_regular, is_below, open_file, read_file
from silkie.io.jsonl import JsonError, json_document, json_lines
from tests.support import preference_files as files
from tests.support.data import dataset, mixed_groups
from tests.support.tiny import tiny_processor

PAIR = {"prompt": "What?", "chosen": "good", "rejected": "bad"}
DEEP = "[" * 100_000 + "]" * 100_000
LONG_NUMBER = "1" * 5000


def load(path, **options):
    return load_preferences(path, cache_dir=path.parent / "cache", **options)


def special_files(folder):
    """Paths that name no regular file, or a link to none."""
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "to-fifo").symlink_to(folder / "fifo")
    (folder / "folder").mkdir()
    return [folder / name for name in ("fifo", "device", "to-fifo", "folder")]


def test_only_regular_files_are_opened(tmp_path):
    """Line 1."""
    for path in special_files(tmp_path):
        for function in (check_regular, open_file, read_file):
            with pytest.raises(FileError, match="not a regular file"):
                function(path)
    with pytest.raises(FileError, match="cannot name a file"):
        open_file("a\0b")
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")


def test_a_file_is_read_up_to_its_limit(tmp_path, monkeypatch):
    """Line 1. A file in /proc says that it has 0 bytes, and a file may grow while it is read."""
    (tmp_path / "big").write_bytes(bytes(100))
    assert len(read_file(tmp_path / "big", limit=100)) == 100
    with pytest.raises(FileError, match="is 100 bytes, more than the 99 allowed"):
        read_file(tmp_path / "big", limit=99)
    if os.path.exists("/proc/self/maps"):
        with pytest.raises(FileError, match="more than the 9 allowed"):
            read_file("/proc/self/maps", limit=9)


def test_an_image_that_is_no_file_is_an_error_of_its_row(tmp_path):
    """Line 1: each of these hung, or filled the memory."""
    special_files(tmp_path)
    for image in ("zip://x::/dev/zero", f"zip://x::{tmp_path}/fifo", f"zip://x::{tmp_path}/device"):
        for value in (image, {"bytes": None, "path": image}):
            with pytest.raises(ImageError, match="^row 3: cannot read"):
                open_image(value, where="row 3")
            with pytest.raises(ImageError, match="^row 3: cannot read"):
                image_size({"bytes": None, "path": image}, where="row 3")
    for image in ("fifo", "device", "/dev/zero"):
        with pytest.raises(ImageError, match="not a regular file"):
            open_image(tmp_path / image, where="row 3")
        with pytest.raises(ImageError, match="not a regular file"):
            image_size({"bytes": None, "path": str(tmp_path / image)})
        source = files.write_lines(tmp_path / "rows.jsonl", [{**PAIR, "image": image}])
        with pytest.raises(RowError, match="line 1, column 'image'"):
            load(source)
    source = files.write_lines(tmp_path / "rows.jsonl", [{**PAIR, "image": "zip://x::/dev/zero"}, PAIR])
    assert len(load(source, on_error="skip")) == 1


def test_a_source_that_is_no_file_is_refused(tmp_path):
    """Line 1."""
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "rows.parquet").symlink_to("/dev/zero")
    for name in ("rows.jsonl", "rows.parquet"):
        with pytest.raises(DataError, match="not a regular file"):
            load(tmp_path / name)


STRANGE_ANNOTATIONS = [
    "N/A",
    ["a"],
    {"N": "/A"},
    {"Z": {"Rating": "9"}},
    {"\ud800": {"Rating": "1"}},
    {"a\0": {"Rating": "1"}},
]


@pytest.mark.parametrize("strange", STRANGE_ANNOTATIONS, ids=range(len(STRANGE_ANNOTATIONS)))
def test_a_dropped_row_adds_nothing_to_the_others(strange, tmp_path):
    """Line 4."""
    files.write_images(tmp_path, 2)
    bad = files.vlfeedback(1)
    bad["completions"][0]["annotations"] = strange
    source = files.write_lines(tmp_path / "rows.jsonl", [bad, files.vlfeedback(0)])
    (row,) = load(source, on_error="skip")
    assert tuple(row["ratings"][0]) == files.ASPECTS and mean_ratings(row["ratings"])[0] == 4.0
    with pytest.raises(RowError, match="line 1"):
        load(source)


def test_a_row_dropped_for_its_image_adds_no_aspect(tmp_path):
    """Line 4."""
    files.write_images(tmp_path, 1)
    record = lambda image, aspect: files.group_record(  # noqa: E731
        images=[image], id=image, ratings=[{aspect: 5}, {aspect: 1}]
    )
    source = files.write_lines(tmp_path / "rows.jsonl", [record("gone.png", "Z"), record("0.png", "Help")])
    (row,) = load(source, on_error="skip")
    assert list(row["ratings"][0]) == ["Help"]


def test_rows_rated_on_different_aspects_keep_their_margins(tmp_path):
    """Line 4."""
    records = [
        files.group_record(images=[], id=name, ratings=[{aspect: 5}, {aspect: 2}])
        for name, aspect in (("a", "Help"), ("b", "Style"))
    ]
    groups = load(files.write_lines(tmp_path / "rows.jsonl", records))
    assert [mean_ratings(row["ratings"]) for row in groups] == [[5, 2], [5, 2]]
    assert [row["pairs"] for row in groups] == [[[0, 1]], [[0, 1]]]
    # parquet gives every row the aspects of all, null where it was not rated
    again = load_preferences(groups.remove_columns(["pairs", "pair_weights"]), format="groups", cache_dir=tmp_path)
    assert [row["pairs"] for row in again] == [[[0, 1]], [[0, 1]]]
    one = load(files.write_lines(tmp_path / "one.jsonl", records[:1]))
    other = load(files.write_lines(tmp_path / "other.jsonl", records[1:]))
    assert [mean_ratings(row["ratings"]) for row in mix([one, other])] == [[5, 2], [5, 2]]
    half = mean_ratings([{"a": 5.0, "b": None}, {"a": 1.0, "b": 2.0}])
    assert math.isnan(half[0]) and half[1] == 1.5


BAD_RATINGS = ["1_0", 0, 6, 1e308, -1, "0", "6", "4/5", True, [4], 10**400, float("inf"), "٤"]


@pytest.mark.parametrize("rating", BAD_RATINGS, ids=lambda value: repr(value)[:12])
def test_a_rating_off_its_scale_names_the_row(rating, tmp_path):
    """Line 19."""
    with pytest.raises(ValueError, match="a rating from 1 to 5|a plain number"):
        check_rating(rating, (1, 5))
    if isinstance(rating, float):
        return  # JSON has no infinity, and 1e308 is written as any other number
    files.write_images(tmp_path, 2)
    record = files.vlfeedback(0)
    record["completions"][2]["annotations"]["Helpfulness"]["Rating"] = rating
    source = files.write_lines(tmp_path / "rows.jsonl", [record, files.vlfeedback(1)])
    words = r"line 1, column 'completions\[2\].annotations.Helpfulness.Rating'.*rating_scale"
    with pytest.raises(RowError, match=words):
        load(source)
    assert len(load(source, on_error="skip")) == 1


def test_a_scale_can_be_declared(tmp_path):
    """Line 19: by the caller, by a column, by the format."""
    record = lambda **own: {**files.vlfeedback(0, ratings=((9, 9, 9), (1, 1, 1))), **own}  # noqa: E731
    files.write_images(tmp_path, 1)
    with pytest.raises(RowError, match="expected a rating from 1 to 5"):
        load(files.write_lines(tmp_path / "a.jsonl", [record()]))
    assert len(load(files.write_lines(tmp_path / "a.jsonl", [record()]), rating_scale=(1, 10))) == 1
    assert len(load(files.write_lines(tmp_path / "b.jsonl", [record(rating_scale=[0, 10])]))) == 1
    for scale in ([1], "1-5", [1, None], [0, 1e300], [-1e7, 1e7], [True, 5]):
        source = files.write_lines(tmp_path / "c.jsonl", [record(rating_scale=scale)])
        with pytest.raises(RowError, match="rating_scale"):
            load(source)
    with pytest.raises(ValueError, match="rating_scale"):
        load(files.write_lines(tmp_path / "a.jsonl", [record()]), rating_scale=(5, 1))


def test_booleans_are_no_indices_and_no_weights(tmp_path):
    """Line 19."""
    for column, value in (("pairs", [[True, False]]), ("pair_weights", [True])):
        record = files.group_record(images=[], pairs=[[0, 1]]) | {column: value}
        with pytest.raises(RowError, match=f"line 1, column '{column}'"):
            load(files.write_lines(tmp_path / "rows.jsonl", [record]))


@pytest.mark.parametrize("part", [{"type": "text", "text": 5}, {"type": "text", "text": ["a"]}, "text", 7, None])
def test_a_text_part_that_is_no_text_is_an_error(part, tmp_path):
    """Line 19: it became Python's form of it."""
    source = files.write_lines(
        tmp_path / "rows.jsonl", [{**PAIR, "chosen": [{"role": "assistant", "content": [part]}]}]
    )
    with pytest.raises(RowError, match="line 1, column 'chosen'"):
        load(source)


def test_nested_json_and_long_numbers_are_errors_of_their_line(tmp_path):
    """Line 8."""
    for text, words in ((DEEP, "nested too deeply"), (LONG_NUMBER, "digits")):
        lines = [json.dumps(PAIR), '{"prompt": ' + text + "}"]
        source = files.write_lines(tmp_path / "rows.jsonl", lines)
        assert len(load(source, on_error="skip")) == 1
        with pytest.raises(RowError, match=f"line 2.*{words}"):
            load(source)
        (tmp_path / "rows.json").write_text("[\n" + ",\n".join(lines) + "]")
        with pytest.raises(DataError, match=f"rows.json:3: .*{words}"):
            load(tmp_path / "rows.json")
        with pytest.raises(JsonError, match=f"^x:2: .*{words}"):
            json_document("[1,\n" + text + "]", "x")


@pytest.mark.parametrize("depth", [100, 500, 900, 960, 990])
def test_a_value_that_can_be_read_but_not_shown(depth, tmp_path):
    """Line 8: Python prints less deeply than it reads."""
    deep = "[" * depth + "]" * depth
    row = '{"prompt": "What?", "chosen": ' + deep + ', "rejected": "b"}'
    source = files.write_lines(tmp_path / "rows.jsonl", [json.dumps(PAIR), row])
    assert len(load(source, on_error="skip")) == 1


META = ["3", "[]", "{", DEEP, '{"a": {"root": 3, "annotation": "x"}}', '{"a": {"root": ".", "annotation": null}}']


@pytest.mark.parametrize("meta", META, ids=range(len(META)))
def test_an_index_of_another_kind_is_named(meta, tmp_path):
    """Line 8."""
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(DataError, match="meta.json"):
        load(tmp_path / "meta.json")


@pytest.mark.parametrize("key", ["root", "annotation"])
@pytest.mark.parametrize("path", ["/", "../..", "../../secret.jsonl"])
def test_an_index_names_what_lies_beside_it(key, path, tmp_path):
    """Line 12."""
    entry = {"root": "images", "annotation": "rows.jsonl"} | {key: path}
    folder = tmp_path / "a" / "b"
    files.write_lines(folder / "rows.jsonl", [PAIR])
    (folder / "meta.json").write_text(json.dumps({"a": entry}))
    with pytest.raises(DataError, match=f"entry 'a': {key} .* lies outside"):
        load(folder / "meta.json")


def damaged_archives(folder):
    """(path, words of the error) of archives that zipfile answers with six kinds of exception."""
    text = (json.dumps(PAIR) + "\n").encode() * 50

    def packed(name, method=zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(folder / name, "w", method) as archive:
            archive.writestr("rows.jsonl", text)
        return bytearray((folder / name).read_bytes())

    data = packed("crc.zip", zipfile.ZIP_STORED)
    data[60] ^= 1
    (folder / "crc.zip").write_bytes(data)
    yield folder / "crc.zip", "CRC"
    for name, offset, value, words in (("encrypted", 6, 1, "encrypted"), ("method", 8, 99, "not known")):
        data = packed(f"{name}.zip")
        start = data.index(b"PK\x01\x02")
        data[offset : offset + 2] = data[start + offset + 2 : start + offset + 4] = bytes([value, 0])
        (folder / f"{name}.zip").write_bytes(data)
        yield folder / f"{name}.zip", words
    packed("bzip2.zip", zipfile.ZIP_BZIP2)
    yield folder / "bzip2.zip", "bzip2; pack it with deflate"
    data = packed("deflate.zip")
    data[45:60] = b"\xff" * 15
    (folder / "deflate.zip").write_bytes(data)
    yield folder / "deflate.zip", "cannot be read"


def test_a_damaged_archive_is_a_data_error(tmp_path):
    """Line 8: bad CRC, encrypted, unknown and unbounded methods, damaged data."""
    for path, words in damaged_archives(tmp_path):
        with pytest.raises(DataError, match=words):
            load(path)
        with pytest.raises(ImageError, match=words):
            open_image(f"zip://rows.jsonl::{path}")
        with pytest.raises(ArchiveError, match=words):
            read_member(str(path), "rows.jsonl", limit=10**6)


def test_a_member_does_not_unpack_to_hundreds_of_times_its_size(tmp_path, monkeypatch):
    """Line 9."""
    monkeypatch.setattr("silkie.io.archives.FREE_RATIO_BYTES", 10**5)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", b" " * 10**6)
        archive.writestr("rows.json", b" " * 10**6)
        archive.writestr("x.png", bytes(10**6))
    with pytest.raises(DataError, match=f"more than {MAX_RATIO} times its size"):
        load(path)
    with pytest.raises(ArchiveError, match="zip bomb"), open_member(str(path), "rows.json"):
        pass
    with pytest.raises(ImageError, match="zip bomb"):
        open_image(f"zip://x.png::{path}")


def test_a_line_without_end_is_an_error_of_its_line(tmp_path, monkeypatch):
    """Line 9: the rest of it is passed over in blocks, and the lines after it are read."""
    file = io.BytesIO(b'{"a": 1}\n"' + b"x" * 10**6 + b'"\n{"a": 2}\n' + b"y" * 100)
    values = [(line.number, line.value, len(line.raw)) for line in json_lines(file, limit=50)]
    assert values == [(1, {"a": 1}, 8), (2, None, 51), (3, {"a": 2}, 8), (4, None, 51)]
    monkeypatch.setattr("silkie.data.raw.MAX_LINE_BYTES", 200)
    source = files.write_lines(tmp_path / "rows.jsonl", [PAIR, {**PAIR, "prompt": "x" * 1000}, {**PAIR, "prompt": "y"}])
    assert len(load(source, on_error="skip")) == 2
    with pytest.raises(RowError, match="line 2.*a line of more than"):
        load(source)


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    """Line 8: the row is named, and the others are read."""
    good = pa.array(["What?"] * 3)
    broken = pa.StringArray.from_buffers(3, *pa.array([b"good", b"\xff\xfe!!", b"fine"], pa.binary()).buffers()[1:])
    rejected = pa.array(["a", "b", "c"])
    pq.write_table(pa.table({"prompt": good, "chosen": broken, "rejected": rejected}), tmp_path / "rows.parquet")
    with pytest.raises(RowError, match="row 1.*cannot be read"):
        load(tmp_path / "rows.parquet", regroup_pairs=False)
    assert len(load(tmp_path / "rows.parquet", on_error="skip", regroup_pairs=False)) == 2


@pytest.mark.parametrize("annotations", [[None], None, [[]], 3, [3]])
def test_annotations_of_another_kind(annotations, tmp_path):
    """Line 8."""
    files.write_images(tmp_path, 2)
    bad = files.vlfeedback(1, dict_of_lists=True)
    bad["completions"]["annotations"] = annotations
    source = files.write_lines(tmp_path / "rows.jsonl", [bad, files.vlfeedback(0)])
    assert len(load(source, on_error="skip")) in (1, 2)


@pytest.mark.parametrize(
    "name", ["\ud83d", "Help\0", "a\nb", " ", "x" * 300], ids=["half", "nul", "line", "blank", "long"]
)
def test_the_name_of_an_aspect_is_printable_text(name, tmp_path):
    """Line 8: half of a surrogate pair ended in a DatasetGenerationError, a NUL in a dataset of unreadable rows."""
    bad = files.group_record(images=[], ratings=[{name: 5}, {name: 1}])
    source = files.write_lines(tmp_path / "rows.jsonl", [bad, files.group_record(images=[], id="b")])
    with pytest.raises(RowError, match="line 1, column 'ratings'.*printable text"):
        load(source)
    (row,) = load(source, on_error="skip")
    assert row["id"] == "b" and list(row["ratings"][0]) == ["Help"]
    with pytest.raises(DataError, match="cannot be the name of an aspect"):
        load(source, aspects=(name,))


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png", "x" * 5000, "a/" * 3000])
def test_a_path_that_cannot_be_one(path, tmp_path):
    """Line 8."""
    source = files.write_lines(tmp_path / "rows.jsonl", [{**PAIR, "image": path}, PAIR])
    assert len(load(source, on_error="skip")) == 1
    with pytest.raises(RowError, match="line 1, column 'image'"):
        load(source)


def test_no_row_reads_outside_the_directory_of_the_data(tmp_path):
    """Line 12: without image_root."""
    files.write_images(tmp_path / "elsewhere", 2)
    with zipfile.ZipFile(tmp_path / "elsewhere" / "a.zip", "w") as archive:
        archive.writestr("0.png", files.png(0))
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (data / "folder").symlink_to(tmp_path / "elsewhere")
    images = ("../elsewhere/0.png", str(tmp_path / "elsewhere" / "1.png"), "link.png", "folder/0.png")
    for image in (*images, f"zip://0.png::{tmp_path}/elsewhere/a.zip"):
        source = files.write_lines(data / "rows.jsonl", [{**PAIR, "image": image}])
        with pytest.raises(RowError, match="not below the directory of the data.*pass image_root=DIRECTORY"):
            load(source)
        assert load(source, image_root=tmp_path)[0]["images"][0]["path"]


def test_a_link_does_not_leave_the_image_root(tmp_path):
    """Line 12: with image_root."""
    files.write_images(tmp_path / "elsewhere", 1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    for image in ("link.png", "folder/0.png", "some/where/link.png"):
        source = files.write_lines(tmp_path / "rows.jsonl", [{**PAIR, "image": image}])
        with pytest.raises(RowError, match="no file of that name below image_root"):
            load(source, image_root=root)
    # the root itself may be a link
    (tmp_path / "named").symlink_to(tmp_path / "elsewhere")
    source = files.write_lines(tmp_path / "rows.jsonl", [{**PAIR, "image": "0.png"}])
    assert len(load(source, image_root=tmp_path / "named")) == 1


def test_the_links_of_the_hub_cache_stay_inside_it(tmp_path):
    """Line 12: a snapshot is a folder of links into `blobs`."""
    cache = tmp_path / "datasets--me--mine"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (cache / "blobs" / "1234").write_bytes(files.png(0))
    (snapshot / "0.png").symlink_to("../../blobs/1234")
    (snapshot / "out.png").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(files.png(1))
    assert is_below(snapshot / "0.png", snapshot) and not is_below(snapshot / "out.png", snapshot)
    assert not is_below(tmp_path / "snapshots" / "x", tmp_path / "other")
    source = files.write_lines(snapshot / "rows.jsonl", [{**PAIR, "image": "0.png"}])
    assert len(load(source)) == 1


def test_pillow_is_given_a_list_of_formats(tmp_path, monkeypatch):
    """Line 20: EPS goes to Ghostscript."""
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    for data in (eps.getvalue(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"):
        for function in (open_image, image_size):
            with pytest.raises(ImageError, match="not an image that Pillow can read"):
                function({"bytes": data, "path": None})
    assert "EPS" not in readable_formats() and {"PNG", "JPEG", "WEBP"} <= set(readable_formats())


TOKENS = ["<|im_end|>", "<|im_start|>", "<|vision_start|>"]


@pytest.mark.parametrize("token", TOKENS)
def test_a_special_token_in_a_row_is_refused_or_asked_for(token):
    """Line 17. With "parse" the tokens are those that TRL's chat template and tokenizer give."""
    rows = mixed_groups()
    rows[1] = {**rows[1], "responses": [f"two {token} cat", "one"]}
    processor = tiny_processor()
    with pytest.raises(GroupError, match=r"row 1.*responses\[0\].*special token.*special_tokens='parse'"):
        prepare_groups(dataset(rows), GroupEncoder(processor))
    kept, report = prepare_groups(dataset(rows), GroupEncoder(processor), on_bad_row="skip")
    assert len(kept) == len(rows) - 1 and sum(map(len, report.dropped.values())) == 1
    encoder = GroupEncoder(processor, special_tokens="parse")
    assert len(prepare_groups(dataset(rows), encoder)[0]) == len(rows)
    ids = processor.tokenizer.convert_tokens_to_ids(token)
    assert ids in encoder.encode(rows[1]).responses[0][:-1].tolist()
    prompt = [{"role": "user", "content": [{"type": "text", "text": f"is {token} it"}]}]
    rows[1] = {**rows[1], "prompt": prompt, "images": [], "responses": ["two", "one"]}
    with pytest.raises(GroupError, match=r"row 1.*prompt\[0\].*special token"):
        prepare_groups(dataset(rows), GroupEncoder(processor))


def test_what_stands_for_an_image_is_refused_always():
    """Line 17."""
    rows = [{**mixed_groups()[0], "responses": ["a <|image_pad|>", "one", "two", "no"]}]
    with pytest.raises(GroupError, match=r"special token <\|image_pad\|>"):
        prepare_groups(dataset(rows), GroupEncoder(tiny_processor(), special_tokens="parse"))


@pytest.mark.parametrize("error", [MemoryError, OverflowError, RecursionError])
def test_a_template_that_ends_in_no_text_is_named(error):
    """Line 16. That a template hangs is not bounded: it comes with the model, and is trusted as the model is."""

    class Processor:
        chat_template = "x"

        def apply_chat_template(self, *_, **__):
            raise error

    with pytest.raises(TemplateMismatch, match=f"ends in {error.__name__} instead of a text"):
        ChatTemplate(processor=Processor())._render({}, [])
