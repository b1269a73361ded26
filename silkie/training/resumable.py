"""Trainer base class that survives kills, preemption and non-finite losses.

Of transformers' trainer it overrides `train`, `_save`, `_save_checkpoint`, `_load_from_checkpoint`, `_load_best_model`
and `_get_grad_norm`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from silkie.batch.workers import explained_deaths
from silkie.model.families import causal_lm
from silkie.model.weights import refuse_pickled_adapter
from silkie.training import checkpoints
from silkie.training.checkpoints import CheckpointError
from silkie.training.ending import ECHO, PREEMPTED_EXIT_CODE, STOP_FILE, on_signals
from silkie.training.identity import LENGTH, Identity, differences
from silkie.training.non_finite import FiniteWatch, check_weights
from silkie.training.output_dir import OutputLock, clear_disk_errors

logger = logging.getLogger(__name__)

_LARGEST_SHARD = 50 * 10**9  # bytes; `save_pretrained` splits larger models


class RunChanged(CheckpointError):
    """The checkpoint belongs to a run with other data, model, losses or options."""


class RecoverableTrainer(Trainer):
    """transformers' `Trainer` with crash-safe checkpoints. A preempted run saves a checkpoint and leaves; a full disk
    is reported as such; a non-finite loss, gradient or weight stops the run; one run writes to a directory at a time; a
    checkpoint of another run is not resumed unasked.

    Attributes:
        preempted: whether a signal or the stop file ended the last run before its last step.
        watch: checks losses; the subclass passes each of its losses to `watch.add`.
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = FiniteWatch()
        self.asked_to_stop, self.preempted = False, False
        self.identity: Identity = {}
        self._keep: int | None = self.args.save_total_limit
        self.add_callback(_RecoveryHooks(self))

    def run_state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps beside transformers' own state. Every rank calls it."""
        return {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Restores the state saved by `run_state`; {} for a checkpoint of another trainer."""

    def run_identity(self) -> Identity:
        """What this run is, to be compared with the run that wrote a checkpoint. The main process calls it."""
        return {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains.

        Args:
            resume_from_checkpoint: a checkpoint directory, or True: the last usable one in `output_dir`, or from the
                start where there is none.

        SIGTERM, Ctrl-C, or a file named `stop` in `output_dir` makes the run save a checkpoint after the current step
        and leave the process with exit code 75, so that no script continues with a half-trained model. With
        `on_preempt="return"` it returns, and `preempted` is True.

        Raises:
            SystemExit: the run was preempted.
            silkie.training.checkpoints.CheckpointError: the disk is full or read-only, another run holds the directory
                (`silkie.training.output_dir.OutputDirInUse`), the checkpoint is damaged or missing, or belongs to
                another run (`RunChanged`).
            silkie.batch.workers.BatchError, WorkerDied: groups cannot be encoded, or a data worker was killed.
            silkie.training.non_finite.NonFiniteError: a loss, gradient or trained weight is not finite.
        """
        directory = str(self.args.output_dir)
        lock = OutputLock(directory)
        self.asked_to_stop, self.preempted = False, False
        # Before any file is read: another run could rotate away the checkpoint that is about to be resumed.
        self.on_main(lambda: self._take(lock))
        # transformers would delete old checkpoints before the new one is complete; `finish_checkpoint` does it after
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._keep = keep
        try:
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint, directory)
            self.identity = self.on_main(self.run_identity)
            if checkpoint:
                self._resume(checkpoint)
            with clear_disk_errors(directory), explained_deaths(), on_signals(self._stop_soon):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
        finally:
            self.args.save_total_limit = keep
            lock.release()
        if self.preempted and self.args.on_preempt == "exit":
            logger.warning(
                "stopped at step %d of %d; start again to resume", self.state.global_step, self.state.max_steps
            )
            raise SystemExit(PREEMPTED_EXIT_CODE)
        if self.asked_to_stop and not self.preempted:
            logger.warning("training had reached its last step when it was asked to stop")
        return output

    def _take(self, lock: OutputLock) -> None:
        """Makes this run the only writer of its directory, which must have room for a checkpoint."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in trained)
        lock.take(largest_file=min(size, _LARGEST_SHARD), checkpoint=size)

    def _checkpoint_to_resume(self, asked: str | bool | None, directory: str) -> str | None:
        """The checkpoint that the caller asks for, once its files are known to be whole."""
        if asked is True:
            checkpoints.agreed(
                # Hashing is left to the main process; sizes are enough to see whether all machines look at the same
                # disk.
                gather_object([checkpoints.last_complete_checkpoint(directory, hashes=False)]),
                directory,
            )
            found = self.on_main(lambda: checkpoints.last_complete_checkpoint(directory))
            logger.info(
                "resuming from %s" if found else "%s: no complete checkpoint, training from the start",
                found or directory,
            )
            return found
        if asked:
            self.on_main(lambda: checkpoints.check_chosen(str(asked)))
        return asked or None

    def _resume(self, checkpoint: str) -> None:
        """Compares the run that wrote a checkpoint with this one and takes over its state."""
        state = checkpoints.read_state(checkpoint)
        self.on_main(lambda: self._check_same_run(checkpoint, state))
        self.load_run_state(state)

    def _check_same_run(self, checkpoint: str, state: dict[str, Any]) -> None:
        if "identity" not in state:
            logger.warning("%s does not say which data, model and losses it was trained with", checkpoint)
            return
        before = state["identity"]
        if longer := differences({LENGTH: self.identity.get(LENGTH, {})}, before):
            logger.warning("resuming %s with another %s", checkpoint, "; ".join(longer))
        changed = differences({part: facts for part, facts in self.identity.items() if part != LENGTH}, before)
        if not changed:
            return
        lines = "\n".join(f"  {line}" for line in changed)
        if any(line.startswith("optimizer") for line in changed):
            lines += "\n  (the checkpoint's learning rate, betas and weight decay stay in force when it is resumed)"
        if self.args.on_changed_run == "continue":
            logger.warning("%s is resumed with another run's settings (on_changed_run):\n%s", checkpoint, lines)
            return
        raise RunChanged(
            f"{checkpoint} belongs to another run:\n{lines}\nFor a new run choose another output_dir, or train without"
            " resuming (--resume false). To resume that run with these changes, set on_changed_run='continue'"
            " (--on_changed_run continue)."
        )

    def on_main(self, act: Callable[[], Any]) -> Any:
        """What `act` returns on the main process, on every rank; its CheckpointError is raised on all of them."""
        outcome: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                outcome[0] = act()
            except CheckpointError as error:
                outcome[1] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.clear_place(place)
        self.accelerator.wait_for_everyone()  # no rank writes into a place that is being cleared
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        refuse_pickled_adapter(resume_from_checkpoint)
        if self._has_plain_weights():
            checkpoints.load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        refuse_pickled_adapter(str(self.state.best_model_checkpoint))
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

    def check_weights(self) -> None:
        """Stops on a non-finite trained weight: such a checkpoint must not be written, nor push out a good one."""
        check_weights(self.model, step=self.state.global_step, any_rank=self.any_rank)

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Every rank must call."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(
            self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), reduction="sum") > 0
        )

    def _stop_soon(self, signal_name: str) -> None:
        self.asked_to_stop = True
        logger.warning(
            "%s: saving a checkpoint after this step, then stopping; again in %d seconds stops at once",
            signal_name,
            ECHO,
        )

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
        stop_file = Path(args.output_dir) / STOP_FILE
        if trainer.any_rank(trainer.asked_to_stop or (trainer.is_world_process_zero() and stop_file.exists())):
            # All ranks stop after the same step: one that stopped by itself would leave the others waiting in a
            # collective call.
            trainer.preempted = control.should_save = control.should_training_stop = True
            if trainer.is_world_process_zero():
                stop_file.unlink(missing_ok=True)
        if control.should_save or state.global_step >= state.max_steps:
            trainer.check_finite()  # a checkpoint must not hold weights that a non-finite step has ruined
            trainer.check_weights()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.accelerator.wait_for_everyone()  # every rank has written its part
        own = {**trainer.run_state(), "processes": trainer.accelerator.num_processes, "identity": trainer.identity}
        if trainer.is_world_process_zero():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            checkpoints.finish_checkpoint(checkpoint, own, keep=trainer._keep, best=state.best_model_checkpoint)
