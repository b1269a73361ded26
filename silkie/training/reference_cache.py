"""One reference pass over the training data, kept on disk for later epochs, another beta or another loss.

Legend: R responses, N scored tokens of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

import silkie
from silkie.batch.batch import Batch
from silkie.batch.collator import GroupCollator
from silkie.batch.companies import Company, among
from silkie.batch.sampler import GroupBatchSampler, WithEmptyGroups
from silkie.batch.workers import Named, worker_options
from silkie.config import SilkieDPOConfig
from silkie.data.schema import ROW_FORM
from silkie.model.families import causal_lm
from silkie.model.forward import LogpsForward, SequenceLogps, sum_by_response
from silkie.model.layout import LayoutChoice
from silkie.model.vision import FeatureCache
from silkie.training.forward_context import ForwardContext
from silkie.training.reference import Reference, ReferenceStore, group_key

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class ReferenceTable:
    """Reference log-probs by row of the training data: per response its sum [1] or its tokens' values [n]."""

    by_row: dict[int, list[np.ndarray]]
    tokens: bool

    def lookup(self, batch: Batch) -> SequenceLogps:
        """The log-probs of a batch, on its device, in the order a pass would give."""
        values = np.concatenate([v for row in batch["rows"] for v in self.by_row[row]])
        flat = torch.from_numpy(values).to(batch["lengths"].device, non_blocking=True)
        if not self.tokens:
            return SequenceLogps(per_token_logps=flat.new_empty(0), logps=flat)
        return SequenceLogps(per_token_logps=flat, logps=sum_by_response(flat, batch))


