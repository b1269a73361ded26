"""The reference pages say what the code says, and the links of all pages lead somewhere."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from silkie import SilkieDPOConfig, SilkieDPOTrainer
from tests.support.data import dataset, mixed_groups
from tests.support.tiny import tiny_model, tiny_processor

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("reference", ROOT / "examples/reference/generate.py")
reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(reference)

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md"), *ROOT.glob("tests/**/*.md"), *ROOT.glob("silkie/**/*.md")]


@pytest.mark.parametrize("name", reference.PAGES)
def test_a_page_is_what_its_code_gives(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    current = (ROOT / "examples/reference" / name).read_text(encoding="utf-8")
    assert reference.PAGES[name]() == current, "run `python examples/reference/generate.py`"


def test_every_field_has_an_entry_and_silkies_own_have_a_meaning_and_a_reader():
    page = (ROOT / "examples/reference/config.md").read_text(encoding="utf-8")
    for name in SilkieDPOConfig.__dataclass_fields__:
        assert f"**`{name}`**" in page or not SilkieDPOConfig.__dataclass_fields__[name].init, name
    own = page[page.index("## silkie's own") : page.index("## Other than in TRL")]
    entries = own.split("\n- ")[1:]
    assert len(entries) > 25
    for entry in (" ".join(text.split()) for text in entries):
        assert "Read by" in entry and len(entry.split("): ")[1].split("Read by")[0]) > 10, entry


def test_a_run_logs_the_metrics_of_the_page_and_no_others(tmp_path):
    args = SilkieDPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        max_steps=1,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        log_token_stats=True,
        bf16=False,
        save_strategy="no",
    )
    trainer = SilkieDPOTrainer(
        model=tiny_model(),
        args=args,
        train_dataset=dataset(mixed_groups()),
        eval_dataset=dataset(mixed_groups()),
        processing_class=tiny_processor(),
        peft_config=LoraConfig(r=2),
    )
    trainer.train()
    logged = {name for line in trainer.state.log_history for name in line} - {"step"}
    logged = {name.replace("loss/sigmoid", "loss/NAME") for name in logged}
    training = [*reference.TRAINING, *reference.TOKEN_STATS]
    only_in_training = {"loss", "grad_norm", "learning_rate", "epoch", "num_packed_tokens"}
    in_evaluation = {f"eval_{name}" for name in training if name not in only_in_training}
    assert "eval_num_tokens" not in trainer.state.log_history[-1]  # the summary of the training
    assert logged == {*training, *in_evaluation, *reference.AT_THE_END, *reference.EVALUATION}


def test_every_link_of_every_page_leads_to_a_file():
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http", "#", "mailto:")) and not (page.parent / target.split("#")[0]).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken, "\n".join(broken)


def test_the_index_and_the_site_name_every_page_of_examples():
    index = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    site = (ROOT / "examples/site/mkdocs.yml").read_text(encoding="utf-8")
    pages = sorted(path.name for path in ROOT.glob("examples/*.md"))
    assert len(pages) > 10
    for name in pages:
        assert name == "README.md" or f"({name})" in index, name
        assert f"examples/{name}" in site, name


def test_prose_of_the_readme_fits_a_phone():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120]
    assert max(line.count("|") for line in lines if line.startswith("|")) <= 4  # three columns
