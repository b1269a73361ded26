"""Every loss through the trainer: packed equals rows, with a live and with a precomputed reference, however the step is
split."""

import pytest

from silkie.losses.catalogue import SPECS
from tests.integration.test_trainer import losses, make
from tests.support.data import ASPECTS, dataset, mixed_groups

OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.1},
    "simpo": {"beta": 2.0},
    "orpo": {"beta": 0.1},
}
COMBINATIONS = {
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mdpo": {"loss_type": ["sigmoid", "mdpo_image", "mdpo_anchor"], "corruption": "noise"},
    "ld_dpo": {"ld_alpha": 0.5},
    "ddpo": {"ddpo_gamma": 5.0},
    "wpo": {"use_weighting": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "margin_offset": {"margin": "offset", "margin_scale": 0.5},
    "margin_weight": {"margin": "weight"},
    "aspects": {"aspect_weights": {ASPECTS[0]: 1.0, ASPECTS[1]: 0.5}},
    "kto_ratings": {"loss_type": ["kto"], "label_threshold": 3.0},
    "bco_running": {"loss_type": ["bco_pair"], "bco_reward_shift": "running_mean"},
}
CASES = {**{name: {"loss_type": [name], **OPTIONS.get(name, {})} for name in SPECS}, **COMBINATIONS}


def rated():
    return dataset(
        [
            {
                **row,
                "ratings": [{ASPECTS[0]: 5.0 - i, ASPECTS[1]: 4.0 - i} for i in range(len(row["responses"]))],
                "rationales": [dict.fromkeys(ASPECTS, "") for _ in row["responses"]],
            }
            for row in mixed_groups()
        ],
        ASPECTS,
    )


@pytest.mark.parametrize("name", CASES)
def test_layouts_and_precomputed_reference_agree(tmp_path, name):
    options = {
        **CASES[name],
        "data": rated(),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
    }
    packed, rows = (make(tmp_path, layout=layout, **options) for layout in ("packed", "rows"))
    packed.train(), rows.train()
    assert len(losses(packed)) == 2 and all(abs(v) < 1e3 for v in losses(packed))
    assert losses(packed) == pytest.approx(losses(rows), rel=1e-4, abs=1e-5)
    if packed.reference is not None and not packed.passes.kl:
        stored = make(tmp_path, precompute_ref_log_probs=True, reference_cache_dir=str(tmp_path / "cache"), **options)
        stored.train()
        assert stored.passes.table is not None
        assert losses(stored) == pytest.approx(losses(packed), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["mpo", "ld_dpo", "ddpo", "wpo", "aspects", "simpo", "plackett_luce", "sft"])
def test_the_split_of_a_step_does_not_matter(tmp_path, name):
    options = {**CASES[name], "data": rated(), "learning_rate": 1e-3, "num_train_epochs": 2}
    whole = make(tmp_path, per_device_train_batch_size=4, **options)
    split = make(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    whole.train(), split.train()
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4, abs=1e-5)


def test_the_running_mean_survives_a_restart(tmp_path):
    options = {**CASES["bco_running"], "num_train_epochs": 3, "per_device_train_batch_size": 2}
    whole = make(tmp_path, save_strategy="steps", save_steps=2, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
