"""Typed options of the losses, validated once. A field has TRL's name where TRL's `DPOConfig` has one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal, get_args

from .catalogue import DIFFERENCE, SPECS
from .divergence import Divergence

_REFERENCE = frozenset(name for name, spec in SPECS.items() if spec.inputs == "reference")
_PER_PAIR = _REFERENCE - {name for name, spec in SPECS.items() if spec.permutes}
_UNPAIRED = frozenset(name for name, spec in SPECS.items() if spec.inputs == "labelled")
_WEIGHED = frozenset(name for name, spec in SPECS.items() if not spec.permutes) - _UNPAIRED
OFFSET_USERS = frozenset(name for name, spec in SPECS.items() if spec.offset)


RewardShift = Literal["none", "running_mean"]
Margin = Literal["none", "offset", "weight"]


@dataclass(kw_only=True)
class LossFields:
    """Options of the losses that TRL's `DPOConfig` does not have: their only declaration, shared by `LossOptions` and
    `silkie.config.SilkieDPOConfig`, whose command line shows the help texts."""

    simpo_gamma: float = field(default=0.5, metadata={"help": "SimPO's target margin."})
    bco_reward_shift: RewardShift = field(
        default="none",
        metadata={
            "help": (
                "running_mean subtracts the mean reward of past optimizer steps in bco_pair (the paper's form); none is"
                " TRL's."
            )
        },
    )
    margin: Margin = field(
        default="none",
        metadata={
            "help": (
                "Use of a pair's rating gap. offset: its logit must exceed margin_scale * gap; weight: its weight is"
                " multiplied by 1 + margin_scale * gap."
            )
        },
    )
    margin_scale: float = field(default=1.0, metadata={"help": "Scale of the rating gap."})
    desirable_weight: float = field(default=1.0, metadata={"help": "KTO: weight of the loss of desirable responses."})
    undesirable_weight: float = field(
        default=1.0, metadata={"help": "KTO: weight of the loss of undesirable responses."}
    )
    label_threshold: float | None = field(
        default=None,
        metadata={
            "help": (
                "KTO on rated groups: a response is desirable if its mean rating is above this, undesirable if it is"
                " below. None: the labels of the data, or else its pairs."
            )
        },
    )
    mdpo_anchor: float = field(
        default=0.0, metadata={"help": "Reward that mdpo_anchor holds the chosen response above."}
    )
    ddpo_gamma: float | None = field(
        default=None,
        metadata={
            "help": "DDPO: weight of the tokens that differ between the two responses of a pair (RLHF-V: 5). None: off."
        },
    )
    ddpo_normalize: bool = field(default=True, metadata={"help": "DDPO: divide by the sum of token weights."})


@dataclass(kw_only=True)
class LossOptions(LossFields):
    """Options of all losses: TRL's here, silkie's own in `LossFields`. Each is read by some losses only
    (`option_users`).

    Attributes:
        beta: strength of the pull towards the reference; IPO's tau, ORPO's lambda, the reward scale of SimPO (2.0
            there).
        label_smoothing: probability that a label is flipped (robust: < 0.5; exo_pair: its epsilon, > 0).
        discopop_tau: temperature of discopop.
        f_divergence_type / f_alpha_divergence_coef: regulariser of the losses of a score difference.
        ld_alpha: LD-DPO's weight of the tokens beyond the shared length, in [0, 1]; None is off.
        use_weighting: WPO weights.
        aspect_weights: aspect -> weight, >= 0. Ratings are averaged with these weights; pairs that tie or contradict
            the new mean get weight 0. (A command line gives JSON text, so the config declares it with another type.)
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    aspect_weights: dict[str, float] | None = None

    @classmethod
    def from_config(cls, config: Any) -> LossOptions:
        """Read the fields by name from any object; a field that it lacks keeps its default."""
        return cls(
            **{option.name: getattr(config, option.name) for option in fields(cls) if hasattr(config, option.name)}
        )

    def changed(self) -> list[str]:
        """Names of the options whose value is not the default."""
        return [option.name for option in fields(self) if getattr(self, option.name) != option.default]

    @property
    def token_weighted(self) -> bool:
        """Whether sequence log-probs are weighted sums over tokens, different in each pair."""
        return self.ld_alpha is not None or self.ddpo_gamma is not None


