"""What TRL's users call on a trainer besides `train` and `evaluate`, with TRL's meaning, on silkie's batches."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput

from silkie.batch.batch import Batch
from silkie.batch.collator import CollateWithRows
from silkie.batch.loaders import GroupLoaders, is_prepared
from silkie.config.checks import check_room_for_others
from silkie.losses import Objective
from silkie.model.attention import Attention
from silkie.training.metrics import RunMetrics
from silkie.training.model_card import RunDescription, write_card
from silkie.training.passes import Passes

logger = logging.getLogger(__name__)


class TrlSurface(Trainer):
    """`predict`, `compute_metrics`, `compute_ref_log_probs` and `create_model_card` of TRL's `DPOTrainer`.

    Logits are not built in training or evaluation; where TRL hands them on, an extra forward in the rows layout makes
    them, as TRL's own extra forward does.
    """

    args: Any
    data_collator: Any
    loaders: GroupLoaders
    passes: Passes
    objective: Objective
    _logged: dict[str, RunMetrics]
    _sum: Any
    _card: dict[str, Any]
    _evaluated_as = "eval"  # the prefix of the latest evaluation's metrics

    def _prepared(self, dataset: Any, args: Any, name: str) -> Any:
        raise NotImplementedError

    def run_description(self) -> RunDescription:
        """The contents of the model card of this run."""
        raise NotImplementedError

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        """TRL tokenises text data here; silkie's groups are encoded by its collator."""
        return dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Batches of an evaluation set: one given here, one of `eval_dataset` by name, or `eval_dataset` itself."""
        if eval_dataset is None:
            eval_dataset = self.eval_dataset
        dataset: Any = self.eval_dataset
        dataset = dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        if dataset is None:
            raise ValueError("Evaluation needs an `eval_dataset`.")
        return self._evaluation_loader(dataset, "eval", with_rows=self.compute_metrics is not None)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Batches of a dataset that is given to `predict`."""
        return self._evaluation_loader(test_dataset, "test", with_rows=True)

    def _evaluation_loader(self, dataset: Any, name: str, *, with_rows: bool) -> DataLoader:
        if not is_prepared(dataset):
            dataset = self._prepared(dataset, self.args, name)
        wanted = with_rows and not self.args.prediction_loss_only
        mismatched = "kl" in self.objective.needs
        if mismatched:
            check_room_for_others("per_device_eval_batch_size", self.args.per_device_eval_batch_size)
        return self.loaders.evaluation(
            dataset,
            mismatched=mismatched,
            collate=CollateWithRows(collate=self.data_collator) if wanted else None,
        )

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Logits and token ids of a dataset, as TRL's `predict` returns them: per batch, the rows of all chosen
        responses, then those of all rejected ones.

        Args:
            test_dataset: preference groups or pair rows.
        """
        out = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        line = self._logged["eval"].pop(self._sum)
        if line.loss is not None and out.metrics is not None:
            out.metrics[f"{metric_key_prefix}_loss"] = line.loss
        return out

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers; `log` learns under which name the loss goes."""
        self._evaluated_as = metric_key_prefix
        return super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss, and the logits and token ids where `compute_metrics` or `predict` reads them."""
        given, inputs = inputs, self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs)
            if prediction_loss_only or "as_rows" not in inputs:
                return loss.detach(), None, None
            logits, ids = self._logits(model, inputs)
        given["input_ids"] = ids  # what include_for_metrics=["inputs"] reads
        return loss.detach(), logits, ids

    def _logits(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """[2P, T, V] logits and [2P, T] token ids: rows of the chosen responses, then of the rejected ones; of labelled
        responses those, in their order."""
        rows = batch["as_rows"]
        forward = replace(self.passes.forward, attention=Attention(backend="sdpa", layout="rows"))
        which = rows["examples"] if "examples" in rows else torch.cat(rows["pairs"].unbind(1))
        return forward.logits(model, rows)[which], rows["input_ids"][which]

    def compute_ref_log_probs(self, model: Any, inputs: Batch) -> tuple[Tensor, Tensor]:
        """[P] and [P]: the reference's log-probs of chosen and rejected responses.

        Args:
            model: the policy, whose adapter is switched off where there is no second model.
            inputs: a batch of the trainer's own data loaders.

        Raises:
            ValueError: the losses need no reference.
        """
        batch: Any = self._prepare_inputs(inputs)  # type: ignore[arg-type]
        with self.compute_loss_context_manager():
            return self.objective.reference_logps(self.passes.score_reference(model, batch))

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes silkie's card in place of TRL's, with the same arguments; cards of later checkpoints keep them."""
        given = {
            "model_name": model_name,
            "dataset_name": dataset_name,
            "tags": [tags] if isinstance(tags, str) else tags,
        }
        self._card = {**self._card, **{name: value for name, value in given.items() if value is not None}}
        if self.is_world_process_zero():
            write_card(str(self.args.output_dir), self.run_description())
