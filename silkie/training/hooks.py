"""What silkie does at the steps of transformers' training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from silkie.batch.sampler import GroupBatchSampler
from silkie.batch.streaming import StreamSampler


class StepHooks(TrainerCallback):
    """Calls the parts of a run at the loop's events.

    Args:
        begin: called once the model is wrapped, before the first step.
        sampler: the sampler of the training data, None before there is one.
        end_step: called after every optimizer step.
    """

    def __init__(
        self,
        *,
        begin: Callable[[], None],
        sampler: Callable[[], GroupBatchSampler | StreamSampler | None],
        end_step: Callable[[], None],
    ) -> None:
        self.begin, self.sampler, self.end_step = begin, sampler, end_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The loop sets the epoch of the sampler that it sees; after resuming, wrappers hide this one from it.
        if (sampler := self.sampler()) is not None:
            sampler.set_epoch(int(state.epoch or 0))
            sampler.finished = state.global_step >= state.max_steps  # the loop looks only after one more step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_step()
