"""Private pieces of other packages that silkie leans on: each is declared here, read in one module, and its assumption
has a test that fails with a sentence when a release breaks it."""

import ast
import inspect
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
import transformers
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, Trainer
from transformers.integrations import deepspeed
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from trl import DPOConfig, DPOTrainer

import silkie
from silkie import SilkieDPOConfig, SilkieDPOTrainer
from silkie.data.stamps import fingerprint_of
from silkie.model.families import attention_implementation, loaded_from, reads_images
from silkie.model.positions import PromptPositions
from silkie.model.vision import unhook_vision
from silkie.model.weightless import weightless
from silkie.training.startup import trl_init
from tests.conformance.compare import Case, build, chats
from tests.support.tiny import image, tiny_model, tiny_processor, tiny_tokenizer

PACKAGE = Path(silkie.__file__).parent

# Name -> modules of silkie that read it. Methods that are overridden are in RUN, which a run of the trainer calls.
PIECES = {
    # transformers
    "_attn_implementation": {"model/families.py"},
    "_class_to_module": {"model/tiny/processor.py"},
    "_get_num_multimodal_tokens": {"batch/splitting.py"},
    "_hf_deepspeed_config_weak_ref": {"model/weightless.py"},
    "_keep_in_fp32_modules_strict": {"plan/check.py"},
    "_local_mapping": {"model/attention/own_masks.py"},
    "_model_mapping": {"model/families.py"},
    "_name_or_path": {"model/families.py"},
    "_prepare_inputs": {"training/before_training.py", "training/trl_surface.py"},
    "_train_batch_size": {"trainer.py"},
    "_weight_conversions": {"model/families.py"},
    # trl
    "_metrics": {"training/record.py", "losses/objective.py"},  # the objective's is its own
    "_total_train_tokens": {"training/record.py"},
    "_VALID_DICT_FIELDS": {"config/options.py"},
    # datasets, torch, pydantic, the standard library
    "_distributed": {"batch/streaming.py"},
    "_fingerprint": {"data/stamps.py"},
    "_assert_async": {"logprob/api.py"},
    "_ConvNd": {"model/adapters.py", "plan/counting.py"},
    "_DropoutNd": {"model/dropout.py"},
    "_forward_hooks": {"model/vision.py"},
    "_modules": {"model/logits.py"},
    "_SubParsersAction": {"io/completion.py"},
    "_actions": {"io/completion.py", "run/command.py", "run/launch.py"},
    "_print_message": {"run/command.py"},
}
RUN = {
    "_save",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_best_model",
    "_get_grad_norm",
    "_prepare_dataset",
}
DOCUMENTED = {"_exit", "_replace"}  # of os and of named tuples


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        yield from ((place, node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def own_names() -> set[str]:
    """What silkie defines itself: functions, classes, names and attributes that are given a value."""
    names = set()
    for _, node in nodes():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in (part for t in targets for part in ast.walk(t)):
            if isinstance(target, ast.Name):
                names.add(target.id)
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                names.add(target.attr)
    return names


def read_names() -> dict[str, set[str]]:
    """Names with one underscore in front -> modules that read them from an object, by any spelling."""
    found: dict[str, set[str]] = defaultdict(set)
    for place, node in nodes():
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("silkie"):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        for name in names:
            if name.startswith("_") and not name.startswith("__"):
                found[name].add(place)
    return found


def test_every_private_piece_is_declared_and_read_where_it_is_declared():
    own, read = own_names() - set(PIECES), read_names()
    foreign = {name: places for name, places in read.items() if name not in own | RUN | DOCUMENTED}
    assert foreign == PIECES, "declare the piece in PIECES, behind one function, with a test of what it is taken to be"


def test_the_source_text_of_models_decides_nothing_in_a_run():
    readers = {place for place, node in nodes() if isinstance(node, ast.Attribute) and node.attr == "getsource"}
    assert readers <= {"model/tiny/config.py", "model/tiny/processor.py", "data/registry.py"}, (
        "only the factory of tiny models reads transformers' source text, and the registry that of silkie's sources"
    )


def test_a_config_knows_where_it_was_loaded_from_and_which_attention_runs(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert loaded_from(AutoConfig.from_pretrained(tmp_path)) == str(tmp_path), (
        "config._name_or_path no longer holds the directory that a config was loaded from"
    )
    assert loaded_from(type(model.config)()) == ""
    model.set_attn_implementation({"text_config": "eager"})
    assert attention_implementation(model.config.get_text_config()) == "eager", (
        "config._attn_implementation no longer names the attention that set_attn_implementation sets"
    )


def test_transformers_says_which_configs_read_images():
    assert reads_images(transformers.Qwen2_5_VLConfig()) and not reads_images(transformers.Qwen2Config()), (
        "AutoModelForImageTextToText._model_mapping no longer maps the configs of models that read images"
    )


def test_mask_functions_can_be_replaced_by_name_and_get_the_rule():
    seen, name = [], "sdpa"
    stock = ALL_MASK_ATTENTION_FUNCTIONS[name]
    assert name not in ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, (
        "_local_mapping no longer holds only what was replaced"
    )
    ALL_MASK_ATTENTION_FUNCTIONS[name] = lambda **rule: seen.append(set(rule)) or stock(**rule)
    try:
        model = tiny_model()
        model(input_ids=torch.tensor([[3, 4, 5]]), attention_mask=torch.tensor([[1, 1, 0]]))
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[name]
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is stock, "deleting a mask function no longer brings back the stock one"
    wanted = {"config", "q_length", "kv_length", "batch_size", "mask_function", "allow_is_causal_skip", "dtype"}
    assert seen and all(wanted <= rule for rule in seen), (
        f"transformers' masks are no longer made by a function that gets {sorted(wanted)}"
    )


def test_the_head_and_the_features_are_asked_through_the_model():
    """`scored_head` and `image_features_once` put functions in their place for a call."""
    model, given = tiny_model(), []
    head = model.get_output_embeddings()
    head.forward = lambda hidden: given.append(hidden.shape) or torch.full((1, 2, 1), 7.0)
    logits = model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits
    assert given == [(1, 4, 32)] and torch.equal(logits, torch.full((1, 2, 1), 7.0)), (
        "a model's forward no longer hands all its hidden states to the head and returns what that gives"
    )
    model, calls = tiny_model(), []
    inner, inputs = model.base_model, plain_inputs()
    own = inner.get_image_features
    inner.get_image_features = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    model(**inputs)
    assert calls == [1], "a model's forward no longer takes image features from the instance's get_image_features, once"


def plain_inputs():
    processor = tiny_processor()
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    )
    return dict(processor(text=text, images=[image()], return_tensors="pt"))


def test_positions_need_no_weights():
    model, inputs = tiny_model(), plain_inputs()
    expected, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
    vision = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    types = {k: v[0] for k, v in inputs.items() if k == "mm_token_type_ids"}
    found = PromptPositions(model)(inputs["input_ids"][0], types, vision)
    assert torch.equal(found, expected[:, 0]), (
        "get_rope_index reads more of a model than its config and plain attributes"
    )


def test_processors_count_image_tokens_by_size():
    from silkie.batch.encoding import GroupEncoder

    assert GroupEncoder(tiny_processor()).splitter.counts_image_tokens, (
        "processor._get_num_multimodal_tokens no longer counts as the processor encodes: images are decoded to be counted"
    )


def test_weights_know_their_conversions():
    from transformers.core_model_loading import WeightTransform

    assert callable(WeightTransform.was_used), (
        "weight conversions have no was_used(): keep_used_conversions cannot tell what the files needed"
    )


def test_zero3_is_known_by_one_reference():
    config = type("Config", (), {"is_zero3": lambda self: True})()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with weightless():
            assert not deepspeed.is_deepspeed_zero3_enabled(), (
                "transformers knows of ZeRO-3 by more than _hf_deepspeed_config_weak_ref: models are initialised there"
            )
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_checkpointing_hooks_have_a_known_name():
    def hooks(model):
        return sum(len(m._forward_hooks) for m in model.model.visual.modules())

    model = tiny_model()
    model.enable_input_require_grads()
    model.model.visual.get_input_embeddings().register_forward_hook(lambda *given: None)
    before = hooks(model)
    unhook_vision(model)
    assert before - hooks(model) == 1 and hooks(model) == 1, (
        "enable_input_require_grads no longer hooks a function named make_inputs_require_grad to the vision tower"
    )


def test_dataset_fingerprints_follow_the_rows(tmp_path):
    one, other = (datasets.Dataset.from_list([{"a": n}]) for n in (1, 2))
    one.save_to_disk(str(tmp_path))
    assert fingerprint_of(one) != fingerprint_of(other), "a dataset's fingerprint no longer changes with its rows"
    loaded = [fingerprint_of(datasets.load_from_disk(str(tmp_path))) for _ in range(2)]
    assert loaded[0] == loaded[1], (
        "a dataset's fingerprint changes each time that it is loaded: no cache is found again"
    )


def test_a_stream_knows_whether_it_was_divided():
    stream = datasets.Dataset.from_list([{"a": 1}, {"a": 2}]).to_iterable_dataset()
    assert stream._distributed is None and split_dataset_by_node(stream, 0, 2)._distributed is not None, (
        "a stream's _distributed no longer tells whether split_dataset_by_node has divided it"
    )


def test_classes_and_functions_that_are_told_apart_by_private_ones():
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.modules.dropout import _DropoutNd

    assert issubclass(torch.nn.Conv3d, _ConvNd) and issubclass(torch.nn.Dropout, _DropoutNd)
    assert callable(torch._assert_async), "torch has no assertion that stays on the device"
    assert hasattr(transformers.PreTrainedModel, "_keep_in_fp32_modules_strict"), (
        "transformers no longer says which weights it keeps in fp32"
    )
    assert transformers._class_to_module["Qwen2VLProcessor"].endswith("qwen2_vl"), (
        "transformers' lazy module no longer says in which module a class is"
    )


def test_trl_keeps_and_logs_what_silkie_fills(tmp_path):
    case = Case(name="private", rows=chats(False), options={"max_steps": 1})
    trainer = build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path)
    assert trainer._train_batch_size == 2, "Trainer._train_batch_size is no longer the size of a micro-batch"
    assert trainer._total_train_tokens == 0 and set(trainer._metrics) == {"train", "eval"}, (
        "TRL no longer keeps its metrics in _metrics and its tokens in _total_train_tokens"
    )
    trainer.model.train()
    trainer._metrics["train"]["mine"] = [1.0, 3.0]
    DPOTrainer.log(trainer, logs := {})
    assert logs["mine"] == 2.0 and not trainer._metrics["train"], (
        "TRL's log no longer adds the means of _metrics and clears them"
    )
    assert trainer.aux_loss_enabled is False and trainer.router_aux_loss_coef == 0.0
    moved = trainer._prepare_inputs({"a": {"b": torch.ones(1)}, "c": [1]})
    assert moved["c"] == [1] and moved["a"]["b"].device == trainer.args.device


def test_options_of_text_form_are_parsed_by_transformers(tmp_path):
    config = SilkieDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, chat_template_kwargs='{"x": true}')
    assert config.chat_template_kwargs == {"x": True}, "transformers no longer parses the JSON of _VALID_DICT_FIELDS"
    assert "model_init_kwargs" in DPOConfig._VALID_DICT_FIELDS