def option_users(option: str) -> frozenset[str]:
    """The losses that read `option`."""
    users = {
        "f_divergence_type": DIFFERENCE,
        "f_alpha_divergence_coef": DIFFERENCE,
        "ld_alpha": _REFERENCE,
        "ddpo_gamma": _REFERENCE - {"ipo", "sigmoid_norm"},
        "ddpo_normalize": _REFERENCE - {"ipo", "sigmoid_norm"},
        "use_weighting": _PER_PAIR,
        "bco_reward_shift": frozenset({"bco_pair"}),
        "margin": _WEIGHED,
        "margin_scale": _WEIGHED,
        "aspect_weights": _WEIGHED,
        "label_threshold": _UNPAIRED,
    }
    return users.get(option) or frozenset(name for name, spec in SPECS.items() if option in spec.options.values())


def _check_selection(loss_type: Sequence[str], loss_weights: Sequence[float] | None) -> None:
    if not loss_type:
        raise ValueError("`loss_type` is empty; name at least one loss, for example ['sigmoid'].")
    for name in loss_type:
        if name not in SPECS:
            raise ValueError(f"unknown loss_type {name!r}; expected some of {', '.join(SPECS)}.")
    if len(set(loss_type)) < len(loss_type):
        raise ValueError(f"`loss_type` names a loss twice: {list(loss_type)}. Name it once and add up its weights.")
    if loss_weights is None:
        return
    if len(loss_weights) != len(loss_type):
        raise ValueError(
            f"`loss_weights` has {len(loss_weights)} values for {len(loss_type)} losses; give one weight per"
            " `loss_type`."
        )
    if not all(_is_number(weight) and math.isfinite(weight) for weight in loss_weights):
        raise ValueError(f"`loss_weights` must be finite numbers, got {list(loss_weights)}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_types(options: LossOptions) -> None:
    """A string where a number or a bool belongs (YAML reads `1e-3` as one) is named, before a comparison trips over
    it."""
    for option in fields(options):
        value, kind = getattr(options, option.name), str(option.type)
        if value is None and kind.endswith("None"):
            continue
        if kind.startswith("float") and not _is_number(value):
            raise ValueError(
                f"`{option.name}` must be a number, got {value!r}. (In YAML write 1.0e-3: it reads 1e-3 as text.)"
            )
        if kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"`{option.name}` must be true or false, got {value!r}.")
    weights = options.aspect_weights
    if weights is not None and not (
        isinstance(weights, dict) and all(_is_number(weight) for weight in weights.values())
    ):
        raise ValueError(
            f"`aspect_weights` must map aspects to numbers, for example {{'Helpfulness': 1.0}}, got {weights!r}."
        )


def _check_values(options: LossOptions, loss_type: Sequence[str]) -> None:
    """Ranges, for every option whatever the losses."""
    _check_types(options)
    numbers = {option.name: getattr(options, option.name) for option in fields(options)}
    numbers |= {f"aspect_weights[{aspect!r}]": weight for aspect, weight in (options.aspect_weights or {}).items()}
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")
    ranges = {
        "beta": (options.beta > 0, "> 0"),
        "label_smoothing": (0 <= options.label_smoothing < 1, "in [0, 1)"),
        "discopop_tau": (options.discopop_tau > 0, "> 0"),
        "f_divergence_type": _one_of(options.f_divergence_type, Divergence),
        "ld_alpha": (options.ld_alpha is None or 0 <= options.ld_alpha <= 1, "in [0, 1], or None"),
        "ddpo_gamma": (options.ddpo_gamma is None or options.ddpo_gamma > 0, "> 0, or None"),
        "bco_reward_shift": _one_of(options.bco_reward_shift, RewardShift),
        "margin": _one_of(options.margin, Margin),
        "margin_scale": (options.margin_scale >= 0, ">= 0"),
        "desirable_weight": (options.desirable_weight >= 0, ">= 0"),
        "undesirable_weight": (options.undesirable_weight >= 0, ">= 0"),
        "aspect_weights": (
            options.aspect_weights is None
            or (
                all(weight >= 0 for weight in options.aspect_weights.values())
                and sum(options.aspect_weights.values()) > 0
            ),
            "weights >= 0, at least one of them > 0, or None",
        ),
    }
    for name, (valid, expected) in ranges.items():
        if not valid:
            raise ValueError(f"`{name}` must be {expected}, got {getattr(options, name)!r}.")
    if "robust" in loss_type and options.label_smoothing >= 0.5:
        raise ValueError(f"`label_smoothing` must be in [0, 0.5) for 'robust', got {options.label_smoothing}.")
    if "exo_pair" in loss_type and options.label_smoothing == 0:
        raise ValueError("`label_smoothing` must be > 0 for 'exo_pair'; its paper uses 1e-3.")


