"""Options: TRL's names and defaults, ranges, and an error for an option that no selected loss reads."""

import dataclasses
from types import SimpleNamespace

import pytest
from trl import DPOConfig, KTOConfig

from silkie.config import SilkieDPOConfig
from silkie.losses import LOSSES, SPECS, LossOptions, build_objective, option_users, validate
from silkie.losses.spec import DECLARED

CHANGED = {
    "beta": 0.5,
    "label_smoothing": 0.1,
    "discopop_tau": 0.1,
    "f_divergence_type": "forward_kl",
    "f_alpha_divergence_coef": 0.7,
    "ld_alpha": 0.5,
    "use_weighting": True,
    "simpo_gamma": 1.0,
    "bco_reward_shift": "running_mean",
    "margin": "weight",
    "margin_scale": 2.0,
    "mdpo_anchor": 0.5,
    "desirable_weight": 2.0,
    "undesirable_weight": 0.5,
    "label_threshold": 3.0,
    "ddpo_gamma": 5.0,
    "ddpo_normalize": False,
    "aspect_weights": {"Helpfulness": 1.0},
}
SWITCH = {  # the option that makes another one count
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "margin_scale": {"margin": "weight"},
    "ddpo_normalize": {"ddpo_gamma": 5.0},
}


def smoothing(name):
    return {"label_smoothing": 1e-3} if name == "exo_pair" else {}


def test_every_option_is_tried_below():
    assert set(CHANGED) == {field.name for field in dataclasses.fields(LossOptions)}


def test_names_and_defaults_are_those_of_trl():
    theirs = {field.name: field.default for field in dataclasses.fields(DPOConfig)}
    shared = [field for field in dataclasses.fields(LossOptions) if field.name in theirs]
    assert {field.name for field in shared} == {
        "beta",
        "label_smoothing",
        "discopop_tau",
        "f_divergence_type",
        "f_alpha_divergence_coef",
        "ld_alpha",
        "use_weighting",
    }
    assert all(field.default == theirs[field.name] for field in shared)
    for name in ("desirable_weight", "undesirable_weight"):
        assert getattr(LossOptions(), name) == KTOConfig.__dataclass_fields__[name].default


@pytest.mark.parametrize("option", CHANGED)
@pytest.mark.parametrize("name", LOSSES)
def test_an_option_is_read_or_refused(name, option):
    """For every loss and option: accepted where the loss reads it, else an error that names the option and the losses
    that do."""
    options = LossOptions(**(smoothing(name) | {option: CHANGED[option]} | SWITCH.get(option, {})))
    if name in option_users(option):
        validate([name], None, options)
        return
    with pytest.raises(ValueError, match="is used by none of the selected losses") as error:
        validate([name], None, options)
    first = str(error.value).split("`")[1].split("=")[0]
    assert first in (option, *SWITCH.get(option, {}))
    assert all(user in str(error.value) for user in option_users(first))


def test_every_option_has_a_user():
    assert all(option_users(option) <= set(LOSSES) and option_users(option) for option in CHANGED)


@pytest.mark.parametrize("option", SWITCH)
def test_an_option_without_its_switch(option):
    name = "sigmoid"
    with pytest.raises(ValueError, match=f"`{option}` is used with"):
        validate([name], None, LossOptions(**{option: CHANGED[option]}))


def test_one_reader_among_the_selected_is_enough():
    validate(["sigmoid", "sft"], None, LossOptions(beta=0.5, label_smoothing=0.1))
    with pytest.raises(ValueError, match=r"`beta=0.5` is used by none of the selected losses \['sft'\]"):
        validate(["sft"], None, LossOptions(beta=0.5))


@pytest.mark.parametrize(
    ("names", "options", "other"),
    [
        (["sigmoid", "nca_pair"], {"f_divergence_type": "js_divergence"}, "nca_pair"),
        (["sigmoid", "aot"], {"use_weighting": True}, "aot"),
        (["sigmoid", "ipo"], {"ddpo_gamma": 5.0}, "ipo"),
        (["sigmoid", "simpo"], {"ld_alpha": 0.5}, "simpo"),
        (["sigmoid", "ipo"], {"margin": "offset"}, "ipo"),
        (["sigmoid", "aot"], {"margin": "weight"}, "aot"),
        (["sigmoid", "aot"], {"aspect_weights": {"Helpfulness": 1.0}}, "aot"),
    ],
)
def test_mixtures_in_which_an_option_has_no_meaning(names, options, other):
    with pytest.raises(ValueError, match=f"cannot be combined with {other}"):
        validate(names, None, LossOptions(**options))