def test_trl_refuses_an_adapter_on_the_head_and_silkie_gets_past_it(tmp_path):
    options = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "lm_head"])}
    case = Case(name="head", rows=chats(False))
    with pytest.raises(ValueError, match="lm_head"):
        build(DPOTrainer, DPOConfig, case, tmp_path, **options)
    build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path, **options)
    model = get_peft_model(tiny_model(), options["peft_config"])
    args = SimpleNamespace(precompute_ref_log_probs=True, model_init_kwargs=None)
    with trl_init(args, model):
        assert isinstance(model.get_output_embeddings(), torch.nn.Linear) and not args.precompute_ref_log_probs
    assert not isinstance(model.get_output_embeddings(), torch.nn.Linear) and args.precompute_ref_log_probs
    assert "get_output_embeddings" not in vars(peft.PeftModel), "peft has a method of this name: silkie would delete it"


@pytest.fixture
def calls(monkeypatch):
    """Which of the overridden methods a run calls, and with what transformers calls them."""
    seen: dict[str, inspect.BoundArguments] = {}
    for name in RUN:
        stock = getattr(SilkieDPOTrainer, name)

        def spy(self, *args, _name=name, _stock=stock, **kwargs):
            seen[_name] = inspect.signature(_stock).bind(self, *args, **kwargs)
            return _stock(self, *args, **kwargs)

        monkeypatch.setattr(SilkieDPOTrainer, name, spy)
    return seen


def test_a_run_calls_every_method_that_silkie_overrides(tmp_path, calls):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options = {**saving, "max_steps": 2, "load_best_model_at_end": True, "report_to": "none"}
    case = Case(name="run", rows=chats(False), options=options)
    # a tokenizer: TRL prepares data without images
    more = {"eval_dataset": case.dataset(), "processing_class": tiny_tokenizer()}
    make = [build(SilkieDPOTrainer, SilkieDPOConfig, case, tmp_path, **more) for _ in range(2)]
    make[0].train()
    make[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    missing = RUN - set(calls)
    assert not missing, f"transformers or TRL no longer calls {sorted(missing)}: what silkie does there is left out"
    for name in RUN - {"_prepare_dataset"}:
        assert hasattr(Trainer, name), f"Trainer has no {name}: silkie's override of it is never called by transformers"