@dataclass(slots=True, frozen=True, kw_only=True)
class ReferencePass:
    """Computes the reference log-probs of a dataset that the cache on disk lacks.

    Attributes:
        reference: the reference policy.
        weights_hash: hash of its weights on this rank, taken before training changed any.
        forward, collate, context: the run's own forward, collator, and device placement with autocast. The encoder's
            settings and the text of a prompt are part of the cache's keys.
        choice: layout of the rows.
        companies: groups of the dataset that come together, see `silkie.batch.companies`.
        accelerator: shares the groups out over the ranks.
        args: batch sizes, precision, and where the cache is.
        tokens: keep the values of tokens besides the sums of responses.
        features: see `Passes.features`.
    """

    reference: Reference
    weights_hash: str
    forward: LogpsForward
    collate: GroupCollator
    context: ForwardContext
    choice: LayoutChoice
    companies: Sequence[Company]
    accelerator: Accelerator
    args: SilkieDPOConfig
    tokens: bool
    features: Callable[[Batch], FeatureCache | None]

    def run(self, policy: Any, dataset: Dataset) -> ReferenceTable:
        """Reference log-probs of all groups of `dataset`. Every rank calls it.

        Args:
            policy: the policy as the training loop calls it; the reference may be its own weights.

        Raises:
            OSError: the cache cannot be written; what is in it stays valid and the next run continues from there.
        """
        store = ReferenceStore(self._directory(), self._run_key(causal_lm(policy).dtype), tokens=self.tokens)
        keys = self._keys(dataset)
        known = store.load()
        # What any rank lacks: nodes need not share a disk, and all must agree on the batches to run.
        own = [i for i in range(len(dataset)) if keys[i] not in store.values]
        missing = sorted({i for part in _gather([own]) for i in part})
        logger.info(
            "reference cache %s: %d groups known, %d of %d to compute",
            store.directory,
            known,
            len(missing),
            len(dataset),
        )
        if missing:
            self._compute(policy, dataset, missing, store, [keys[i] for i in missing])
            for part in _gather([{k: store.values[k] for k in {keys[i] for i in missing} if k in store.values}]):
                store.values.update(part)
        store.close()
        rows = dataset["row"][:]
        return ReferenceTable({rows[i]: store.values[keys[i]] for i in range(len(dataset))}, self.tokens)

    def _directory(self) -> str | Path:
        return self.args.reference_cache_dir or Path(str(self.args.output_dir)) / "reference_cache"

    def _keys(self, dataset: Dataset) -> dict[int, str]:
        """Index -> cache key. Every rank hashes its share of the rows. The images are not read: preparation has hashed
        them, and does so again where a file has changed; the text is written anew, as a template may write the date."""
        accelerator = self.accelerator
        mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
        read = ("prompt", "responses", "image_digests", *ROW_FORM)
        columns = dataset.select_columns([c for c in read if c in dataset.column_names])
        hashed = {}
        own = tqdm(columns.select(mine), desc="Hashing groups", disable=not accelerator.is_local_main_process)
        for i, row in zip(mine, own, strict=True):
            hashed[i] = group_key(row, self.collate.encoder.render(row))
        return {i: key for part in _gather([hashed]) for i, key in part.items()}

    def _compute(
        self, policy: Any, dataset: Dataset, missing: list[int], store: ReferenceStore, keys: list[str]
    ) -> None:
        """Runs the reference over this rank's share of the groups `missing` and stores the numbers under `keys`."""
        dataset = dataset.select(missing)
        batches = self._my_batches(dataset, among(self.companies, missing))
        loader = torch.utils.data.DataLoader(
            WithEmptyGroups(dataset),
            batch_sampler=batches,
            collate_fn=Named(self.collate),
            **worker_options(self.args, len(batches)),
        )
        for indices, batch in tqdm(
            zip(batches, loader, strict=True),
            total=len(batches),
            desc="Reference log-probs",
            disable=not self.accelerator.is_local_main_process,
        ):
            batch = self.context.prepare(batch)
            with self.context.autocast(), self.reference.active(policy) as model:
                cache = self.features(batch) if self.reference.shares_vision else None
                logps = self.forward(model, batch, frozen_vision=True, cache=cache)
            values = _by_group(logps.per_token_logps if self.tokens else logps.logps, batch, tokens=self.tokens)
            for index, group_values in zip(indices, values, strict=True):
                if index < len(keys):  # indices beyond are copies that keep a rank busy
                    store.add(keys[index], group_values)
        self.accelerator.wait_for_everyone()

    def _my_batches(self, dataset: Dataset, companies: Sequence[Company]) -> list[list[int]]:
        """This rank's batches: every rank takes the same number, or sharded models would hang."""
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        sampler = GroupBatchSampler(
            self.choice.shapes(dataset),
            batch_size=self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size,
            max_tokens=self.args.max_tokens_per_batch,
            world_size=world_size,
            padded=self.choice.groups_per_row == 1,
            companies=companies,
        )
        return [batch for i, batch in enumerate(sampler) if i % world_size == rank]

    def _run_key(self, dtype: torch.dtype) -> str:
        """Hash of everything besides a group that its reference log-probs depend on."""
        args = self.args
        facts = {
            # Of all ranks: with sharded weights each has hashed its own part.
            "weights": sorted(_gather([self.weights_hash])),
            "encoder": self.collate.encoder.fingerprint(),
            "layout": [self.choice.layout, self.choice.backend, self.choice.shares_prefix],
            "dtype": [str(dtype), args.bf16, args.fp16, args.tf32],
            "kernel": [args.use_fused_logprob, args.logprob_impl, self.accelerator.device.type],
            # Kernels of another version round differently, and old numbers beside new ones would bias the ratios.
            "versions": [silkie.__version__, torch.__version__, transformers.__version__],
        }
        return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _by_group(flat: Tensor, batch: Batch, *, tokens: bool) -> list[list[np.ndarray]]:
    """Per group, per response: the values of its tokens [n], or its sum [1]."""
    numbers = flat.float().cpu().numpy()
    ends = np.cumsum(batch["lengths"].tolist())[:-1] if tokens else np.arange(1, len(numbers))
    values = iter(np.split(numbers, ends))
    return [[next(values) for _ in range(count)] for count in torch.bincount(batch["group"]).tolist()]


def _gather(parts: list[Any]) -> list[Any]:
    """The parts of all ranks, in rank order."""
    return gather_object(parts)
