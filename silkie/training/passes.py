"""Forward passes of a micro-batch: the reference's and the policy's, and both again on corrupted images for mDPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from silkie.batch.batch import Batch
from silkie.losses import GroupLogps, kl_estimate
from silkie.model.forward import LogpsForward, SequenceLogps
from silkie.model.vision import FeatureCache
from silkie.model.vision_cache import Images, VisionCache
from silkie.training.reference import Reference
from silkie.training.reference_cache import ReferenceTable


@dataclass(slots=True, kw_only=True)
class Passes:
    """The forward passes that a run's losses need.

    Attributes:
        forward: gives the log-probs of a batch.
        reference: None where the losses need none.
        frozen_vision: the vision tower does not train, so its features are shared between the passes.
        corrupted: also score the groups with corrupted images.
        kl: also estimate the KL divergence on responses of other prompts.
        token_stats: also return per-token statistics of the policy.
        aspects: rating aspects of the data.
        router_aux: also return the load balancing loss of the policy's routers.
        reduce: sums a tensor over all ranks.
        vision_cache: features of the frozen tower on disk.
        table: reference log-probs of the training data; None: the reference runs on every batch.
    """

    forward: LogpsForward
    reference: Reference | None
    frozen_vision: bool
    corrupted: bool
    kl: bool
    token_stats: bool
    aspects: tuple[str, ...] = ()
    router_aux: bool = False
    reduce: Callable[[Tensor], Tensor] | None = None
    table: ReferenceTable | None = None
    vision_cache: VisionCache | None = None

    def run(self, policy: Any, batch: Batch, *, use_table: bool) -> tuple[SequenceLogps, GroupLogps]:
        """Log-probs of the policy, and everything that the losses read.

        Args:
            policy: the policy as the training loop calls it.
            use_table: whether the batch is of the training data; evaluation data is not in the table.
        """
        cache = self.features(batch)
        reference = self._reference(policy, batch, cache, use_table)
        sequence_logps = self.forward(
            policy,
            batch,
            frozen_vision=self.frozen_vision,
            cache=cache,
            return_stats=self.token_stats,
            router_aux=self.router_aux,
        )
        logps = preferences_of(batch, self.aspects)
        logps.logps, logps.per_token_logps = sequence_logps.logps, sequence_logps.per_token_logps
        logps.log_sum_sq_probs = sequence_logps.stats.log_sum_sq_probs if sequence_logps.stats else None
        if reference is not None:
            logps.ref_logps, logps.ref_per_token_logps = reference.logps, reference.per_token_logps
            if self.kl:
                others = batch["mismatched"]
                logps.kl = kl_estimate(
                    sequence_logps.logps[others], reference.logps[others], batch["mismatched_weights"], self.reduce
                )
        if self.corrupted:
            self._score_corrupted(policy, batch, logps)
        return sequence_logps, logps

    def score_reference(self, policy: Any, batch: Batch) -> GroupLogps:
        """The reference's log-probs of a batch, computed now, also in the place of the policy's.

        Raises:
            ValueError: the losses need no reference, so that there is none.
        """
        if self.reference is None:
            raise ValueError("The run has no reference: its losses need none.")
        sequence_logps = self._score_reference(self.reference, policy, batch, None)
        logps = preferences_of(batch, self.aspects)
        logps.logps = logps.ref_logps = sequence_logps.logps
        logps.per_token_logps = logps.ref_per_token_logps = sequence_logps.per_token_logps
        return logps

    def features(self, batch: Batch) -> FeatureCache | None:
        """What the passes over a batch share of its images; None where the tower trains."""
        if self.vision_cache is None:
            return FeatureCache() if self.frozen_vision else None
        return FeatureCache(store=self.vision_cache, images=Images.of(batch))

    def _reference(
        self, policy: Any, batch: Batch, cache: FeatureCache | None, use_table: bool
    ) -> SequenceLogps | None:
        if self.reference is None:
            return None
        if self.table is not None and use_table:
            return self.table.lookup(batch)
        return self._score_reference(self.reference, policy, batch, cache)

    def _score_reference(
        self, reference: Reference, policy: Any, batch: Batch, cache: FeatureCache | None
    ) -> SequenceLogps:
        shared = cache if reference.shares_vision else None
        with reference.active(policy) as model:
            return self.forward(model, batch, frozen_vision=True, cache=shared)

    def _score_corrupted(self, policy: Any, batch: Batch, logps: GroupLogps) -> None:
        assert self.reference is not None  # mdpo_image asks for it
        own: Any = batch["corrupted"]
        kept: Any = batch
        if "segments" in own:  # other rows: masks that are kept in the batch are not theirs
            kept = {name: value for name, value in batch.items() if not name.startswith("_")}
        corrupted = cast(Batch, {**kept, **own})
        cache = FeatureCache() if self.frozen_vision else None  # on disk are features of the images as they are
        logps.ref_corrupted_logps = self._score_reference(self.reference, policy, corrupted, cache).logps
        logps.corrupted_logps = self.forward(policy, corrupted, frozen_vision=self.frozen_vision, cache=cache).logps


def preferences_of(batch: Batch, aspects: tuple[str, ...]) -> GroupLogps:
    """What the losses know of a batch before any model runs: pairs, weights, ratings and lengths."""
    return GroupLogps(
        lengths=batch["lengths"],
        pairs=batch["pairs"],
        pair_weights=batch["pair_weights"],
        group=batch["group"],
        ratings=batch.get("ratings"),
        aspect_ratings=batch.get("aspect_ratings"),
        aspects=aspects,
        owner=batch["owner"],
        token_ids=batch["target"],
        examples=batch.get("examples"),
        desirable=batch.get("desirable"),
        example_weights=batch.get("example_weights"),
    )
