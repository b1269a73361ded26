"""Silent launch failures become errors; non-finite numbers name their rows."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch.distributed.fsdp import MixedPrecisionPolicy

from silkie.training import guards
from silkie.training.non_finite import FiniteWatch, NonFiniteError


def accelerator(processes=1, kind=DistributedType.NO, stage=0):
    return SimpleNamespace(
        num_processes=processes, distributed_type=kind, deepspeed_plugin=SimpleNamespace(zero_stage=stage)
    )


def test_two_processes_that_train_alone_are_stopped(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(guards.LaunchError, match="started 2 processes.*--use_cpu"):
        guards.check_launch(SimpleNamespace(world_size=1))
    guards.check_launch(SimpleNamespace(world_size=2))
    with pytest.raises(guards.LaunchError, match="accelerate reports 1"):
        guards.check_process_count(None, accelerator(1))
    guards.check_process_count(None, accelerator(2, DistributedType.MULTI_CPU))


@pytest.mark.parametrize(
    ("variable", "right"),
    [("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED), ("ACCELERATE_USE_FSDP", DistributedType.FSDP)],
)
def test_an_ignored_engine_config_is_stopped(monkeypatch, variable, right):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(guards.LaunchError, match=f"{right.value}.*ignored in silence"):
        guards.check_process_count(None, accelerator(2, DistributedType.MULTI_CPU))
    guards.check_process_count(None, accelerator(2, right))


def test_8bit_optimizers_under_fsdp_are_stopped():
    with pytest.raises(guards.LaunchError, match="adamw_8bit.*FSDP2"):
        guards.check_optimizer(SimpleNamespace(optim="adamw_8bit"), accelerator(2, DistributedType.FSDP))
    guards.check_optimizer(SimpleNamespace(optim="adamw_torch_fused"), accelerator(2, DistributedType.FSDP))
    guards.check_optimizer(SimpleNamespace(optim="adamw_8bit"), accelerator(2, DistributedType.MULTI_GPU))


def test_mixed_dtypes_under_zero3_are_stopped():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    guards.check_adapter_dtypes(model, True)  # not partitioned: ZeRO-2
    for p in model.parameters():
        p.ds_id = 0
    with pytest.raises(guards.LaunchError, match="several dtypes.*autocast_adapter_dtype=False"):
        guards.check_adapter_dtypes(model, True)
    guards.check_adapter_dtypes(model.float(), True)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_an_adapter_that_changes_the_base_has_no_reference_in_it(init):
    with pytest.raises(guards.LaunchError, match=f"{init}.*ref_model"):
        guards.check_adapter_init(LoraConfig(init_lora_weights=init))


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_an_adapter_that_starts_as_nothing_has(init):
    guards.check_adapter_init(LoraConfig(init_lora_weights=init))
    guards.check_adapter_init(None)


@pytest.mark.parametrize(
    ("where", "frozen", "needed"),
    [
        (accelerator(1), False, False),
        (accelerator(2, DistributedType.MULTI_GPU), True, False),
        (accelerator(2, DistributedType.MULTI_GPU), False, True),
        (accelerator(2, DistributedType.FSDP), True, True),
        (accelerator(2, DistributedType.DEEPSPEED, 2), True, False),
        (accelerator(2, DistributedType.DEEPSPEED, 3), True, True),
    ],
)
def test_who_needs_a_dummy_image(where, frozen, needed):
    assert guards.needs_dummy_image(where, frozen) is needed


def test_fsdp2_returns_log_probs_unrounded():
    plugin = SimpleNamespace(
        fsdp_version=2,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16),
    )
    guards.keep_fp32_outputs(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    assert plugin.mixed_precision_policy == MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    guards.keep_fp32_outputs(SimpleNamespace(state=SimpleNamespace()))  # no FSDP: nothing to do


def test_a_non_finite_loss_names_its_groups_and_those_before():
    watch = FiniteWatch()
    watch.add(torch.tensor(1.0), ["group a"])
    watch.add(torch.tensor(float("nan")), ["group b", "group c"])
    with pytest.raises(NonFiniteError, match="nan on: group b; group c.*before it: group a"):
        watch.check()
    watch.check()  # forgotten


def test_a_non_finite_gradient_names_the_groups_of_its_step():
    """Looked at long after: the losses of later steps, which it ruined, do not hide it."""
    watch = FiniteWatch()
    for step, norm in enumerate((0.5, torch.tensor(float("inf")), float("nan"))):
        watch.begin_step()
        for micro in range(2):
            watch.add(torch.tensor(1.0 if step < 2 else float("nan")), [f"group {step}.{micro}"])
        watch.end_step(norm)
        watch.add(torch.tensor(1.0), ["evaluated"])
    with pytest.raises(
        NonFiniteError, match=r"gradient norm is inf; groups of that step: group 1\.0; group 1\.1\. Training"
    ):
        watch.check()
    watch.begin_step()
    watch.add(torch.tensor(1.0), ["group a"])
    watch.end_step(2.5)
    watch.check()


def test_a_non_finite_loss_is_named_before_the_gradient_that_it_ruins():
    watch = FiniteWatch()
    watch.begin_step()
    watch.add(torch.tensor(1.0), ["group a"])
    watch.add(torch.tensor(float("inf")), ["group b"])
    watch.end_step(float("nan"))
    with pytest.raises(NonFiniteError, match="The loss is inf on: group b"):
        watch.check()


def test_a_model_that_does_not_train_is_stopped():
    layer = torch.nn.Linear(2, 2)
    guards.check_something_trains(layer)
    with pytest.raises(guards.LaunchError, match="No parameter of the model trains.*is_trainable=True"):
        guards.check_something_trains(layer.requires_grad_(False))


def test_an_adapter_of_another_name_is_stopped():
    guards.check_adapter_name(SimpleNamespace(peft_config={"default": None, "second": None}))
    with pytest.raises(guards.LaunchError, match="mine, and the one that is trained must be named 'default'"):
        guards.check_adapter_name(SimpleNamespace(peft_config={"mine": None}))
