"""One reference pass over the training data, kept on disk: later epochs, another beta and another loss read its
numbers.

Legend: R responses, N scored tokens of a batch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from tqdm.auto import tqdm

import silkie
from silkie.batch.sampler import GroupBatchSampler, WithEmptyGroups
from silkie.model.forward import Scores, sum_by_response
from silkie.training.reference import ReferenceStore, group_key

if TYPE_CHECKING:
    from silkie.trainer import SilkieDPOTrainer

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class ReferenceTable:
    """Reference log-probs by row of the training data: per response its sum [1] or its tokens' values [n]."""

    by_row: dict[int, list[np.ndarray]]
    tokens: bool

    def lookup(self, batch: dict[str, Any]) -> Scores:
        """The scores of a batch, on its device, in the order a pass would give."""
        values = np.concatenate([v for row in batch["rows"] for v in self.by_row[row]])
        flat = torch.from_numpy(values).to(batch["lengths"].device, non_blocking=True)
        if not self.tokens:
            return Scores(per_token_logps=flat.new_empty(0), logps=flat)
        return Scores(per_token_logps=flat, logps=sum_by_response(flat, batch))


def precompute_reference(trainer: SilkieDPOTrainer) -> ReferenceTable:
    """Runs the reference over the groups that the cache lacks, shared out over the ranks, and returns the numbers of
    all groups.

    Raises:
        OSError: the cache cannot be written; what is in it stays valid and the next run goes on from there.
    """
    args, accelerator, dataset = trainer.args, trainer.accelerator, trainer.train_dataset
    assert trainer.reference is not None
    tokens = "reference_tokens" in trainer.objective.needs
    store = ReferenceStore(
        args.reference_cache_dir or Path(str(args.output_dir)) / "reference_cache", _run_key(trainer), tokens=tokens
    )
    # Every rank hashes its share of the rows: the key depends on the image bytes as they are now, so it is never
    # cached.
    mine = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    read = ("prompt", "responses", "images", "chat_template_kwargs")
    columns = dataset.select_columns([c for c in read if c in dataset.column_names])
    hashed = {}
    for i in tqdm(mine, desc="Hashing groups", disable=not accelerator.is_local_main_process):
        row = columns[i]
        hashed[i] = group_key(row, trainer.encoder.render(row))
    keys = {i: key for part in _gather([hashed]) for i, key in part.items()}
    known = store.load()
    # What any rank lacks: nodes need not share a disk, and all must agree on the batches to run.
    missing = sorted(
        {i for part in _gather([[i for i in range(len(dataset)) if keys[i] not in store.values]]) for i in part}
    )
    logger.info(
        "reference cache %s: %d groups known, %d of %d to compute", store.directory, known, len(missing), len(dataset)
    )
    if missing:
        _compute(trainer, store, missing, keys)
        for part in _gather([{k: store.values[k] for k in {keys[i] for i in missing} if k in store.values}]):
            store.values.update(part)
    store.close()
    rows = dataset["row"]
    return ReferenceTable({rows[i]: store.values[keys[i]] for i in range(len(dataset))}, tokens)


def _compute(trainer: SilkieDPOTrainer, store: ReferenceStore, missing: list[int], keys: dict[int, str]) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    dataset = trainer.train_dataset.select(missing)
    sampler = GroupBatchSampler(
        trainer.choice.shapes(dataset),
        batch_size=args.precompute_ref_batch_size or args.per_device_train_batch_size,
        max_tokens=args.max_tokens_per_batch,
        world=accelerator.num_processes,
        padded=trainer.choice.groups_per_row == 1,
    )
    # Every rank takes the same number of batches; sharded models hang otherwise.
    batches = [batch for i, batch in enumerate(sampler) if i % accelerator.num_processes == accelerator.process_index]
    loader = torch.utils.data.DataLoader(
        WithEmptyGroups(dataset),
        batch_sampler=batches,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
    )
    assert trainer.reference is not None
    for indices, batch in tqdm(
        zip(batches, loader, strict=True),
        total=len(batches),
        desc="Reference log-probs",
        disable=not accelerator.is_local_main_process,
    ):
        batch = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager(), trainer.reference.active(trainer.model_wrapped) as model:
            scores = trainer.scorer(model, batch, frozen_vision=True)
        lengths = batch["lengths"].tolist()
        flat = (scores.per_token_logps if store.tokens else scores.logps).float().cpu().numpy()
        values = iter(np.split(flat, np.cumsum(lengths)[:-1] if store.tokens else np.arange(1, len(flat))))
        for index, count in zip(indices, torch.bincount(batch["group"]).tolist(), strict=True):
            own = [next(values) for _ in range(count)]
            if index < len(missing):  # beyond are copies that keep a rank busy
                store.add(keys[missing[index]], own)
    accelerator.wait_for_everyone()


def _run_key(trainer: SilkieDPOTrainer) -> str:
    """Hash of everything besides a group that its reference log-probs depend on."""
    args = trainer.args
    facts = {
        "weights": sorted(_gather([trainer.reference_hash])),
        "encoder": trainer.encoder.fingerprint(),
        "layout": [trainer.choice.layout, trainer.choice.backend],
        "dtype": [str(trainer.model.dtype), args.bf16, args.fp16, args.tf32],
        "kernel": [args.use_fused_logprob, args.logprob_impl, trainer.accelerator.device.type],
        "versions": [silkie.__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=12).hexdigest()


def _gather(parts: list[Any]) -> list[Any]:
    """The parts of all ranks, in rank order."""
    return gather_object(parts)
