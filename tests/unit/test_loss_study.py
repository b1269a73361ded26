"""The study of the losses: it leaves none out, its table says what was measured, and a stopped run goes on."""

import pytest

from silkie.demo.results import Sizes
from silkie.losses import SPECS
from tests.support.studies import load_study

loss_study = load_study("losses")
COLUMNS, VARIANTS = loss_study.COLUMNS, loss_study.VARIANTS
markdown, merge, plot, run_study = loss_study.markdown, loss_study.merge, loss_study.plot, loss_study.run_study

TINY = Sizes(images=3, card_images=3, questions=1, mme_images=1, pope_images=1, captions=2, red_team_images=4)
MODES = {mode for mode, _ in COLUMNS}


def scores(value):
    return {mode: {key: [value, 0.0, 1.0] for _, key in COLUMNS} for mode in MODES}


def result():
    runs = {
        "sigmoid": {
            "0": {"scores": scores(0.5), "step_seconds": 2.0},
            "1": {"scores": scores(0.7), "step_seconds": 4.0},
        },
        "ipo": {"0": {"scores": scores(0.2), "step_seconds": 1.0}, "1": {"scores": scores(0.2), "step_seconds": 8.0}},
    }
    return {"seeds": [0, 1], "base": scores(0.1), "scores": runs}


def test_no_loss_is_left_out():
    used = {name for recipe in VARIANTS.values() for name in recipe.losses}
    assert used == set(SPECS)


def test_the_table_holds_mean_range_and_the_cost_relative_to_sigmoid_seed_by_seed():
    table = merge(result())
    assert table["sigmoid"]["exact, T=1 ↑"] == pytest.approx((0.6, 0.5, 0.7))
    assert table["ipo"]["cost"] == pytest.approx((1.25, 0.5, 2.0)) and "cost" not in table["base"]
    later = result()
    later["scores"]["ipo"]["1"]["sigmoid_step_seconds"] = 16.0
    assert merge(later)["ipo"]["cost"] == pytest.approx((0.5, 0.5, 0.5))
    lines = markdown(result()).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| sigmoid", "| ipo"]
    assert "1.25 <sub>0.50–2.00</sub>" in lines[-1] and "0.20 |" in lines[-1]


def test_the_plot_is_drawn(tmp_path):
    plot(result(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_an_unknown_loss_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown losses sigmoidal; expected some of sigmoid, "):
        run_study(tmp_path, (0,), ["sigmoidal"])


@pytest.mark.slow
def test_a_stopped_study_goes_on_without_doing_anything_twice(tmp_path, monkeypatch):
    first = run_study(tmp_path, (0,), ["sigmoid", "simpo, beta 2"], sizes=TINY)
    (tmp_path / "seed0" / "sigmoid.json").unlink()
    monkeypatch.setattr(loss_study, "_sample", lambda *_: pytest.fail("sampled again"))
    trained, train = [], loss_study._train
    monkeypatch.setattr(loss_study, "_train", lambda recipe, *rest: trained.append(recipe.name) or train(recipe, *rest))
    again = run_study(tmp_path, (0,), ["sigmoid", "simpo, beta 2"], sizes=TINY)
    assert trained == ["sigmoid"]
    assert again["scores"]["sigmoid"]["0"]["scores"] == first["scores"]["sigmoid"]["0"]["scores"]
    assert again["scores"]["simpo, beta 2"] == first["scores"]["simpo, beta 2"]