def _one_of(value: str, choices: Any) -> tuple[bool, str]:
    """Whether `value` is one of a Literal's, and the words that say so."""
    allowed = get_args(choices)
    return value in allowed, f"one of {', '.join(map(repr, allowed))}"


def _check_use(options: LossOptions, loss_type: Sequence[str]) -> None:
    """Every option that was set is read by a selected loss, and by all of them where a mixture would be ill-defined."""
    selected = set(loss_type)
    if selected & _UNPAIRED and selected - _UNPAIRED:
        raise ValueError(
            f"{', '.join(sorted(selected & _UNPAIRED))} reads labelled responses and"
            f" {', '.join(sorted(selected - _UNPAIRED))} pairs: they cannot be mixed."
        )
    for name in options.changed():
        users = option_users(name)
        if not selected & users:
            raise ValueError(
                f"`{name}={getattr(options, name)!r}` is used by none of the selected losses {list(loss_type)}. "
                f"Losses that use it: {', '.join(sorted(users))}. Remove the option or select one of them."
            )
    _check_joint(options, selected, "f_divergence_type", DIFFERENCE | {"sft"})
    _check_joint(options, selected, "use_weighting", _PER_PAIR | {"sft"})
    _check_joint(options, selected, "ld_alpha", _REFERENCE | {"sft", "mdpo_image", "mdpo_anchor"})
    _check_joint(options, selected, "ddpo_gamma", option_users("ddpo_gamma") | {"sft", "mdpo_image", "mdpo_anchor"})
    _check_joint(options, selected, "margin", option_users("margin"))
    _check_joint(options, selected, "aspect_weights", option_users("aspect_weights"))
    if options.margin == "offset":
        _check_joint(options, selected, "margin", OFFSET_USERS | {"sft", "mdpo_image", "mdpo_anchor"})
        if not selected & OFFSET_USERS:
            raise ValueError(
                f"`margin='offset'` is used by none of {list(loss_type)}; losses that use it:"
                f" {', '.join(sorted(OFFSET_USERS))}."
            )
    if "f_alpha_divergence_coef" in options.changed() and options.f_divergence_type != "alpha_divergence":
        raise ValueError(
            "`f_alpha_divergence_coef` is used with `f_divergence_type='alpha_divergence'` only, "
            f"and that is {options.f_divergence_type!r}."
        )
    if "margin_scale" in options.changed() and options.margin == "none":
        raise ValueError(
            "`margin_scale` is used with `margin='offset'` or `margin='weight'` only, and `margin` is 'none'."
        )
    if "ddpo_normalize" in options.changed() and options.ddpo_gamma is None:
        raise ValueError("`ddpo_normalize` is used with `ddpo_gamma` only, and that is None.")
    if options.ld_alpha is not None and options.ddpo_gamma is not None:
        raise ValueError("`ld_alpha` and `ddpo_gamma` both weigh the tokens of a response; set one of them.")


def _check_joint(options: LossOptions, selected: set[str], name: str, allowed: frozenset[str]) -> None:
    others = selected - allowed
    if name in options.changed() and others:
        raise ValueError(
            f"`{name}={getattr(options, name)!r}` cannot be combined with {', '.join(sorted(others))}: it has no"
            f" meaning there. It can be used with: {', '.join(sorted(allowed))}."
        )


def validate(loss_type: Sequence[str], loss_weights: Sequence[float] | None, options: LossOptions) -> None:
    """Check a selection of losses and its options.

    Raises:
        ValueError: an unknown or repeated loss, weights that do not match, a value out of range, or an option that no
            selected loss reads.
    """
    _check_selection(loss_type, loss_weights)
    _check_values(options, loss_type)
    _check_use(options, loss_type)
