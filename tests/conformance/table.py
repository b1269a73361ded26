"""Writes `examples/from_trl.md` from the cases: `python -m tests.conformance.table`."""

from __future__ import annotations

from pathlib import Path

from tests.conformance.cases import CALLS, TABLE, TRL_DIFFERS, TRL_STOPS
from tests.conformance.compare import Case

PAGE = Path(__file__).resolve().parents[2] / "examples" / "from_trl.md"
HEAD = """\
# From TRL's DPOTrainer: change one import

```python
from silkie import SilkieDPOConfig as DPOConfig, SilkieDPOTrainer as DPOTrainer
```

"same": the logged losses, rewards and log-probs of the first steps equal those of the installed TRL in fp32. "different":
both train, or TRL stops, and the reason is given. "refused": silkie stops before any compute is spent and says what to do
instead. `tests/conformance/` runs every row; `python -m tests.conformance.table` writes this page.

Defaults that differ from TRL's: `max_length=None` (TRL: 1024; no image or prompt is ever cut), `freeze_vision=True` in full fine-tuning,
`logging_nan_inf_filter=False` (a non-finite loss stops the run), `log_token_stats=False`. TRL's own `DPOConfig` or `KTOConfig` as `args` keeps TRL's values.

The tests of this page were run with torch 2.11.0 and transformers 5.22.2 and with torch 2.15.0 and transformers 5.24.0 (Python 3.11, CPU; the subset of
`make test-versions`), against trl 1.16.0 each time; rows added since, and every change of the code, with the pinned set.

In bf16 neither trainer is nearer to the truth: against a float64 step of the same weights, with five random adapters on each of four tiny models, the loss of a
step is off by .0008 to .0015 in both, its gradients by 3 to 7 % in both (the means of the two within a tenth of each other), and the two losses are .0001 to
.0005 apart: products over rows of other lengths are rounded otherwise
(`pytest tests/integration/test_models_trl.py -m "" -k bf16 -s`).
"""
MODELS = """\
## Model types

Loss and gradients of one step on a tiny model of every type that [models.md](models.md) calls exact
(`tests/integration/test_models_trl.py`). Where TRL's differ, silkie's are those of the model's own forward, one sequence
at a time, and TRL's are the same without the cause that is named.

| type | | why |
|---|---|---|
| all others | same |  |
"""


def line(case: Case) -> str:
    cell = case.why if case.expected != "refused" else f"instead: {case.why}"
    cell = cell or case.note
    return f"| {case.name} | {case.expected} | {cell} |"


def page() -> str:
    sections = [HEAD]
    for title, cases in TABLE.items():
        rows = "\n".join(map(line, cases))
        sections.append(f"## {title}\n\n| option or case | | why, or instead |\n|---|---|---|\n{rows}\n")
    rows = "\n".join(f"| {name} | {expected} | {why} |" for name, expected, why in CALLS)
    sections.append(f"## Calls\n\n| call | | how |\n|---|---|---|\n{rows}\n")
    return "\n".join([*sections, model_types()])


def model_types() -> str:
    rows = [f"| {name} | different | {why} |" for name, why in TRL_DIFFERS.items()]
    rows += [f"| {name} | different | TRL stops: {why} |" for name, (_, why) in TRL_STOPS.items()]
    return MODELS + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
