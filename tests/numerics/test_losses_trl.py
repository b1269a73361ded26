"""Values and gradients equal those of the installed TRL, whose own loss code runs here on a model that returns given
log-probs."""

import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from silkie.losses import LOSSES, GroupLogps, LossOptions, build_objective

TRL_LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
SMOOTHED = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.2, "aot_unpaired": 0.2}
PROMPT = 3


class GivenLogProbs(torch.nn.Module):
    """Stands for a language model: returns what TRL's fused head would, from a table."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs, log_sum_sq_probs):
        super().__init__()
        self.log_probs = torch.nn.Parameter(log_probs.clone())
        self.log_sum_sq_probs = log_sum_sq_probs

    def forward(self, labels, **_):
        scored = labels[:, 1:] != -100
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(
            log_probs=self.log_probs * scored,
            log_sum_sq_probs=self.log_sum_sq_probs,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


class Case:
    """B pairs as TRL lays them out (rows: chosen, then rejected; [2B, T]) and as one batch of silkie's (R = 2B)."""

    def __init__(self, pairs=5, length=9, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rows = 2 * pairs
        self.pairs = pairs
        self.lengths = torch.randint(1, length + 1, (rows,), generator=generator)
        width = PROMPT + length
        position = torch.arange(width)
        self.mask = ((position >= PROMPT) & (position < PROMPT + self.lengths[:, None])).long()
        self.policy, self.reference = (
            GivenLogProbs(
                -3 * torch.rand(rows, width - 1, generator=generator, dtype=dtype),
                -torch.rand(rows, width - 1, generator=generator, dtype=dtype),
            )
            for _ in range(2)
        )
        self.inputs = {
            "input_ids": torch.ones(rows, width).long(),
            "attention_mask": torch.ones(rows, width).long(),
            "completion_mask": self.mask,
        }

    def trl(self, names, weights, options: LossOptions):
        accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
        trainer = SimpleNamespace(
            model=self.policy,
            ref_model=self.reference,
            accelerator=accelerator,
            aux_loss_enabled=False,
            precompute_ref_logps=False,
            ld_alpha=options.ld_alpha,
            f_divergence_type=options.f_divergence_type,
            f_alpha_divergence_coef=options.f_alpha_divergence_coef,
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            use_weighting=options.use_weighting,
            loss_types=names,
            loss_weights=weights or [1.0] * len(names),
            args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=options.discopop_tau),
            _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )
        self.policy.zero_grad()
        loss = DPOTrainer._compute_loss(trainer, self.policy, self.inputs, False)
        loss.backward()
        self.trl_metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return loss.detach(), self.policy.log_probs.grad.clone()

    def batch(self):
        scored = self.mask[:, 1:].bool()
        owner = torch.arange(2 * self.pairs)[:, None].expand_as(scored)[scored]
        policy, reference = self.policy.log_probs[scored], self.reference.log_probs[scored].detach()

        def total(values):
            return values.new_zeros(2 * self.pairs).index_add(0, owner, values)

        return GroupLogps(
            logps=total(policy),
            ref_logps=total(reference),
            lengths=self.lengths,
            owner=owner,
            pairs=torch.stack([torch.arange(self.pairs), torch.arange(self.pairs) + self.pairs], dim=1),
            per_token_logps=policy,
            ref_per_token_logps=reference,
            log_sum_sq_probs=self.policy.log_sum_sq_probs[scored],
        )

    def silkie(self, names, weights, options):
        self.policy.zero_grad()
        loss, metrics = build_objective(names, weights, options)(self.batch())
        loss.backward()
        self.metrics = metrics
        return loss.detach(), self.policy.log_probs.grad.clone()


def assert_equal(case, names, weights, options):
    expected, expected_grad = case.trl(names, weights, options)
    loss, grad = case.silkie(names, weights, options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert expected_grad.abs().max() > 0


@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_each_loss(name, beta):
    options = LossOptions(beta=0.1 if name == "sft" else beta, label_smoothing=SMOOTHED.get(name, 0.0))
    assert_equal(Case(), [name], None, options)


def test_discopop_temperature():
    assert_equal(Case(), ["discopop"], None, LossOptions(discopop_tau=0.5))


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"])
def test_f_divergences(name, divergence):
    # TRL knows clamps for half and single precision only, so this is the one comparison in float32.
    options = LossOptions(f_divergence_type=divergence, label_smoothing=SMOOTHED.get(name, 0.0))
    assert_equal(Case(dtype=torch.float32), [name], None, options)


@pytest.mark.parametrize("coefficient", [0.3, 1.0, 1.0 + 1e-8, 2.0])
def test_alpha_divergence_coefficient(coefficient):
    options = LossOptions(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coefficient)
    assert_equal(Case(dtype=torch.float32), ["sigmoid"], None, options)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "bco_pair", "aot"])
def test_ld_dpo(name, alpha):
    assert_equal(Case(), [name], None, LossOptions(ld_alpha=alpha))


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair", "apo_zero", "sigmoid_norm"])
def test_wpo_weights(name):
    assert_equal(Case(), [name], None, LossOptions(use_weighting=True))


def test_mpo():
    assert_equal(Case(), ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], LossOptions())


def test_ld_dpo_leaves_the_sft_term_alone():
    assert_equal(Case(), ["sigmoid", "sft"], [1.0, 0.5], LossOptions(ld_alpha=0.3))


def test_metrics():
    case = Case()
    case.trl(["sigmoid"], None, LossOptions())
    case.silkie(["sigmoid"], None, LossOptions())
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert case.metrics[name].mean().item() == pytest.approx(case.trl_metrics[name]), name


def cpo_losses(loss_type, chosen, rejected, **fields):
    trainer = SimpleNamespace(
        loss_type=loss_type, alpha=0.0, accelerator=SimpleNamespace(device=torch.device("cpu")), **fields
    )
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


@pytest.fixture
def responses():
    generator = torch.Generator().manual_seed(1)
    logps = -30 * torch.rand(2, 7, generator=generator, dtype=torch.float64)
    return logps[0], logps[1], *torch.randint(1, 20, (2, 7), generator=generator)


def test_simpo_and_cpo(responses):
    chosen, rejected, chosen_lengths, rejected_lengths = responses
    for smoothing in (0.0, 0.1):
        simpo = cpo_losses(
            "simpo",
            chosen / chosen_lengths,
            rejected / rejected_lengths,
            beta=2.0,
            simpo_gamma=0.7,
            label_smoothing=smoothing,
        )
        ours = LOSSES["simpo"](*responses, beta=2.0, gamma=0.7, label_smoothing=smoothing)
        torch.testing.assert_close(ours, simpo)
        cpo = cpo_losses("sigmoid", chosen, rejected, beta=0.2, label_smoothing=smoothing)
        torch.testing.assert_close(LOSSES["cpo"](*responses, beta=0.2, label_smoothing=smoothing), cpo)
        # Conservative DPO is what CPO's smoothing is, with a reference: TRL's DPO trainer ignores the option.
        zeros = torch.zeros_like(chosen)
        torch.testing.assert_close(
            LOSSES["sigmoid"](chosen, rejected, zeros, zeros, beta=0.2, label_smoothing=smoothing), cpo
        )


def test_orpo(responses):
    chosen, rejected, chosen_lengths, rejected_lengths = responses
    trainer = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=torch.device("cpu")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = -ORPOTrainer.odds_ratio_loss(trainer, chosen / chosen_lengths, rejected / rejected_lengths)[0]
    # TRL rounds to float32.
    torch.testing.assert_close(LOSSES["orpo"](*responses, beta=0.3).float(), expected)
