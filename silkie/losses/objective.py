"""The training objective: a weighted sum of losses, each the weighted mean over the pairs of a whole optimizer step.

A micro-batch cannot know the size of the step it belongs to, so the sums of its terms are divided by totals that the
trainer has summed over all micro-batches and ranks beforehand (`Objective.units`). The losses of the micro-batches then
add up to the loss of the step, however the step was split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .catalogue import DIFFERENCE, SPECS
from .divergence import f_scores
from .group_logps import GroupLogps
from .listwise import listed_weights, ranked_groups
from .margins import margin_offset
from .options import OFFSET_USERS, LossOptions, validate
from .pair_view import PairView, full
from .spec import LossSpec
from .state import RunningMean

Totals = Mapping[str, Tensor]


class Objective:
    """A weighted sum of losses over groups. Build it with `build_objective`.

    Attributes:
        needs: what a batch must carry beyond `logps`, `lengths` and `pairs`: "reference" (ref_logps), "tokens"
            (per_token_logps, owner), "reference_tokens" (ref_per_token_logps), "token_ids", "stats" (log_sum_sq_probs),
            "corrupted" (corrupted_logps and ref_corrupted_logps), "ratings" (margins or ratings), "aspects"
            (aspect_ratings), "groups" (group), "labels" (examples, desirable, example_weights), "kl" (kl).
            Where it lacks "reference" no loss reads a reference, and none need be run.
    """

    def __init__(self, loss_type: Sequence[str], loss_weights: Sequence[float] | None, options: LossOptions) -> None:
        validate(loss_type, loss_weights, options)
        self.terms = dict(zip(loss_type, loss_weights or [1.0] * len(loss_type), strict=True))
        self.options = options
        self.needs = _needs([SPECS[name] for name in loss_type], options)
        self._reward_mean = RunningMean() if options.bco_reward_shift == "running_mean" else None

    @property
    def needs_reference(self) -> bool:
        """Whether a reference must be run."""
        return bool(self.needs & {"reference", "reference_tokens"})

    @property
    def unpaired(self) -> bool:
        """Whether the losses take labelled responses and no pairs; they do not mix."""
        return "labels" in self.needs

    def row_weights(self, batch: GroupLogps) -> Tensor:
        """[P] weight of each pair: the data's, times those that the options take from the ratings; [U] of each
        labelled response where the losses take these."""
        return PairView(batch, self.options, self.unpaired).weights

    def reference_logps(self, batch: GroupLogps) -> tuple[Tensor, Tensor]:
        """Chosen and rejected log-probs [P] of the reference, weighted by token where the options say so; of unpaired
        data those of the desirable and of the undesirable responses."""
        if self.unpaired:
            view = PairView(batch, self.options, labelled=True)
            logps, desirable = view.plain("ref_logps", view.examples), batch.require("desirable", "the objective")
            return logps[desirable], logps[~desirable]
        return PairView(batch, self.options, self.unpaired).reference

    def check_aspects(self, aspects: Sequence[str]) -> None:
        """Whether data that is rated on `aspects` carries what the options read.

        Raises:
            ValueError: it has no ratings, or lacks an aspect that `aspect_weights` names.
        """
        if not aspects and self.needs & {"ratings", "aspects"}:
            option = "aspect_weights" if "aspects" in self.needs else f"margin={self.options.margin!r}"
            option = option if self.options.label_threshold is None else "label_threshold"
            raise ValueError(
                f"`{option}` reads ratings, and the data has none. Remove the option, or load data with a `ratings`"
                " column."
            )
        unknown = set(self.options.aspect_weights or ()) - set(aspects)
        if unknown:
            raise ValueError(f"`aspect_weights` names {sorted(unknown)}; the data is rated on {list(aspects)}.")

    def units(self, batch: GroupLogps) -> dict[str, Tensor]:
        """The batch's share of each normaliser, 0-d floats known before the model runs: "pair" sum of pair weights,
        "token" chosen tokens weighted by pair, "group" number of groups with a ranking. Sum them over the micro-batches
        and ranks of an optimizer step."""
        view = PairView(batch, self.options, self.unpaired)
        units: dict[str, Tensor] = {}
        for unit in {SPECS[name].unit for name in self.terms}:
            if unit in ("pair", "example"):
                units[unit] = view.weights.sum()
            elif unit == "token":
                units[unit] = (view.weights * view.chosen_lengths).sum()
            else:
                rows = listed_weights(view.weights, batch.pairs, batch.lengths.shape[0])
                units[unit] = ranked_groups(rows, batch.require("group", "a listwise loss"))
        return units

    def __call__(
        self, batch: GroupLogps, totals: Totals | None = None, *, training: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch and its metrics.

        Args:
            totals: unit -> total over the optimizer step. None: the batch is the whole step.
            training: whether rewards enter the running mean of bco_pair.
        Returns:
            0-d loss = sum over the terms of weight * sum(term) / totals[unit], and detached metrics [P]:
            rewards/{chosen, rejected, margins, accuracies}, logps/{chosen, rejected}, and loss/{name} for losses with a
            row per pair (sft: per token). Of labelled responses they are [U], NaN on the other side, with kl and
            without margins and accuracies.
        """
        if self.options.aspect_weights is not None:
            self.check_aspects(batch.aspects)
        totals = self.units(batch) if totals is None else totals
        view = PairView(batch, self.options, self.unpaired)
        metrics = self._metrics(view)
        # Without a pair a term is an empty sum, which still hangs on the graph: every rank can run backward.
        loss = torch.zeros((), device=batch.pairs.device)
        for name, weight in self.terms.items():
            spec = SPECS[name]
            rows, row_weights = self._rows(name, spec, view)
            total = totals[spec.unit].to(rows.device)
            # A step whose pairs all have weight 0 has a total of 0: its loss is then 0 / 1, not NaN.
            loss = loss + weight * (rows * row_weights.to(rows.dtype)).sum() / torch.where(total > 0, total, 1.0)
            if spec.unit != "group":
                metrics[f"loss/{name}"] = (
                    rows / view.chosen_lengths.clamp(min=1) if spec.unit == "token" else rows
                ).detach()
        if self._reward_mean is not None and training:
            self._reward_mean.collect((metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2, view.weights)
        return loss, metrics

    def _rows(self, name: str, spec: LossSpec, view: PairView) -> tuple[Tensor, Tensor]:
        """Rows of a loss and their weights in its mean: [P], or [R] for a listwise loss."""
        batch, options = view.batch, self.options
        kwargs: dict[str, Any] = {keyword: getattr(options, field) for keyword, field in spec.options.items()}
        if spec.inputs == "reference":
            return self._reference_rows(name, spec, view, kwargs), view.weights
        if spec.inputs == "labelled":
            if spec.kl:
                kwargs["kl"] = batch.require("kl", name)
            logps, ref_logps = (view.plain(column, view.examples) for column in ("logps", "ref_logps"))
            return spec.fn(logps, ref_logps, batch.require("desirable", name), **kwargs), view.weights
        if spec.inputs == "sft":
            return spec.fn(view.plain("logps", view.chosen_index)), view.weights
        if spec.inputs == "anchor":
            return (
                spec.fn(view.plain("logps", view.chosen_index), view.plain("ref_logps", view.chosen_index), **kwargs),
                view.weights,
            )
        if spec.inputs == "image":
            names = ("logps", "corrupted_logps", "ref_logps", "ref_corrupted_logps")
            return spec.fn(*(view.plain(logps, view.chosen_index) for logps in names), **kwargs), view.weights
        if spec.inputs == "listwise":
            logps, ref_logps = full(batch.require("logps", name)), full(batch.require("ref_logps", name))
            row_weights = listed_weights(view.weights, batch.pairs, batch.lengths.shape[0])
            return spec.fn(logps, ref_logps, batch.pairs, active=view.weights > 0, **kwargs), row_weights
        chosen, rejected = view.plain("logps", view.chosen_index), view.plain("logps", view.rejected_index)
        if options.margin == "offset" and name in OFFSET_USERS:
            offset = margin_offset(view.margins, options.margin_scale)
            # The offset is one of the logit. gamma stands in the logit itself; a log-prob is multiplied by beta on its
            # way there.
            if name == "simpo":
                kwargs["gamma"] = kwargs["gamma"] + offset
            else:
                chosen = chosen - offset / options.beta
        return spec.fn(chosen, rejected, view.chosen_lengths, view.rejected_lengths, **kwargs), view.weights

    def _reference_rows(self, name: str, spec: LossSpec, view: PairView, kwargs: dict[str, Any]) -> Tensor:
        options = self.options
        (chosen, rejected), (ref_chosen, ref_rejected) = view.policy, view.reference
        # Such a loss reads nothing but the difference of two log-ratios, so the scores can take their place.
        if options.f_divergence_type != "reverse_kl" and name in DIFFERENCE:
            chosen = f_scores(chosen - ref_chosen, options.f_divergence_type, options.f_alpha_divergence_coef)
            rejected = f_scores(rejected - ref_rejected, options.f_divergence_type, options.f_alpha_divergence_coef)
            ref_chosen, ref_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
        if options.margin == "offset" and name in OFFSET_USERS:
            ref_chosen = ref_chosen + margin_offset(view.margins, options.margin_scale) / options.beta
        if spec.normalized:
            kwargs = {**kwargs, "chosen_lengths": view.chosen_lengths, "rejected_lengths": view.rejected_lengths}
        if name == "bco_pair" and self._reward_mean is not None:
            kwargs = {**kwargs, "reward_shift": self._reward_mean.value}
        # Sorting moves a margin to another row than the one its pair's weight is in.
        if spec.permutes:
            _check_equal_weights(name, view.weights)
        rows = spec.fn(chosen, rejected, ref_chosen, ref_rejected, **kwargs)
        return rows * view.wpo_weights if options.use_weighting else rows

    def _metrics(self, view: PairView) -> dict[str, Tensor]:
        if self.unpaired:
            return self._labelled_metrics(view)
        # Detached one by one, not under no_grad: the view caches these tensors, and the losses differentiate through
        # them.
        referenced = "reference" in self.needs
        chosen, rejected = (logps.detach() for logps in (view.policy if referenced else self._plain_policy(view)))
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        if referenced:
            chosen, rejected = chosen - view.reference[0].detach(), rejected - view.reference[1].detach()
        elif "simpo" in self.terms:
            chosen, rejected = chosen / view.chosen_lengths.clamp(min=1), rejected / view.rejected_lengths.clamp(min=1)
        metrics["rewards/chosen"], metrics["rewards/rejected"] = (
            self.options.beta * chosen,
            self.options.beta * rejected,
        )
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["rewards/accuracies"] = (metrics["rewards/margins"] > 0).to(chosen.dtype)
        return metrics

    def _labelled_metrics(self, view: PairView) -> dict[str, Tensor]:
        batch = view.batch
        desirable = batch.require("desirable", "the objective")
        logps, reference = (view.plain(name, view.examples).detach() for name in ("logps", "ref_logps"))
        metrics = {}
        for side, own in (("chosen", desirable), ("rejected", ~desirable)):
            metrics[f"logps/{side}"] = torch.where(own, logps, torch.nan)
            metrics[f"rewards/{side}"] = torch.where(own, self.options.beta * (logps - reference), torch.nan)
        if batch.kl is not None:
            metrics["kl"] = batch.kl.expand(len(logps))
        return metrics

    @staticmethod
    def _plain_policy(view: PairView) -> tuple[Tensor, Tensor]:
        return view.plain("logps", view.chosen_index), view.plain("logps", view.rejected_index)

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None, device: torch.device | str = "cpu") -> None:
        """Call once after every optimizer step, on every rank: moves the step's rewards into the running mean of
        bco_pair.

        Args:
            reduce: sums a tensor over all ranks, for example `functools.partial(accelerator.reduce, reduction="sum")`.
                None: one rank.
            device: where `reduce` expects tensors, for a rank that saw no pair.
        """
        if self._reward_mean is not None:
            self._reward_mean.commit(reduce, device)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: the running mean of bco_pair, {} where there is none. Call it between optimizer
        steps."""
        return {} if self._reward_mean is None else {"reward_mean": self._reward_mean.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._reward_mean is not None:
            if "reward_mean" not in state:
                raise ValueError(
                    "the state holds no `reward_mean`: the checkpoint was written without"
                    " `bco_reward_shift='running_mean'`."
                )
            self._reward_mean.load_state_dict(state["reward_mean"])


def _check_equal_weights(name: str, weights: Tensor) -> None:
    if weights.numel() and not bool((weights == weights[0]).all()):
        raise ValueError(
            f"{name} sorts the margins of a batch, so a pair weight has no row to weigh. Give all pairs the same"
            " weight."
        )


def _needs(specs: Sequence[LossSpec], options: LossOptions) -> frozenset[str]:
    inputs = {spec.inputs for spec in specs}
    needs: set[str] = set()
    # sft alone reads no reference, but its rewards do: TRL logs them, so they must be those of TRL
    if inputs & {"reference", "image", "anchor", "listwise", "labelled"} or inputs == {"sft"}:
        needs.add("reference")
    if options.token_weighted:
        needs |= {"tokens", "reference_tokens"}
    if options.ddpo_gamma is not None:
        needs.add("token_ids")
    if options.use_weighting:
        needs |= {"tokens", "stats"}
    if "image" in inputs:
        needs.add("corrupted")
    if "listwise" in inputs:
        needs.add("groups")
    if "labelled" in inputs:
        needs.add("labels")
    if any(spec.kl for spec in specs):
        needs.add("kl")
    if options.aspect_weights is not None:
        needs.add("aspects")
    elif options.margin != "none" or options.label_threshold is not None:
        needs.add("ratings")
    return frozenset(needs)


def build_objective(
    loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None, options: LossOptions | None = None
) -> Objective:
    """The objective of `loss_type` (one name or several), weighted by `loss_weights` (default: 1 each), with validated
    options.

    Raises:
        ValueError: see `silkie.losses.options.validate`.
    """
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    return Objective(names, loss_weights, LossOptions() if options is None else options)
