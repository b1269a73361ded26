"""Prompt and responses are the tokens of `apply_chat_template(prompt + [answer])`, split where TRL splits them, for
every chat template that the installed TRL ships."""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import transformers
import trl
from jinja2 import TemplateError
from trl.data_utils import _tokenize, apply_chat_template, common_prefix_length
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from silkie.batch.encoding import GroupEncoder
from silkie.batch.measure import GroupError
from silkie.batch.preparation import prepare_groups
from silkie.batch.template import TemplateMismatch
from silkie.data import DataError, load_preferences
from silkie.model.processor import image_only_class
from tests.support.data import dataset, mixed_groups
from tests.support.tiny import byte_level_tokenizer, image, tiny_processor

TEMPLATES = {p.stem: p.read_text(encoding="utf-8") for p in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
ANSWERS = [
    "A red cat.",
    "  The dog is on the left. \n",
    "\n\nThere are two lines\n\nand a gap.",
    "<think>\nI see the cat.\n</think>\n\nThe cat is red.",
    "<think>short</think>No.",
]
CONVERSATIONS = {
    "one turn": [("user", "What is in the image?")],
    "several turns": [("user", "What is it? "), ("assistant", "A cat."), ("user", "\nAnd the colour?")],
    "earlier reasoning": [
        ("user", "What is it?"),
        ("assistant", "<think>\nEasy.\n</think>\n\nA cat."),
        ("user", "Which colour?"),
    ],
    "system": [("system", "You are brief.\n"), ("user", "What is in the image?")],
}
VARIABLES = [{}, {"enable_thinking": True}, {"enable_thinking": False}]

# Templates of vision-language models, with what they write for an image
VISION = {
    "qwen2_5_vl": "<|image_pad|>",
    "qwen3_vl": "<|image_pad|>",
    "qwen3_5_nothink": "<|image_pad|>",
    "qwen3_5_think": "<|image_pad|>",
    "qwen3_6": "<|image_pad|>",
    "qwen3_8": "<|image_pad|>",
    "gemma3": "<start_of_image>",
    "gemma4": "<|image|>",
    "gemma4_v5": "<|image|>",
    "smolvlm": "<image>",
    "idefics3": "<image>",
    "llava_next": "<image>",
    "lfm2_2_5_vl": "<image>",
    "muse_glimmer": "<|patch|>",
    "glm4moe": None,  # writes no image: its models have another template
}
# A space before the answer that is not in the generation prompt: what SmolVLM's, Idefics3's and LLaVA-Next's do
SPACED = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {{ m['content'][0]['text'] }}</s> {% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<|image_pad|>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
MARKS = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|<\|?[a-z_]+\|?>|<\|[a-z_]+>|<[a-z_]+\|>|</?think>|</s>")


@cache
def tokenizer(template):
    """A byte-level tokenizer that knows the template's special tokens, and in which white space merges."""
    texts = [*ANSWERS, *(text for turns in CONVERSATIONS.values() for _, text in turns)]
    corpus = [*texts * 3, "user\nassistant\n\n\n</think>\n\nAssistant: User: [INST] [/INST]  \n\n\n" * 5]
    special = sorted({*MARKS.findall(template), "<|image_pad|>", "<think>", "</think>"})
    made = byte_level_tokenizer(corpus, special, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    made.chat_template = template
    return made


@cache
def processor(template, mark="<|image_pad|>"):
    """Qwen2.5-VL's processor with the template, and with the image token that the template writes."""
    made = tokenizer(template)
    made.image_token, made.image_token_id = mark, made.convert_tokens_to_ids(mark)
    images = tiny_processor().image_processor
    cls = image_only_class(transformers.Qwen2_5_VLProcessor)
    assert cls is image_only_class(transformers.Qwen2_5_VLProcessor, ("video_processor",))  # as pickle finds it again
    return cls(image_processor=images, tokenizer=made, chat_template=template)


def as_strings(turns):
    return [{"role": role, "content": text} for role, text in turns]


def as_parts(turns, images=()):
    rest = list(images)
    messages = []
    for role, text in turns:
        mine, rest = ([], rest) if role != "user" else (rest, [])
        messages.append(
            {"role": role, "content": [*({"type": "image", **i} for i in mine), {"type": "text", "text": text}]}
        )
    return messages


def template_tokens(processing, messages, **variables):
    ids = processing.apply_chat_template(messages, tokenize=True, return_dict=True, **variables)["input_ids"]
    return ids[0] if isinstance(ids[0], list) else ids


def trl_split(processing, prompt, answers, **variables):
    """TRL's `tokenize_fn`: the tokens of the prompt, and of the two answers of a pair."""
    alone = _tokenize(processing, prompt, add_generation_prompt=True, **variables)["input_ids"]
    whole = [_tokenize(processing, [*prompt, a], **variables)["input_ids"] for a in answers]
    length = min(common_prefix_length(alone, ids) for ids in whole)
    return alone[:length], [ids[length:] for ids in whole]


def joined(group):
    return [[*group.prompt_ids.tolist(), *r.tolist()] for r in group.responses]


def test_the_installed_trl_still_ships_the_templates_tested_here():
    assert len(TEMPLATES) >= 72
    assert set(VISION) <= set(TEMPLATES)


@pytest.mark.parametrize("variables", VARIABLES, ids=str)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_tokens_are_those_of_the_template_and_of_trl(name, variables):
    template, tried = TEMPLATES[name], 0
    mark = VISION.get(name.removesuffix("_training"))
    processing = processor(template, mark) if mark else tokenizer(template)
    encoder = GroupEncoder(processing, chat_template_kwargs=variables)
    write = as_parts if mark else as_strings
    for turns in CONVERSATIONS.values():
        row = {"prompt": as_parts(turns), "responses": ANSWERS}
        answers = [write([("assistant", answer)])[0] for answer in ANSWERS]
        try:
            expected = [template_tokens(processing, [*write(turns), a], **variables) for a in answers]
        except TemplateError:  # the template refuses the system turn
            with pytest.raises(TemplateError):
                encoder.encode(row)
            continue
        assert joined(encoder.encode(row)) == expected
        for first, second in pairwise(range(len(ANSWERS))):
            pair = encoder.encode({**row, "responses": [ANSWERS[first], ANSWERS[second]]})
            prompt, responses = trl_split(processing, write(turns), [answers[first], answers[second]], **variables)
            assert pair.prompt_ids.tolist() == prompt
            assert [r.tolist() for r in pair.responses] == responses
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    ("template", "mark"),
    [
        *(pytest.param(TEMPLATES[name], mark, id=name) for name, mark in VISION.items() if mark),
        pytest.param(SPACED, "<image>", id="a space before the answer"),
        pytest.param(BRACKETS, "<image>", id="a space before the answer, no special token after the images"),
    ],
)
def test_tokens_with_images(template, mark, images):
    made = processor(template, mark)
    pictures = [image(i, 56 + 28 * i) for i in range(images)]
    encoder = GroupEncoder(made)
    for turns in (CONVERSATIONS["one turn"], CONVERSATIONS["several turns"]):
        row = {"prompt": as_parts(turns, [{}] * images), "responses": ANSWERS, "images": pictures}
        messages = as_parts(turns, [{"image": picture} for picture in pictures])
        group = encoder.encode(row)
        expected = [template_tokens(made, [*messages, *as_parts([("assistant", a)])]) for a in ANSWERS]
        assert joined(group) == expected
        assert (group.prompt_ids == made.image_token_id).sum() >= 2 * images
        types = group.token_inputs["mm_token_type_ids"]
        assert (types > 0).sum() == (group.prompt_ids == made.image_token_id).sum()
        lengths = encoder.measure(row, [(p.height, p.width) for p in pictures])
        assert lengths.prompt == len(group.prompt_ids)
        assert lengths.responses == tuple(map(len, group.responses))


@pytest.mark.parametrize("name", sorted(name for name, mark in VISION.items() if mark))
def test_the_text_with_images_is_trls(name):
    """TRL's collator tokenises the completions of an image row apart from the prompt. The text is the same; the tokens
    are too, unless a completion starts within a token of the whole text (a line break next to another one)."""
    picture, question = image(0), [("user", "What is it?")]
    made = processor(TEMPLATES[name], VISION[name])
    made.tokenizer.padding_side = "left"
    encoder, collator, same = GroupEncoder(made), DataCollatorForVisionPreference(made), 0
    for pair in (ANSWERS[:2], [ANSWERS[0], ANSWERS[2]], ANSWERS[3:]):
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in pair)
        row = {"images": [picture], "prompt": as_strings(question), "chosen": chosen, "rejected": rejected}
        theirs = collator([dict(row)])
        ours = encoder.encode({"images": [picture], "prompt": as_parts(question, [{}]), "responses": pair})
        parts = {key: as_parts([("assistant", a)]) for key, a in zip(("chosen", "rejected"), pair, strict=True)}
        texts = apply_chat_template({"prompt": as_parts(question, [{}]), **parts}, made)
        alone, *whole = (
            made.tokenizer(text)["input_ids"]
            for text in (texts["prompt"], *(texts["prompt"] + texts[key] for key in ("chosen", "rejected")))
        )
        on_boundary = all(ids[: len(alone)] == alone for ids in whole)
        for i, ids in enumerate(joined(ours)):
            trl_ids = theirs["input_ids"][i][theirs["attention_mask"][i].bool()].tolist()
            assert made.tokenizer.decode(trl_ids) == made.tokenizer.decode(ids)
            assert trl_ids == ids or not on_boundary
            if on_boundary and encoder.render({"prompt": as_parts(question, [{}])}) == texts["prompt"]:
                assert theirs["completion_mask"][i].sum() == len(ours.responses[i])
                same += 1
    # Qwen3.8's reads no reasoning in the text of an answer, so every completion starts with a line break after another
    assert same >= 2 or name == "qwen3_8"


def test_an_unclosed_thinking_block_is_another_text():
    """What silkie did before: the answer and the end of the turn put after the prompt by hand."""
    made = processor(TEMPLATES["qwen3_5_think"])
    encoder = GroupEncoder(made)
    row = {"prompt": as_parts(CONVERSATIONS["one turn"]), "responses": ANSWERS[:1]}
    by_hand = made.tokenizer(encoder.render(row) + ANSWERS[0] + "<|im_end|>\n")["input_ids"]
    expected = template_tokens(made, [*row["prompt"], *as_parts([("assistant", ANSWERS[0])])])
    assert joined(encoder.encode(row)) == [expected]
    assert by_hand != expected
    assert "</think>" not in made.tokenizer.decode(by_hand)
    assert "<think>\n\n</think>\n\nA red cat." in made.tokenizer.decode(expected)


def test_one_prompt_for_answers_with_and_without_reasoning():
    made = processor(TEMPLATES["qwen3_5_think"])
    encoder = GroupEncoder(made)
    row = {"prompt": as_parts(CONVERSATIONS["one turn"]), "responses": [ANSWERS[3], ANSWERS[4], ANSWERS[0]]}
    lengths = encoder.measure(row, [])
    assert lengths.header == (1, 1, 0)  # the line break after <think> is the prompt's for the first two alone
    assert lengths.unlike == 1
    assert made.tokenizer.decode(encoder.encode(row).prompt_ids).endswith("<think>")
    data, report = prepare_groups(
        dataset([{**mixed_groups()[2], **row, "images": [], "pairs": [[0, 1], [0, 2]], "pair_weights": [1.0, 1.0]}]),
        encoder,
    )
    assert (report.open_headers, report.header_pairs) == (1, 1)
    assert data["prompt_length"] == [lengths.prompt]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_5_think", "gemma3", "smolvlm", "llava_next"])
def test_end_of_turn_stops_at_the_token_that_ends_it(name):
    made = processor(TEMPLATES[name], VISION[name])
    row = {"prompt": as_parts(CONVERSATIONS["one turn"]), "responses": ANSWERS}
    whole, short = (GroupEncoder(made, response_end=end).encode(row).responses for end in ("template", "end_of_turn"))
    end = {"gemma3": "<end_of_turn>", "smolvlm": "<end_of_utterance>", "llava_next": "</s>"}.get(name, "<|im_end|>")
    assert all(made.tokenizer.decode(ids).endswith(end) for ids in short)
    assert all(w[: len(s)].tolist() == s.tolist() for w, s in zip(whole, short, strict=True))


def test_a_template_without_an_end_is_taken_as_it_is():
    template = TEMPLATES["glm4moe"]
    row = {"prompt": as_parts(CONVERSATIONS["one turn"]), "responses": ANSWERS[:2]}
    made = tokenizer(template)
    whole, ended = (GroupEncoder(made, response_end=end).encode(row).responses for end in ("template", "end_of_turn"))
    assert all(e.tolist() == [*w.tolist(), made.eos_token_id] for w, e in zip(whole, ended, strict=True))


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row():
    """This one keeps the reasoning of a turn only while no other answer follows it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and messages[loop.index:] | selectattr('role', 'equalto', 'assistant') | list %}"
        "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoder = GroupEncoder(tokenizer(template))
    good = {**mixed_groups()[2], "prompt": as_parts(CONVERSATIONS["several turns"]), "id": "good"}
    bad = {**good, "prompt": as_parts(CONVERSATIONS["earlier reasoning"]), "id": "bad"}
    assert joined(encoder.encode(good))
    with pytest.raises(TemplateMismatch, match="get_training_chat_template"):
        encoder.measure(bad, [])
    with pytest.raises(ValueError, match="id 'bad'.*chat_template_kwargs"):
        encoder.encode(bad)
    with pytest.raises(GroupError, match="id 'bad'.*writes the turns of the prompt differently"):
        prepare_groups(dataset([good, bad]), encoder)
    assert prepare_groups(dataset([good, bad]), encoder, on_bad_row="skip")[1].groups == 1


def test_variables_of_the_template_from_config_and_row():
    made = processor(TEMPLATES["qwen3_5_think"])
    row = {"prompt": as_parts(CONVERSATIONS["one turn"]), "responses": ANSWERS[:1]}
    plain = GroupEncoder(made)
    off = GroupEncoder(made, chat_template_kwargs={"enable_thinking": False})
    closed = off.encode(row)
    assert made.tokenizer.decode(closed.prompt_ids).endswith("<think>\n\n</think>\n\n")
    assert off.fingerprint() != plain.fingerprint()
    for own in ({"enable_thinking": False, "other": None}, '{"enable_thinking": false}'):
        assert joined(plain.encode({**row, "chat_template_kwargs": own})) == joined(closed)
        assert plain.encode({**row, "chat_template_kwargs": own}).prompt_ids.tolist() == closed.prompt_ids.tolist()
    on = off.encode({**row, "chat_template_kwargs": {"enable_thinking": True}})
    assert on.prompt_ids.tolist() == plain.encode(row).prompt_ids.tolist()
    with pytest.raises(ValueError, match="add_generation_prompt"):
        GroupEncoder(made, chat_template_kwargs={"add_generation_prompt": True})
    with pytest.raises(ValueError, match="row without id.*tokenize"):
        plain.encode({**row, "chat_template_kwargs": {"tokenize": True}})


def test_answers_of_several_turns_and_tools():
    """A response may be a list of turns, and a row may bring tools, as in TRL's rows."""
    made = tokenizer(TEMPLATES["qwen3"])
    tool = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "cat"}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "red"},
        {"role": "assistant", "content": "It is red."},
    ]
    prompt = as_strings([("user", "Which colour?")])
    group = GroupEncoder(made).encode({"prompt": prompt, "responses": [turns, "Red."], "tools": [tool]})
    plain = [{"role": "assistant", "content": "Red."}]
    assert joined(group) == [template_tokens(made, [*prompt, *answer], tools=[tool]) for answer in (turns, plain)]


