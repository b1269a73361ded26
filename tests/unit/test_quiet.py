"""Lines that the user did not cause are left out, and nothing else is."""

from __future__ import annotations

import logging
import warnings

import pytest
from transformers import PreTrainedModel

from silkie import SilkieDPOConfig
from silkie.io import console
from silkie.io.quiet import ALIAS, UNCAUSED, quiet


@pytest.mark.parametrize("name", UNCAUSED)
def test_a_library_s_line_is_left_out_and_its_others_stay(name, caplog):
    quiet()
    logger = logging.getLogger(name)
    shown = []
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning(UNCAUSED[name][0] + " ...")
        logger.warning("Something that matters: %s", 1)
    finally:
        logger.removeHandler(handler)
    assert shown == ["Something that matters: 1"]
    assert len(logger.filters) == 1, "quiet() adds one filter, however often it is called"


@pytest.mark.parametrize("name", UNCAUSED)
def test_the_libraries_still_say_it_in_these_words(name):
    """Where a library changes its line, the line comes back and this test says which."""
    import importlib.util
    from pathlib import Path

    module = {"DeepSpeed": "deepspeed.accelerator.real_accelerator"}.get(name, name)
    package = importlib.util.find_spec(module.partition(".")[0])
    if package is None:
        pytest.skip(f"{module.partition('.')[0]} is not installed")
    file = Path(package.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert UNCAUSED[name][0] in file.read_text(encoding="utf-8"), f"{module} no longer says: {UNCAUSED[name][0]}"


def test_a_config_does_not_warn_about_the_name_of_checkpointing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
        default = SilkieDPOConfig(**base)
        old = SilkieDPOConfig(**base, gradient_checkpointing=False)
        new = SilkieDPOConfig(**base, activation_checkpointing=False)
        reentrant = SilkieDPOConfig(**base, gradient_checkpointing_kwargs={"use_reentrant": True})
    assert default.activation_checkpointing == default.gradient_checkpointing == "auto"
    assert not old.activation_checkpointing and not new.gradient_checkpointing
    assert reentrant.activation_checkpointing_kwargs == {"use_reentrant": True}


def test_the_alias_that_peft_asks_for_is_not_warned_about():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet()
        PreTrainedModel.is_gradient_checkpointing.fget(type("Model", (), {"is_activation_checkpointing": False})())
        assert not caught, caught[0].message
        warnings.warn("another", FutureWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["another"]
    assert ALIAS.startswith("`is_gradient_checkpointing`")


def test_rank_0_logs_silkie_s_info_and_no_library_s(monkeypatch):
    root, silkie = logging.getLogger(), logging.getLogger("silkie")
    before = root.level, silkie.level, root.handlers[:]
    monkeypatch.setattr(root, "handlers", [])
    try:
        for rank, level in (("0", logging.INFO), ("1", logging.WARNING)):
            monkeypatch.setenv("RANK", rank)
            console.log_to_stderr()
            assert logging.getLogger("silkie.data").getEffectiveLevel() == level
            assert logging.getLogger("httpx").getEffectiveLevel() == logging.WARNING
    finally:
        root.setLevel(before[0])
        silkie.setLevel(before[1])
        root.handlers[:] = before[2]
