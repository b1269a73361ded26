"""Tokens of a group: the prompt whole, responses cut at the tail only, counts that match what is encoded."""

import pytest

from silkie.batch.encoding import GroupEncoder
from tests.support.data import mixed_groups
from tests.support.families import FAMILIES, QWEN, family_processor
from tests.support.tiny import conversation, image, tiny_processor


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.mark.parametrize("row", mixed_groups(), ids=lambda row: row["id"])
def test_measure_equals_encode(processor, row):
    encoder = GroupEncoder(processor)
    sizes = {"one": [(56, 56)], "two": [(56, 84), (56, 56)], "none": [], "last": [(56, 56)]}[row["id"]]
    encoded, lengths = encoder.encode(row), encoder.measure(row, sizes)
    assert lengths.prompt == len(encoded.prompt_ids)
    assert lengths.responses == tuple(len(r) for r in encoded.responses)
    assert lengths.cut == 0


@pytest.mark.parametrize("family", [*FAMILIES, *QWEN])
def test_measure_equals_encode_in_every_family(family):
    encoder = GroupEncoder(family_processor(family))
    for shapes in ([(56, 56)], [(84, 140)], [(84, 140), (56, 112)]):
        images = [image(i, width, height) for i, (height, width) in enumerate(shapes)]
        row = {"prompt": conversation("how many cat", len(images)), "responses": ["a dog", "no"], "images": images}
        encoded, lengths = encoder.encode(row), encoder.measure(row, shapes)
        assert (lengths.prompt, lengths.responses) == (len(encoded.prompt_ids), tuple(map(len, encoded.responses)))


def test_image_tokens_are_expanded_and_marked(processor):
    row = mixed_groups()[1]
    encoded = GroupEncoder(processor).encode(row)
    image_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    expected = int(encoded.vision["image_grid_thw"].prod(-1).sum()) // 4
    assert (encoded.prompt_ids == image_id).sum() == expected
    assert ((encoded.token_inputs["mm_token_type_ids"] == 1) == (encoded.prompt_ids == image_id)).all()


def test_response_ends_as_the_template_ends_a_turn(processor):
    tok = processor.tokenizer
    template, end_of_turn = (
        GroupEncoder(processor, response_end=e).encode(mixed_groups()[0]).responses[0]
        for e in ("template", "end_of_turn")
    )
    assert tok.convert_ids_to_tokens(template.tolist()) == ["a", "red", "cat", "<|im_end|>", "\n"]
    assert tok.convert_ids_to_tokens(end_of_turn.tolist()) == ["a", "red", "cat", "<|im_end|>"]


def test_a_response_keeps_the_white_space_that_the_template_keeps(processor):
    row = mixed_groups()[0]
    encoder = GroupEncoder(processor)
    plain = encoder.encode(row).responses
    spaced = encoder.encode({**row, "responses": ["\n\n" + r for r in row["responses"]]}).responses
    line_break = processor.tokenizer.convert_tokens_to_ids("\n")
    assert [s.tolist() for s in spaced] == [[line_break] * 2 + p.tolist() for p in plain]


def test_only_response_tails_are_cut(processor):
    row = mixed_groups()[0]
    whole = GroupEncoder(processor).encode(row)
    limit = len(whole.prompt_ids) + 3
    encoder = GroupEncoder(processor, max_length=limit)
    cut = encoder.encode(row)
    assert (cut.prompt_ids == whole.prompt_ids).all()
    assert [len(r) for r in cut.responses] == [min(3, len(r)) for r in whole.responses]
    assert all((c == w[: len(c)]).all() for c, w in zip(cut.responses, whole.responses, strict=True))
    assert encoder.measure(row, [(56, 56)]).cut == sum(len(r) > 3 for r in whole.responses)


def test_a_prompt_that_fills_the_limit_does_not_fit(processor):
    row = mixed_groups()[0]
    length = len(GroupEncoder(processor).encode(row).prompt_ids)
    assert not GroupEncoder(processor, max_length=length).measure(row, [(56, 56)]).fits
    with pytest.raises(ValueError, match="no room for a response"):
        GroupEncoder(processor, max_length=length).encode(row)


def test_fingerprint_follows_what_decides_the_tokens(processor):
    base = GroupEncoder(processor).fingerprint()
    assert base == GroupEncoder(tiny_processor()).fingerprint()
    assert base != GroupEncoder(processor, max_length=50).fingerprint()
    assert base != GroupEncoder(tiny_processor(image_side=112)).fingerprint()


def test_a_processor_without_template_is_refused():
    processor = tiny_processor()
    processor.chat_template = None
    encoder = GroupEncoder(processor)
    with pytest.raises(ValueError, match="chat template"):
        encoder.encode(mixed_groups()[0])