def test_a_tokenizer_that_adds_its_own_tokens():
    """LLaVA-Next's template writes no <s>; its tokenizer adds one."""
    from tokenizers.processors import TemplateProcessing

    made = processor(TEMPLATES["llava_next"], "<image>").tokenizer
    added = byte_level_tokenizer(
        ANSWERS * 3, ["<image>", "</s>"], bos_token="<bos>", eos_token="</s>", pad_token="<pad>"
    )
    added.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", added.bos_token_id)]
    )
    added.image_token, added.image_token_id = "<image>", added.convert_tokens_to_ids("<image>")
    cls = image_only_class(transformers.Qwen2_5_VLProcessor)
    template = made.chat_template
    own = cls(image_processor=tiny_processor().image_processor, tokenizer=added, chat_template=template)
    picture, turns = image(0), CONVERSATIONS["one turn"]
    row = {"prompt": as_parts(turns, [{}]), "responses": ANSWERS, "images": [picture]}
    encoder = GroupEncoder(own)
    group = encoder.encode(row)
    messages = as_parts(turns, [{"image": picture}])
    assert joined(group) == [template_tokens(own, [*messages, *as_parts([("assistant", a)])]) for a in ANSWERS]
    assert group.prompt_ids[0] == added.bos_token_id
    assert encoder.measure(row, [(56, 56)]).prompt == len(group.prompt_ids)