def test_losses_of_labels_and_of_pairs_do_not_mix():
    validate(["kto", "apo_zero_unpaired"], None, LossOptions())
    with pytest.raises(ValueError, match="kto reads labelled responses and sigmoid pairs"):
        validate(["sigmoid", "kto"], None, LossOptions())


def test_offset_needs_a_loss_with_a_logit():
    with pytest.raises(ValueError, match=r"`margin='offset'` is used by none of \['mdpo_anchor'\]"):
        validate(["mdpo_anchor"], None, LossOptions(margin="offset"))


def test_two_token_weights():
    with pytest.raises(ValueError, match="both weigh the tokens"):
        validate(["sigmoid"], None, LossOptions(ld_alpha=0.5, ddpo_gamma=5.0))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta", 0.0),
        ("beta", float("nan")),
        ("beta", float("inf")),
        ("mdpo_anchor", float("inf")),
        ("simpo_gamma", float("nan")),
        ("label_smoothing", -0.1),
        ("label_smoothing", 1.0),
        ("discopop_tau", 0.0),
        ("f_divergence_type", "kl"),
        ("ld_alpha", 1.5),
        ("ddpo_gamma", 0.0),
        ("bco_reward_shift", "mean"),
        ("margin", "add"),
        ("margin_scale", -1.0),
        ("aspect_weights", {}),
        ("aspect_weights", {"Helpfulness": -1.0, "Ethical Considerations": 2.0}),
    ],
)
def test_values_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        validate(["sigmoid"], None, LossOptions(**{option: value}))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("beta", None),
        ("beta", True),
        ("label_smoothing", "1e-3"),
        ("ddpo_gamma", "5"),
        ("use_weighting", "yes"),
        ("ddpo_normalize", None),
        ("aspect_weights", ["Helpfulness"]),
        ("aspect_weights", {"Helpfulness": "2"}),
    ],
)
def test_values_of_another_type(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must .*, got .*{value if isinstance(value, str) else ''}"):
        validate(["sigmoid"], None, LossOptions(**{option: value}))


def test_an_aspect_weight_that_is_no_number():
    with pytest.raises(ValueError, match=r"aspect_weights\['Helpfulness'\]` must be a finite number"):
        validate(["sigmoid"], None, LossOptions(aspect_weights={"Helpfulness": float("nan")}))


def test_smoothing_of_robust_and_exo():
    with pytest.raises(ValueError, match=r"in \[0, 0.5\) for 'robust', got 0.5"):
        validate(["robust"], None, LossOptions(label_smoothing=0.5))
    with pytest.raises(ValueError, match="must be > 0 for 'exo_pair'"):
        validate(["exo_pair"], None, LossOptions())


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], None, "`loss_type` is empty"),
        (["dpo"], None, "unknown loss_type 'dpo'; expected some of sigmoid"),
        (["sigmoid", "sigmoid"], None, "names a loss twice"),
        (["sigmoid"], [0.5, 0.5], "2 values for 1 losses"),
        (["sigmoid"], [float("inf")], "must be finite"),
        (["sigmoid"], ["0.8"], "must be finite numbers"),
    ],
)
def test_selection(names, weights, message):
    with pytest.raises(ValueError, match=message):
        build_objective(names, weights)


def test_from_config_reads_by_name():
    config = SimpleNamespace(beta=0.3, ld_alpha=0.2, ddpo_gamma=None, learning_rate=1.0)
    assert LossOptions.from_config(config) == LossOptions(beta=0.3, ld_alpha=0.2)


def test_from_config_of_trl():
    assert LossOptions.from_config(
        DPOConfig(output_dir="unused", beta=0.4, use_weighting=True, report_to=[], bf16=False)
    ) == LossOptions(beta=0.4, use_weighting=True)


def test_changed():
    assert LossOptions().changed() == []
    assert sorted(LossOptions(**CHANGED).changed()) == sorted(CHANGED)


def test_registry_options_exist():
    fields = {field.name for field in dataclasses.fields(LossOptions)}
    assert all(set(spec.options.values()) <= fields for spec in SPECS.values())


def test_every_declared_loss_is_in_the_table():
    """A module that declares losses must be named in `registry._MODULES`."""
    assert set(SPECS) == set(DECLARED)


def test_the_config_declares_no_loss_option_again():
    """Its own fields hold only aspect_weights, whose type differs on a command line."""
    own = {
        name for name in SilkieDPOConfig.__annotations__ if name in {f.name for f in dataclasses.fields(LossOptions)}
    }
    assert own == {"aspect_weights"}
