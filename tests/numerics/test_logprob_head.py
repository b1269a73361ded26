"""`head_operands` against the head module's own output: values and gradients of everything that trains, for every
wrapper peft makes."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed.tensor
from peft import LoraConfig, get_peft_model
from torch import nn

from silkie.logprob import head_operands, head_options, linear_logprob


class Tiny(nn.Module):
    """A body and an output head; only the head matters."""

    def __init__(self, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.body = nn.Linear(12, 12, dtype=dtype)
        self.head = nn.Linear(12, 40, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.head(self.body(x))


def wrapped(bias=True, dtype=torch.float64, **lora):
    torch.manual_seed(0)
    model = get_peft_model(Tiny(bias, dtype), LoraConfig(**{"r": 3, "lora_alpha": 12, **lora}))
    head = model.base_model.model.head
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model, head


def hidden_and_target(dtype=torch.float64):
    gen = torch.Generator().manual_seed(1)
    return torch.randn(9, 12, generator=gen, dtype=torch.float64).to(dtype).requires_grad_(), torch.randint(
        0, 40, (9,), generator=gen
    )


def assert_same_as_module(head, impl="tiled"):
    """Log-probs and all gradients equal those through the module's own forward."""
    hidden, target = hidden_and_target()
    rows = torch.linspace(-1, 2, 9, dtype=torch.float64)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    truth = head(hidden).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    expected = torch.autograd.grad((rows * truth).sum(), leaves)
    states, weight, bias = head_operands(head, hidden)
    found = linear_logprob(states, weight, target, bias, impl=impl)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)
    # A leaf that lost its gradient fails here: autograd.grad raises for an unused input.
    for ours, true in zip(torch.autograd.grad((rows * found).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-12)
    return len(leaves)


@pytest.mark.parametrize("bias", [False, True])
def test_plain_linear(bias):
    assert assert_same_as_module(Tiny(bias, torch.float64).head) == 2 + bias


@pytest.mark.parametrize("bias", [False, True])
def test_lora_head_trains_its_adapter(bias):
    _, head = wrapped(bias, target_modules=["head"])
    assert assert_same_as_module(head) == 3  # hidden, A, B; the base stays frozen


def test_lora_bias_and_two_adapters():
    model, head = wrapped(target_modules=["head"], lora_bias=True)
    assert assert_same_as_module(head) == 4
    model.add_adapter("second", LoraConfig(r=2, target_modules=["head"], lora_bias=True))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        head.lora_B["second"].weight.normal_()
    assert assert_same_as_module(head) == 7


def test_disabled_and_merged_adapters_leave_the_base():
    model, head = wrapped(target_modules=["head"])
    hidden, _ = hidden_and_target()
    with model.disable_adapter():
        states, weight, _ = head_operands(head, hidden)
        assert states is hidden and weight is head.base_layer.weight
    model.merge_adapter()
    states, weight, bias = head_operands(head, hidden)
    assert states is hidden and weight is head.base_layer.weight
    torch.testing.assert_close(torch.nn.functional.linear(states, weight, bias), head(hidden))
    with model.disable_adapter(), pytest.raises(ValueError, match="still merged"):
        head_operands(head, hidden)


def test_modules_to_save():
    model, head = wrapped(target_modules=["body"], modules_to_save=["head"])
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)
    assert assert_same_as_module(head) == 3
    hidden, _ = hidden_and_target()
    assert head_operands(head, hidden).weight is head.modules_to_save["default"].weight
    with model.disable_adapter():
        assert head_operands(head, hidden).weight is head.original_module.weight


def test_dropout_draws_as_the_module_does():
    _, head = wrapped(target_modules=["head"], lora_dropout=0.5)
    hidden, target = hidden_and_target()
    torch.manual_seed(7)
    expected = head(hidden).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    torch.manual_seed(7)
    states, weight, bias = head_operands(head, hidden)
    torch.testing.assert_close(linear_logprob(states, weight, target, bias), expected, rtol=1e-11, atol=1e-12)


def test_a_young_adapter_survives_bf16():
    """Updates far below the spacing of a bf16 weight: adding B @ A to W would round them away."""
    _, head = wrapped(dtype=torch.bfloat16, target_modules=["head"])
    hidden, target = hidden_and_target(torch.bfloat16)
    with torch.no_grad():
        head.lora_B["default"].weight.mul_(1e-4)
    states, weight, bias = head_operands(head, hidden)
    base = head.get_base_layer()

    def ratio(kind) -> torch.Tensor:
        a = linear_logprob(states.to(kind), weight.to(kind), target, bias.to(kind), impl="reference")
        b = linear_logprob(hidden.to(kind), base.weight.to(kind), target, base.bias.to(kind), impl="reference")
        return (a - b).double()

    down, up = head.lora_A["default"].weight.double(), head.lora_B["default"].weight.double()
    merged = base.weight.double() + head.scaling["default"] * up @ down
    exact = linear_logprob(hidden.double(), merged, target, base.bias.double(), impl="reference")
    exact = exact - linear_logprob(hidden.double(), base.weight.double(), target, base.bias.double(), impl="reference")
    torch.testing.assert_close(ratio(torch.float64), exact, rtol=0.02, atol=exact.abs().max().item() * 0.01)


def test_a_sharded_parameter_is_gathered_and_keeps_its_gradient():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        head = nn.Linear(12, 40, dtype=torch.float64)
        plain = head.weight.detach().clone()
        head.weight = nn.Parameter(
            torch.distributed.tensor.distribute_tensor(plain, mesh, [torch.distributed.tensor.Shard(0)])
        )
        hidden, target = hidden_and_target()
        states, weight, bias = head_operands(head, hidden)
        assert type(weight) is torch.Tensor and torch.equal(weight, plain)
        linear_logprob(states, weight, target, bias).sum().backward()
        leaf = plain.requires_grad_()
        linear_logprob(hidden, leaf, target, head.bias, impl="reference").sum().backward()
        torch.testing.assert_close(head.weight.grad.full_tensor(), leaf.grad, rtol=1e-11, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


def test_what_it_refuses():
    hidden, _ = hidden_and_target()
    _, head = wrapped(target_modules=["head"], use_dora=True)
    with pytest.raises(ValueError, match="LoRA variant"):
        head_operands(head, hidden)
    with pytest.raises(ValueError, match="has no weight"):
        head_operands(nn.Identity(), hidden)
    quantised = nn.Linear(12, 40)
    quantised.weight = nn.Parameter(torch.zeros(40, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        head_operands(quantised, hidden)
    sharded = nn.Linear(12, 40)
    sharded.weight.ds_id, sharded.weight.ds_status = 1, SimpleNamespace(name="NOT_AVAILABLE")
    with pytest.raises(ValueError, match="partitioned by ZeRO-3"):
        head_operands(sharded, hidden)
    sharded.weight.ds_status = SimpleNamespace(name="AVAILABLE")
    assert head_operands(sharded, hidden).weight is sharded.weight


def test_options_of_a_config():
    config = SimpleNamespace
    assert head_options(config()) == (None, 1.0)
    assert head_options(config(final_logit_softcapping=30.0)) == (30.0, 1.0)
    assert head_options(config(logit_scale=0.0625)) == (None, 0.0625)
    assert head_options(config(logits_scaling=8.0, model_type="granite")) == (None, 0.125)
    assert head_options(config(logits_scaling=8.0, model_type="hyperclovax")) == (None, 8.0)
    nested = config(
        logit_scale=9.0, get_text_config=lambda: config(final_logit_softcapping=20.0, lm_head_multiplier=0.5)
    )
    assert head_options(nested) == (20.0, 0.5)