def test_outputs_with_one_number_per_token_are_recognised_by_shape(monkeypatch):
    made = processor(TEMPLATES["qwen2_5_vl"])
    call = type(made).__call__

    def with_more(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        out["moe_mm_token_type_ids"] = (out["input_ids"] == self.image_token_id).long() * 2
        return out

    monkeypatch.setattr(type(made), "__call__", with_more)
    row = {"prompt": as_parts(CONVERSATIONS["one turn"], [{}]), "responses": ANSWERS[:2], "images": [image(0)]}
    group = GroupEncoder(made).encode(row)
    assert set(group.token_inputs) == {"mm_token_type_ids", "moe_mm_token_type_ids"}
    assert all(ids.shape == group.prompt_ids.shape for ids in group.token_inputs.values())
    assert (group.token_inputs["moe_mm_token_type_ids"] == 2 * group.token_inputs["mm_token_type_ids"]).all()
    assert set(group.vision) == {"pixel_values", "image_grid_thw"}


@pytest.mark.parametrize("where", ["mark", "part"])
def test_a_video_is_refused_or_counted(where):
    part = {"type": "video"} if where == "part" else {"type": "text", "text": "<video>"}
    good, bad = ({**mixed_groups()[2], "id": name} for name in ("good", "bad"))
    bad["prompt"] = [
        {"role": "user", "content": [{**part, "text": part.get("text")}, {"type": "text", "text": "what?"}]}
    ]
    encoder = GroupEncoder(tiny_processor())
    with pytest.raises(GroupError, match="id 'bad'.*video.*frames"):
        prepare_groups(dataset([good, bad]), encoder)
    _, report = prepare_groups(dataset([good, bad]), encoder, on_bad_row="skip")
    assert report.groups == 1
    assert list(report.dropped) == ["column 'prompt': expected no video"]


ASKED = {"prompt": "What happens?", "responses": ["A cat runs.", "A dog sleeps."], "pairs": [[0, 1]]}
RANKED = {"chosen": "A cat runs.", "rejected": "A dog sleeps."}
VIDEO_ROWS = {
    "group": {**ASKED, "videos": ["a.mp4"]},
    "group with a mark": {**ASKED, "prompt": "<video>\nWhat happens?"},
    "ShareGPT": {"conversations": [{"from": "human", "value": "What happens?"}], "videos": ["a.mp4"], **RANKED},
    "ShareGPT with a mark": {"conversations": [{"from": "human", "value": "<video>What happens?"}], **RANKED},
    "RLAIF-V": {"question": "What happens?", "video": "a.mp4", "image": "frame.png", "ds_name": "x", **RANKED},
}


@pytest.mark.parametrize("kind", VIDEO_ROWS)
def test_no_source_drops_a_video_in_silence(kind, tmp_path):
    image(0).save(tmp_path / "frame.png")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(VIDEO_ROWS[kind]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"(?i)video"):
        load_preferences(rows, cache_dir=tmp_path)
