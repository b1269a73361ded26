"""What a run reports about itself: its log, its plan, its model card, and the state that its checkpoints keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from trl import DPOTrainer

from silkie.batch.encoding import GroupEncoder
from silkie.batch.preparation_report import PreparationReport
from silkie.batch.streaming import StreamedBatches, Window
from silkie.config import SilkieDPOConfig
from silkie.losses import Objective
from silkie.model.adapters import Coverage
from silkie.model.families import loaded_from, reads_images
from silkie.model.layout import LayoutChoice
from silkie.model.vision import describe_vision
from silkie.training.identity import Identity, Start, identify
from silkie.training.metrics import RunMetrics
from silkie.training.model_card import RunDescription, setup_lines, write_card
from silkie.training.reference import Reference


class RunRecord(DPOTrainer):
    """The part of `SilkieDPOTrainer` that reports on a run and changes nothing in it."""

    args: SilkieDPOConfig
    model: Any
    train_dataset: Dataset
    encoder: GroupEncoder
    choice: LayoutChoice
    objective: Objective
    reference: Reference | None
    reports: dict[str, PreparationReport]
    check_finite: Callable[[], None]
    _card: dict[str, Any]
    _coverage: Coverage | None
    _logged: dict[str, RunMetrics]
    _sum: Callable[[Tensor], Tensor]
    checkpointing: Any
    _packed_tokens = 0
    stream: StreamedBatches | None
    _window: Sequence[int] | None = None
    _evaluated_as: str

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last call, over all ranks, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        line = self._logged[mode].pop(self._sum)
        if line.loss is not None:
            loss = line.loss + self.router_aux_loss_coef * line.means.get("aux_loss", 0.0)
            if (name := f"{self._evaluated_as}_loss") in logs:
                logs[name] = loss  # transformers' is the mean of batches of unlike size
        self._metrics[mode].update({name: [mean] for name, mean in line.means.items()})
        if mode == "train":
            self._total_train_tokens += line.tokens
            self._packed_tokens += line.packed_tokens
            self._metrics[mode]["num_tokens"] = [float(self._total_train_tokens)]
            self._metrics[mode]["num_packed_tokens"] = [float(self._packed_tokens)]
            self.check_finite()
        elif line.means:
            # Those trained on so far. The summary of a training comes in this mode, too, and has none.
            self._metrics[mode]["num_tokens"] = [float(self._total_train_tokens + self._tokens_since_log()[0])]
        super().log(logs, start_time)

    def plan_lines(self) -> list[str]:
        """What runs, and why: data, layout, attention, kernel, reference, vision."""
        return [*(line for name, report in self.reports.items() for line in report.lines(name)), *self.setup_lines()]

    def setup_lines(self) -> list[str]:
        """The plan without the data: lines of the form "name: what runs"."""
        lines = setup_lines(self.choice, self.reference, self.args, describe_vision(self.model))
        lines += [f"adapter: on {self._coverage}"] if self._coverage else []
        return [*lines, str(self.checkpointing)] if self.checkpointing else lines

    def run_description(self) -> RunDescription:
        """The contents of the model card of this run."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return RunDescription(
            args=self.args,
            base=loaded_from(self.model.config),
            adapter=isinstance(model, PeftModel),
            reference=self.reference.kind if self.reference else None,
            setup=self.setup_lines(),
            reports=self.reports,
            log_history=self.state.log_history,
            reads_images=reads_images(self.model.config),
            **self._card,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves adapter (or weights), processor and model card."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            write_card(output_dir or str(self.args.output_dir), self.run_description())

    def run_state(self) -> dict[str, Any]:
        """State of the losses, the tokens trained on, and the window of a stream that the last batch came from."""
        tokens, packed = self._tokens_since_log()
        stream = {"stream": self._window} if self._window else {}
        return {
            **stream,
            "objective": self.objective.state_dict(),
            "train_tokens": self._total_train_tokens + tokens,
            "packed_tokens": self._packed_tokens + packed,
        }

    def _tokens_since_log(self) -> tuple[int, int]:
        """Tokens, and packed tokens, that are in no total yet. Every rank must call it."""
        return self._logged["train"].tokens(self._sum, self.accelerator.device)

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Restores the state saved by `run_state`."""
        self.objective.load_state_dict(state.get("objective", {}))
        if self.stream is not None and "stream" in state:
            self.stream.start = Window(*state["stream"])
        self._total_train_tokens = state.get("train_tokens", 0)
        self._packed_tokens = state.get("packed_tokens", 0)

    @cached_property
    def _start(self) -> Start:  # a second call of train() starts from trained weights
        return Start.of(self.model, self.reference, self.optimizer, self.accelerator.num_processes)

    def run_identity(self) -> Identity:
        """Data, model, losses and options of this run, which its checkpoints keep."""
        identity = identify(self._start, self.train_dataset, self.encoder, self.args)
        if self.stream is not None:  # the data is that of the first window
            identity["order"]["rows_per_window"] = self.stream.rows
        return identity
