"""Options are validated once, where they are set."""

import pytest

from silkie import SilkieDPOConfig


def config(**kwargs):
    return SilkieDPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **kwargs)


def test_defaults_never_cut_a_prompt():
    assert config().max_length is None
    assert config().layout == "auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "pack"}, "layout"),
        ({"logprob_impl": "cuda"}, "logprob_impl"),
        ({"max_tokens_per_batch": 0}, "positive"),
        ({"layout": "rows", "attention_backend": "flex"}, "layout='packed'"),
        ({"layout": "rows", "attention_backend": "eager"}, "model's own attention"),
        ({"chat_template_kwargs": "enable_thinking=False"}, "JSON text"),
        ({"loss_type": ["sigmod"]}, "sigmod"),
        ({"simpo_gamma": 1.0}, "simpo_gamma"),  # sigmoid does not read it
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "sync_ref_model"),
        ({"sync_ref_model": True, "loss_type": ["orpo"]}, "read none"),
        ({"self_test_tolerance": float("nan")}, "self_test_tolerance"),
        ({"dataloader_drop_last": True, "max_tokens_per_batch": 64}, "nothing to drop"),
        ({"train_sampling_strategy": "group_by_length"}, "max_tokens_per_batch"),
        ({"torch_compile": True}, "torch_compile"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing` is DPO's"),
        ({"beta": float("inf")}, "beta"),
    ],
)
def test_what_cannot_work_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_batches_are_split_over_several_processes_only(monkeypatch):
    options = {"output_dir": "out", "use_cpu": True, "bf16": False, "accelerator_config": {"split_batches": True}}
    assert not SilkieDPOConfig(**options).accelerator_config.split_batches
    monkeypatch.setattr(SilkieDPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="divide per_device_train_batch_size by the number of processes"):
        SilkieDPOConfig(**options)


def test_neftune_runs_rows_and_says_so(caplog):
    options = {"output_dir": "out", "use_cpu": True, "bf16": False, "neftune_noise_alpha": 5.0}
    assert SilkieDPOConfig(**options).layout == "rows" and "one row per response" in caplog.text
    with pytest.raises(ValueError, match="set layout='rows'"):
        SilkieDPOConfig(**options, layout="packed")


def test_loss_options_come_from_the_config():
    assert config(beta=0.3, loss_type=["simpo"], simpo_gamma=1.5).loss_options.simpo_gamma == 1.5


def test_variables_of_the_chat_template_come_as_a_dict_or_as_json():
    for given in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        assert config(chat_template_kwargs=given).template_variables == {"enable_thinking": False}
    assert config().template_variables == {}


def test_split_batches_is_refused_where_several_processes_would_split(monkeypatch):
    assert config(accelerator_config={"split_batches": True}).accelerator_config.split_batches is False
    monkeypatch.setattr(SilkieDPOConfig, "world_size", 2)
    with pytest.raises(ValueError, match="divide per_device_train_batch_size"):
        config(accelerator_config={"split_batches": True})
