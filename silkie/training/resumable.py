"""Trainer base class that survives kills, preemption and non-finite losses.

Of transformers' trainer it overrides `train`, `_save`, `_save_checkpoint`, `_load_from_checkpoint`, `_load_best_model`
and `_get_grad_norm`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from silkie.model.families import causal_lm
from silkie.training import checkpoints
from silkie.training.non_finite import FiniteWatch

logger = logging.getLogger(__name__)


class RecoverableTrainer(Trainer):
    """transformers' `Trainer` with crash-safe checkpoints: a preempted run saves a checkpoint and stops, a full disk is
    reported as such, and a non-finite loss or gradient stops the run.

    Attributes:
        preempted: whether SIGTERM or the stop file ended the last run.
        watch: checks losses; the subclass passes each of its losses to `watch.add`.
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = FiniteWatch()
        self._terminated, self.preempted = False, False
        self._keep: int | None = self.args.save_total_limit
        self.add_callback(_RecoveryHooks(self))

    def run_state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps beside transformers' own state. Every rank calls it."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Restores the state saved by `run_state`; {} for a checkpoint of another trainer."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains.

        Args:
            resume_from_checkpoint: a checkpoint directory, or True: the last complete one in `output_dir`, or from the
                start where there is none.

        SIGTERM, or a file named `stop` in `output_dir`, makes the run save a checkpoint after the current step and
        stop; `preempted` is then True.

        Raises:
            silkie.training.checkpoints.CheckpointError: the disk is full, or the checkpoint is damaged or missing.
            silkie.training.non_finite.NonFiniteError: a loss or gradient is not finite.
        """
        directory = str(self.args.output_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = checkpoints.agreed(
                gather_object([checkpoints.last_complete_checkpoint(directory)]), directory
            )
            logger.info(
                "resuming from %s" if resume_from_checkpoint else "%s: no complete checkpoint, training from the start",
                resume_from_checkpoint or directory,
            )
        elif resume_from_checkpoint:
            checkpoints.check_chosen(resume_from_checkpoint)
        if resume_from_checkpoint:
            state = checkpoints.read_state(str(resume_from_checkpoint))
            self.load_run_state(state)
            if (before := state.get("processes", self.accelerator.num_processes)) != self.accelerator.num_processes:
                logger.warning(
                    "%s was written by %d processes, this run has %d: data order is preserved only if the number of"
                    " groups per optimizer step is unchanged",
                    resume_from_checkpoint,
                    before,
                    self.accelerator.num_processes,
                )
        # transformers would delete old checkpoints before the new one is complete; `finish_checkpoint` does it after
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._keep = keep
        try:
            with checkpoints.clear_disk_errors(directory), checkpoints.on_sigterm(self._preempt):
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.args.save_total_limit = keep

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.clear_place(place)
        self.accelerator.wait_for_everyone()  # no rank writes into a place that is being cleared
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._has_plain_weights():
            checkpoints.load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._has_plain_weights():
            checkpoints.load_weights(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _has_plain_weights(self) -> bool:
        """Whether a checkpoint's weights are those of a whole model, not an adapter's or an engine's shards."""
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(self.model, PeftModel))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not self.args.fp16:  # fp16's loss scaler expects overflows and skips their steps
            self.watch.end_step(norm)
        return norm

    def check_finite(self) -> None:
        """Stops on a non-finite loss or gradient."""
        self.watch.check(any_rank=self.any_rank, gather=gather_object)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Every rank must call."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), reduction="sum") > 0
        )

    def _preempt(self) -> None:
        self._terminated = True
        logger.warning("SIGTERM: saving a checkpoint after this step, then stopping")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:  # gathered from shards, which split a tied tensor in two
            tied = causal_lm(self.model).all_tied_weights_keys
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)


class _RecoveryHooks(TrainerCallback):
    """Hooks of a `RecoverableTrainer` on transformers' training loop."""

    def __init__(self, trainer: RecoverableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            logger.warning(
                "%s: training is already complete (step %d of %d). Train more epochs, or use a different output_dir"
                " for a new run",
                args.output_dir,
                state.global_step,
                state.max_steps,
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.watch.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        stop_file = Path(args.output_dir) / checkpoints.STOP_FILE
        if trainer.any_rank(trainer._terminated or (trainer.is_world_process_zero() and stop_file.exists())):
            trainer.preempted = control.should_save = control.should_training_stop = True
            if trainer.is_world_process_zero():
                stop_file.unlink(missing_ok=True)
        if control.should_save:
            trainer.check_finite()  # a checkpoint must not hold weights that a non-finite step has ruined

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()  # every rank has written its part
        own = {**trainer.run_state(), "processes": trainer.accelerator.num_processes}
        if trainer.is_world_process_zero():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            checkpoints.finish_checkpoint(checkpoint, own, keep=trainer._keep, best=state.best_model_checkpoint)
